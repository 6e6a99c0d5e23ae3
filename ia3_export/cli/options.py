"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import click

from ia3_export.cli.output import Output
from ia3_export.errors import UsageError
from ia3_export.planning.recipe import Recipe
from ia3_export.words import Combine

F = TypeVar("F", bound=Callable[..., Any])


def gathered(record: type, name: str) -> Callable[[F], F]:
    """The options of a command that are fields of `record`, as one argument `name`.

    A record is made once, here.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def command(*arguments: Any, **options: Any) -> Any:
            values = {f.name: options.pop(f.name) for f in fields(record) if f.name in options}
            return function(*arguments, **options, **{name: record(**values)})

        return cast(F, command)

    return decorate


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.find_root().meta["ia3_export.json"] = value
    return value


def _remember_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.find_root().meta["ia3_export.verbose"] = value
    return value


def choice(words: Any) -> click.Choice[str]:
    """The words of a ``Literal``, in its order."""
    return click.Choice(get_args(words))


base_option = click.option(
    "--base", required=True, metavar="BASE", help="Base model: folder, file or hub id."
)
adapters_option = click.option(
    "--adapter",
    "adapters",
    required=True,
    multiple=True,
    metavar="ADAPTER",
    help="IA3 adapter: folder, file or hub id. Repeat it for several, in the order of folding.",
)
rules_option = click.option(
    "--map",
    "rules",
    multiple=True,
    metavar="'REGEX=output|input'",
    help="Adapter file in no known format: keys that match the expression are vectors on that side; its "
    "groups, joined by dots, are the module path. Repeat it; the first rule that matches counts.",
)
output_option = click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder to create."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an output folder that ia3-export wrote."
)


def output_options(function: F) -> F:
    """``--json``, ``--quiet`` and ``--verbose``, as the argument ``out``."""
    function = gathered(Output, "out")(function)
    function = click.option(
        "--json", "as_json", is_flag=True, callback=_remember_json, help="One JSON document on stdout."
    )(function)
    function = click.option("-q", "--quiet", is_flag=True, help="Errors only.")(function)
    return click.option(
        "-v", "--verbose", is_flag=True, callback=_remember_verbose, help="Every tensor, every step."
    )(function)


def parse_weights(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...]:
    """``0.7,0.3`` as numbers."""
    try:
        return tuple(float(part) for part in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter("give numbers separated by commas, for example 0.7,0.3") from None


weights_option = click.option(
    "--weights", callback=parse_weights, metavar="W,W,...", help="One per adapter, for linear and delta."
)


def said_recipe(combine: Combine | None, weights: tuple[float, ...]) -> Recipe | None:
    """``--combine`` and ``--weights`` of a merge that was made before; None where its manifest shall say."""
    if combine is not None:
        return Recipe(combine=combine, weights=weights)
    if weights:
        raise UsageError("--weights needs --combine", hint="say how the adapters were merged")
    return None


def parse_words(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """``fp32,int8`` as words."""
    return tuple(word.strip() for word in value.split(",") if word.strip())


def parse_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """``5GB``, ``500MB``, ``2GiB`` or plain bytes."""
    if value is None:
        return None
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = value.strip().rstrip("BbKkMmGgIi ")
    unit = value.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise click.BadParameter("give a size such as 5GB or 500MB")
    return size
