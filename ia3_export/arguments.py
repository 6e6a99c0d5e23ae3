"""The public functions refuse what the command line refuses.

Their annotations are the rules, read once, here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ia3_export.errors import UsageError

_LONGEST = 60


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an argument that is not of its annotation in `function`.

    That is a word that is not offered, a text in the place of a list, a number that is a word. `given` are
    the values by name: ``locals()`` in the function's first line.
    """
    for name, rule in _rules(function).items():
        if name in given:
            _check(f"{function.__name__}({name}={_shown(given[name])})", name, given[name], rule)


def check_fields(record: Any) -> None:
    """`check_arguments` of a dataclass that is being made: its fields are the arguments."""
    check_arguments(type(record), {field.name: getattr(record, field.name) for field in fields(record)})


def real(numbers: Iterable[float]) -> tuple[float, ...]:
    """`numbers` of any library and in any iterable, as Python's own.

    Infinite where one is larger than those can be. Raises `UsageError`.
    """
    return tuple(map(_real, numbers))


def _real(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        raise UsageError(f"{_shown(number)} is no number", hint="give numbers, such as 0.5") from None


@cache
def _rules(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


def _check(where: str, name: str, value: object, rule: Any) -> None:
    if get_origin(rule) is Sequence:
        if isinstance(value, str | bytes | os.PathLike | Mapping | Set) or not isinstance(value, Iterable):
            raise UsageError(
                f"{where} is "
                + ("in no order" if isinstance(value, Set) else "one value, and several are wanted"),
                hint="give a list: "
                f"{name}=[{', '.join(map(_shown, value)) if isinstance(value, Set) else _shown(value)}]",
            )
        for entry in value if isinstance(value, Sequence) else ():
            _check(f"{where}: {_shown(entry)}", name, entry, get_args(rule)[0])
    elif not _fits(value, rule):
        kinds = dict.fromkeys(word for part in _parts(rule) for word in _words(part))
        raise UsageError(f"{where} is not what {name} can be", hint=f"{name} is {', '.join(kinds)}")


def _parts(rule: Any) -> tuple[Any, ...]:
    return get_args(rule) if get_origin(rule) in (Union, UnionType) else (rule,)


def _fits(value: object, rule: Any) -> bool:
    return any(_fits_one(value, part) for part in _parts(rule))


def _fits_one(value: object, rule: Any) -> bool:
    if get_origin(rule) is Literal:
        return isinstance(value, str) and value in get_args(rule)
    if get_origin(rule) is Callable:
        return callable(value)
    if get_origin(rule) is Sequence:
        return isinstance(value, Iterable) and not isinstance(value, str)
    if rule is bool:
        return isinstance(value, Integral) and value in (0, 1)
    if rule in (int, float):
        return isinstance(value, Integral if rule is int else Real) and not isinstance(value, bool)
    if rule is Path:
        return isinstance(value, os.PathLike) and _fits_one(os.fspath(value), str)
    if rule is str and isinstance(value, str):
        return "\0" not in value and _is_encodable(value)
    return isinstance(value, rule) if isinstance(rule, type) else True


def _is_encodable(text: str) -> bool:
    """Whether a file can be called so.

    Half a letter of UTF-16 cannot be, bytes of a name that are no UTF-8 (as ``os`` reads them) can.
    """
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _words(rule: Any) -> list[str]:
    if get_origin(rule) is Literal:
        return [repr(word) for word in get_args(rule)]
    if get_origin(rule) is Callable:
        return ["a function"]
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
        NoneType: "None",
    }
    name = getattr(rule, "__name__", str(rule))
    return [names.get(rule, f"{'an' if name[0] in 'AEIO' else 'a'} {name}")]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
