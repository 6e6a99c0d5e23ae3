"""``ia3-export convert`` and ``ia3-export combine``: commands that write an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ia3_export.cli.options import (
    adapters_option,
    choice,
    output_option,
    output_options,
    overwrite_option,
    rules_option,
    weights_option,
)
from ia3_export.cli.output import Output
from ia3_export.words import Combine, TaskType

if TYPE_CHECKING:
    from ia3_export.commands.convert import WrittenAdapter


@click.command("convert")
@click.argument("adapter")
@output_option
@rules_option
@click.option(
    "--base",
    metavar="BASE",
    help="The model it belongs to: checks names and shapes, restores names that old versions "
    "of PEFT damaged.",
)
@click.option(
    "--task-type",
    type=choice(TaskType),
    help="PEFT's, for the configuration; default what the adapter says.",
)
@click.option("--allow-missing", is_flag=True, help="Accept modules of the base without a vector.")
@click.option(
    "--allow-unused", is_flag=True, help="Leave out vectors and heads that have no place in the model."
)
@overwrite_option
@output_options
def convert_command(
    adapter: str,
    output: Path,
    rules: tuple[str, ...],
    base: str | None,
    task_type: TaskType | None,
    allow_missing: bool,
    allow_unused: bool,
    overwrite: bool,
    out: Output,
) -> None:
    """Rewrite an adapter of any format in PEFT's layout.

    PEFT, T-Few, MaTS, AdapterHub's adapters, and with --map any file of vectors. The result loads with
    PeftModel.from_pretrained and has the same forward.

    \b
      ia3-export convert t03b_ia3_finish.pt --output t-few --task-type SEQ_2_SEQ_LM
      ia3-export convert vectors.pt --map '(.+)\\.ia3_scale=output' --output mine

    \f
    More than seven parameters: one an option.
    """
    from ia3_export.adapters import read_adapters
    from ia3_export.commands.convert import convert

    read = read_adapters([adapter], rules)[0]
    done = convert(
        read,
        output,
        base=base,
        task_type=task_type,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        overwrite=overwrite,
    )
    _show(out, done)


@click.command("combine")
@adapters_option
@rules_option
@output_option
@click.option(
    "--combine",
    type=choice(Combine),
    help="Product of the vectors, PEFT's sum of w*l, or 1 + sum of w*(l-1). Default: linear with "
    "--weights, product without.",
)
@weights_option
@click.option("--base", metavar="BASE", help="The model they belong to; as in convert.")
@overwrite_option
@output_options
def combine_command(
    adapters: tuple[str, ...],
    rules: tuple[str, ...],
    output: Path,
    combine: Combine | None,
    weights: tuple[float, ...],
    base: str | None,
    overwrite: bool,
    out: Output,
) -> None:
    """Make one adapter of several, in PEFT's layout.

    \b
      ia3-export combine --adapter a --adapter b --output a-then-b
      ia3-export combine --adapter a --adapter b --weights 0.7,0.3 --output sum
      ia3-export combine --adapter a --adapter b --combine delta --weights 0.7,0.3 --output mix

    \f
    More than seven parameters: one an option.
    """
    from ia3_export.adapters import read_adapters
    from ia3_export.commands.convert import combine as combine_adapters

    read = read_adapters(adapters, rules)
    _show(
        out, combine_adapters(read, output, combine=combine, weights=weights, base=base, overwrite=overwrite)
    )


def _show(out: Output, written: WrittenAdapter) -> None:
    content = written.content
    for warning in written.warnings:
        out.text(f"warning: {warning}")
    sources = " + ".join(f"{row['name']} ({row['format']})" for row in content["sources"])
    out.text(
        f"{sources} -> {written.folder}: {content['vectors']} vectors, {content['parameters']:,} parameters"
    )
    out.document(content)
