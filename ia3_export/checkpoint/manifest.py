"""What the manifest in a folder says: whose the folder is, and what was folded into its weights before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.side_files import mapping

#: What every command of ours leaves in the folder that it wrote.
MANIFEST = "ia3_export.json"
_LARGEST = 256 << 20


@dataclass(frozen=True, slots=True)
class Folded:
    """An adapter whose vectors the weights already hold.

    `vectors` is ``Adapter.digest``, None in older manifests.
    """

    name: str
    parameters: int
    vectors: str | None

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"name": self.name, "parameters": self.parameters, "digest": self.vectors}


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The JSON object in the manifest's place in `folder`, whoever wrote it; empty where none can be read."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LARGEST:
            return {}
        return mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def read_record(folder: Path) -> Mapping[str, Any] | None:
    """The manifest in `folder`; None where there is none of ours, or none that can be read."""
    value = read_manifest(folder)
    return value if str(value.get("schema", "")).startswith("ia3-export/") else None


def read_folded(folder: Path, name: str | None = None) -> tuple[Folded, ...]:
    """What the manifest in `folder` says was folded into the weights there, or the weight file `name`."""
    record = read_record(folder)
    if record is None or (name is not None and name not in mapping(record.get("files"))):
        return ()
    rows = record.get("folded")
    if rows is None and record["schema"] == "ia3-export/manifest/1":
        rows = record.get("adapters")
    found = [mapping(row) for row in rows] if isinstance(rows, list) else []
    return tuple(
        Folded(row["name"], row["parameters"], digest if isinstance(digest, str) else None)
        for row in found
        if isinstance(row.get("name"), str) and isinstance(row.get("parameters"), int)
        for digest in [row.get("digest")]
    )
