"""What a report says besides the verdict: vectors, versions, digests, and how the artifact was merged."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.hub import Location
from ia3_export.checkpoint.manifest import MANIFEST
from ia3_export.checkpoint.ranges import hash_file
from ia3_export.planning.plan import Plan
from ia3_export.report.model import ModelId, SiteSummary
from ia3_export.vectors.channels import count_channels

_LIBRARIES = ("torch", "transformers", "peft", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu")
_SHOWN = 128


def sites_of(plan: Plan | None, adapters: Sequence[Adapter]) -> dict[str, list[str]]:
    """Modules with a vector, and the stored tensors that it is folded into (none known without a plan)."""
    sites: dict[str, list[str]] = {module: [] for adapter in adapters for module in adapter.modules}
    for name, change in plan.changes.items() if plan is not None else ():
        for fold in change.folds:
            if fold.module in sites:
                sites[fold.module].append(name)
    return sites


def summarize_sites(adapters: Sequence[Adapter]) -> tuple[SiteSummary, ...]:
    """Every vector, with at most 128 of its elements."""
    return tuple(
        _summarize(adapter.name, site.module, site.direction, site.vector.astype("<f8"))
        for adapter in adapters
        for site in adapter.sites.values()
    )


def _summarize(adapter: str, module: str, direction: Any, values: Any) -> SiteSummary:
    counts = count_channels(values)
    stretch = -(-len(values) // _SHOWN)
    padded = np.ones(-(-len(values) // stretch) * stretch)
    padded[: len(values)] = values
    rows = padded.reshape(-1, stretch)
    farthest = np.abs(rows - 1).argmax(axis=1)
    return SiteSummary(
        adapter=adapter,
        module=module,
        direction=direction,
        size=len(values),
        minimum=float(values.min()),
        maximum=float(values.max()),
        mean=float(values.mean()),
        amplified=counts.amplified,
        inhibited=counts.inhibited,
        negative=counts.negative,
        values=tuple(rows[np.arange(len(rows)), farthest].tolist()),
    )


def model_id(location: Location) -> ModelId:
    """The hub id, or the last part of the path."""
    return ModelId(location.name, location.revision)


def environment() -> dict[str, str]:
    """Versions of everything that may have computed, and the machine."""
    facts = {"ia3-export": metadata.version("ia3-export"), "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return facts


def digests(
    base: Checkpoint, adapters: Sequence[Adapter], merged: Checkpoint | None, graphs: Sequence[Path]
) -> dict[str, str]:
    """SHA-256 of the base's configuration, the adapters' files, the manifests and the ONNX files."""
    found: dict[str, str] = {}
    for name, path in _files(base, adapters, merged, graphs):
        if path.is_file():
            digest = f"sha256:{hash_file(path)}"
            if found.get(name, digest) != digest:  # files of one name in several folders
                name = f"{path.resolve().parent.name}/{name}"
            found[name] = digest
    return found


def _files(
    base: Checkpoint, adapters: Sequence[Adapter], merged: Checkpoint | None, graphs: Sequence[Path]
) -> Iterator[tuple[str, Path]]:
    yield "base/config.json", base.folder / "config.json"
    for adapter in adapters:
        for name in adapter.files:
            yield f"{adapter.name}/{name}", adapter.folder / name
    if merged is not None:
        yield f"merged/{MANIFEST}", merged.folder / MANIFEST
        yield "merged/config.json", merged.folder / "config.json"
    for path in graphs:
        yield f"onnx/{path.name}", path
        yield f"onnx/{MANIFEST}", path.parent.parent / MANIFEST
