"""Numbers, names of modules and foreign text as what is drawn shows them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

#: Characters that turn the direction of the text after them: a name could so look like another one.
_BIDI = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def number(value: float | None) -> str:
    """`value` to 3 significant digits; below but near 1 as many as tell it from 1. ``—`` for None."""
    if value is None:
        return "—"
    if not math.isfinite(value):
        return "not finite"
    if 0.99 < value < 1:
        missing = 1 - value
        if missing < 1e-6:
            return f"1 - {missing:.3g}"
        return f"{value:.{2 - math.floor(math.log10(missing))}f}".rstrip("0")
    if 1000 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def factor(value: float) -> str:
    """A channel's factor with the same decimals for all, so that they stand in columns."""
    return f"{value:.3f}" if abs(value) < 100 else number(value)


def compared(value: float, limit: float) -> tuple[str, str]:
    """Both as `number` shows them, with more digits where one could not see which is larger."""
    shown = number(value), number(limit)
    digits = 4
    while value != limit and shown[0] == shown[1] and digits < 18:
        shown, digits = (f"{value:.{digits}g}", f"{limit:.{digits}g}"), digits + 1
    return shown


def times(value: float | None) -> str:
    """`value` as a factor."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:,.3g} times"


def share(value: float | None) -> str:
    """`value` as a percentage; what is short of all by 0.001 % or more is not rounded up to 100 %."""
    if value is None or not math.isfinite(value):
        return number(value)
    if 0.99 < value < 1 - 1e-5:
        return f"{100 * float(number(value)):.6g} %"
    return f"{number(100 * value)} %"


def size(nbytes: int) -> str:
    """`nbytes` in decimal units, to 3 significant digits: ``90.9 MB``."""
    amount, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while amount >= 999.5 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}" if units[0] != "bytes" else f"{nbytes} bytes"


def human_bytes(count: float) -> str:
    """``2.2 GB``: `size` with one decimal for all, so that they stand in a terminal's columns."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def power(exponent: int) -> str:
    """The number 10 to the `exponent` as axes label it."""
    return f"{10.0**exponent:g}" if -2 <= exponent <= 3 else f"1e{exponent}"


def span(values: Iterable[int]) -> str:
    """Smallest to largest of `values` (one at least): ``384 to 1,536``, or ``384`` where all are that."""
    known = set(values)
    low, high = min(known), max(known)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def clean(text: str) -> str:
    """`text` without characters that break a document or turn its direction: each becomes U+FFFD."""
    return "".join(
        "\ufffd"
        if c in _BIDI or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in "\ufffe\uffff"
        else c
        for c in text
    )


def tail(text: str, most: int) -> str:
    """The end of `text`, which tells names of modules apart, in at most `most` characters."""
    text = clean(text)
    return text if len(text) <= most else "…" + text[1 - most :]


def shortest_ends(paths: Iterable[Sequence[str]]) -> dict[tuple[str, ...], str]:
    """The last part of every path, and as many before it as no other has: BERT has two ``output.dense``."""
    distinct = {tuple(path) for path in paths}

    def shortest(path: tuple[str, ...]) -> str:
        for length in range(1, len(path)):
            if sum(other[-length:] == path[-length:] for other in distinct) == 1:
                return ".".join(path[-length:])
        return ".".join(path)

    return {path: shortest(path) for path in distinct}
