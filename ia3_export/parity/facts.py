"""What a report says besides the verdict: vectors, versions, digests, and how the artifact was merged."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ia3_export.adapters.combine import Combine
from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.hub import Location
from ia3_export.errors import Refused
from ia3_export.planning.changes import Cast, Dtype
from ia3_export.planning.companions import TokenizerChoice
from ia3_export.planning.plan import Plan, Quantized
from ia3_export.quantization.detection import find_quantization
from ia3_export.report.model import ModelId, SiteSummary
from ia3_export.vectors.channels import count_channels
from ia3_export.writing.execute import hash_file
from ia3_export.writing.manifest import NAME

_LIBRARIES = ("torch", "transformers", "peft", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu")
_SHOWN = 128
_NAMES: Mapping[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How adapters were folded, as `merge` takes it."""

    combine: Combine = "product"
    weights: tuple[float, ...] = ()
    cast: Cast = "peft"
    dtype: Dtype = "auto"
    quantized: Quantized = "dequantize"
    allow_missing: bool = False
    allow_unused: bool = False
    tokenizer: TokenizerChoice = "auto"


def recorded_options(base: Checkpoint, merged: Checkpoint | None) -> MergeOptions:
    """The options in the manifest of `merged`; without one, the defaults and the dtype that the weights have."""
    if merged is None:
        return MergeOptions()
    try:
        options = json.loads((merged.folder / NAME).read_text(encoding="utf-8"))["options"]
        made = MergeOptions(
            options["combine"], tuple(float(w) for w in options["weights"]), options["cast"], options["dtype"],
            options.get("quantized", "dequantize"), bool(options.get("allow_missing")), bool(options.get("allow_unused")),
            options.get("tokenizer", "auto"),
        )  # fmt: skip
        known = made.combine in get_args(Combine) and made.cast in get_args(Cast)
        if (
            known
            and made.dtype in get_args(Dtype)
            and made.quantized in get_args(Quantized)
            and made.tokenizer in get_args(TokenizerChoice)
        ):
            return made
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    quantized = find_quantization(base)
    if quantized.packed:
        kept = bool(find_quantization(merged).packed)
        return MergeOptions(quantized="keep-or-dense" if kept else "dequantize")
    if merged.main_dtype != base.main_dtype and merged.main_dtype in _NAMES:
        return MergeOptions(dtype=_NAMES[merged.main_dtype])
    return MergeOptions()


def merge_options(
    base: Checkpoint,
    merged: Checkpoint | None,
    adapters: int,
    combine: Combine | None,
    weights: Sequence[float],
    source: str,
) -> tuple[MergeOptions, list[str]]:
    """How `merged` was made: `recorded_options`, with `combine` and `weights` in their place where the user says them; and what
    was taken from the record (which people know as `source`), in words. Raises `Refused` as `check_recorded`."""
    how = recorded_options(base, merged)
    if combine is not None:
        return replace(how, combine=combine, weights=tuple(weights)), []
    if how == MergeOptions():
        return how, []
    check_recorded(how, adapters)
    return how, [f"taken from {source}: {describe_options(how)}"]


def check_recorded(options: MergeOptions, adapters: int) -> None:
    """Raise `Refused` for recorded options by which an artifact could excuse itself: an adapter that counts for nothing."""
    odd = options.combine != "product" and (adapters == 1 or 0.0 in options.weights)
    if odd or len(options.weights) not in (0, adapters):
        raise Refused(
            f"the manifest of the merged folder says {describe_options(options)}, for {adapters} adapters",
            hint="if that is what you merged, say so with --combine and --weights",
        )


def describe_options(options: MergeOptions) -> str:
    """The options that are not the defaults, in words."""
    default = MergeOptions()
    shown = {f.name: getattr(options, f.name) for f in fields(options)}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value != getattr(default, name))


def sites_of(plan: Plan | None, adapters: Sequence[Adapter]) -> dict[str, list[str]]:
    """Modules with a vector, and the stored tensors that it is folded into (none known without a plan)."""
    sites: dict[str, list[str]] = {module: [] for adapter in adapters for module in adapter.modules}
    for name, change in plan.changes.items() if plan is not None else ():
        for fold in change.folds:  # "adapter: module (output)"
            module = fold.partition(": ")[2].rpartition(" (")[0]
            if module in sites:
                sites[module].append(name)
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
        yield f"merged/{NAME}", merged.folder / NAME
        yield "merged/config.json", merged.folder / "config.json"
    for path in graphs:
        yield f"onnx/{path.name}", path
        yield f"onnx/{NAME}", path.parent.parent / NAME
