"""Small questions to files beside the weights, whose names and contents may be anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns`, with wildcards, is the whole of `name`."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def mapping(value: object) -> Mapping[str, Any]:
    """`value` of a JSON file where it is an object, else ``{}``."""
    return value if isinstance(value, dict) else {}
