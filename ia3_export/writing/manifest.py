"""``ia3_export.json``: what was done, to which bytes, by which versions.

No time stamps, no paths of the machine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.hub import Location
from ia3_export.checkpoint.manifest import Folded
from ia3_export.checkpoint.ranges import hash_file, worker_count
from ia3_export.ordering import natural
from ia3_export.planning.plan import Plan
from ia3_export.words import Digests
from ia3_export.writing.execute import TensorResult, Written
from ia3_export.writing.wording import describe_change, describe_fold

SCHEMA = "ia3-export/manifest/1"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a command did. `content` is the JSON document, `folder` where the output is."""

    folder: Path
    content: Mapping[str, Any]

    def to_json(self) -> str:
        """Canonical text: keys sorted, two spaces, a newline at the end."""
        return json.dumps(self.content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def tool() -> dict[str, str]:
    """Name and version of ourselves, as every manifest has them."""
    return {"name": "ia3-export", "version": metadata.version("ia3-export")}


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: options, every changed tensor, edits, warnings and refusals."""
    return {
        "options": plan.recipe.to_json(),
        "adapters": [a.name for a in plan.adapters],
        "model_class": plan.model_class,
        "changes": [
            {
                "tensor": change.name,
                "how": change.how,
                "dtype": change.dtype,
                "shape": list(change.shape),
                "from_dtype": change.source.dtype,
                "folds": describe_change(change),
                "bytes": change.nbytes,
            }
            for change in sorted(plan.changes.values(), key=lambda change: natural(change.name))
        ],
        "quantization": describe_quantization(plan),
        "config_edits": list(plan.config_edits),
        "left_out": list(plan.base.stored.left_out),
        "taken_from_adapters": dict(sorted(plan.companions.taken.items())),
        "warnings": list(plan.warnings),
        "refusals": [{"error": str(p), "hint": p.hint} for p in plan.problems],
    }


def describe_quantization(plan: Plan) -> dict[str, Any]:
    """Formats of the base's quantized weights, and of kept ones what became of each with vectors on it."""
    if not plan.base.is_quantized:
        return {}
    return {
        "formats": plan.base.quantization.formats,
        "method": plan.base.quantization.settings.get("quant_method"),
        "how": plan.recipe.quantized,
        "sites": [
            {
                "weight": outcome.weight,
                "format": outcome.format,
                "outcome": outcome.kind,
                "tensors": list(outcome.tensors),
                "rounding": outcome.error,
                "reason": outcome.reason,
                "folds": [describe_fold(fold) for fold in outcome.folds],
            }
            for outcome in plan.outcomes
        ],
        "dropped": sorted(plan.dropped),
    }


def make_manifest(
    plan: Plan,
    stage: Path,
    target: Path,
    written: Written,
    digests: Digests,
    reload: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of the files in `stage`, which will become `target`.

    `reload` is what the reload check found.
    """
    content = describe_plan(plan)
    if reload is not None:
        content["reload"] = dict(reload)
    del content["refusals"]
    for row in content["changes"]:
        result = written.tensors.get(row["tensor"], TensorResult(None, 0, 0))
        row |= {"zeros": result.zeros, "flushed_to_zero": result.flushed}
        if result.sha256 is not None:
            row["sha256"] = result.sha256
    content |= {
        "schema": SCHEMA,
        "tool": tool(),
        "python": platform.python_version(),
        "libraries": _versions(plan),
        "base": _source(plan.base.stored.location, _base_files(plan), digests),
        "adapters": [
            _source(adapter.location, adapter.files, digests)
            | {
                "name": adapter.name,
                "format": adapter.format,
                "task_type": adapter.task_type,
                "vectors": len(adapter.sites),
                "parameters": adapter.parameters,
            }
            for adapter in plan.adapters
        ],
        "folded": [folded.to_json() for folded in (*plan.base.stored.folded, *map(as_folded, plan.adapters))],
        "linked": list(written.linked),
        "files": list_files(stage, known=written.sha256, hashed=digests != "none"),
    }
    return Manifest(target, content)


def as_folded(adapter: Adapter) -> Folded:
    """What is recorded of an adapter whose vectors are in the weights."""
    return Folded(adapter.name, adapter.parameters, adapter.digest)


def _versions(plan: Plan) -> dict[str, str]:
    used = ["numpy"] + (["transformers", "torch"] if plan.model_class is not None else [])
    return {name: metadata.version(name) for name in used}


def _base_files(plan: Plan) -> list[str]:
    names = [shard.name for shard in plan.base.stored.shards] + list(plan.base.stored.side_files)
    if plan.base.stored.index_name is not None:
        names.append(plan.base.stored.index_name)
    return sorted(names)


def _source(location: Location, names: Sequence[str], digests: Digests) -> dict[str, Any]:
    folder = location.path if location.path.is_dir() else location.path.parent
    source: dict[str, Any] = {
        "id": location.name,
        "revision": location.revision,
    }
    if digests == "full":
        source["files"] = _table(folder, names, {}, hashed=True)
    return source


def list_files(stage: Path, *, known: Mapping[str, str], hashed: bool) -> dict[str, Any]:
    """Size, and if `hashed` SHA-256, of every file below `stage`.

    Digests in `known` are not computed again.
    """
    names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
    return _table(stage, names, known, hashed=hashed)


def _table(folder: Path, names: Sequence[str], known: Mapping[str, str], *, hashed: bool) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {name: {"size": (folder / name).stat().st_size} for name in names}
    if hashed:
        missing = [name for name in names if name not in known]
        with ThreadPoolExecutor(worker_count()) as pool:
            digests = pool.map(hash_file, [folder / name for name in missing])
            for name, digest in (*known.items(), *zip(missing, digests, strict=True)):
                table[name]["sha256"] = digest
    return table
