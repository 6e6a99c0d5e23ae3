"""Names as people read them: layer 2 before layer 10, and a module inside the modules around it."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"([0-9]+)")


def natural(name: str) -> tuple[str | tuple[int, str], ...]:
    """A key for sorting names by the numbers in them."""
    parts = _NUMBER.split(name)
    return tuple(
        (len(part.lstrip("0")), part.lstrip("0")) if place % 2 else part for place, part in enumerate(parts)
    )


def enclosing(path: str) -> list[str]:
    """The modules around the one at `path`, outermost first, and it itself."""
    return [path[:i] for i, letter in enumerate(path) if letter == "."] + [path]
