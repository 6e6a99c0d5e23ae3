"""Readers of adapter formats, each bytes → the same frozen :class:`~ia3_export.adapters.model.Adapter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ia3_export.adapters.model import Adapter
from ia3_export.adapters.peft import read_peft

#: All formats at one look; the order is the order of detection.
READERS: Mapping[str, Callable[[str | Path], Adapter]] = {"peft": read_peft}


def read_adapter(source: str | Path) -> Adapter:
    """Read an adapter: a folder, a file or a hub id. Raises `IA3ExportError`."""
    return READERS["peft"](source)
