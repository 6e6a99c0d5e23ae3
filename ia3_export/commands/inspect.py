"""``inspect``: what an adapter is, and what a merge would do. Reads headers and the vectors, nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter, Site
from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.fold import FLOAT_DTYPES
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.planning.recipe import Recipe
from ia3_export.quantization.base import read_base
from ia3_export.vectors.channels import count_channels, strongest_channels
from ia3_export.words import Quantized
from ia3_export.writing.manifest import describe_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatistics:
    """One vector. ``from_ones`` is the root mean square of ``l - 1``: 0 for a vector that changes nothing.

    Channels are counted as in `Counts`; ``most_inhibited`` and ``most_amplified`` are their indices,
    strongest first.
    """

    module: str
    direction: str
    length: int
    dtype: str
    min: float
    max: float
    mean: float
    from_ones: float
    not_finite: int
    inhibited: int
    amplified: int
    negative: int
    most_inhibited: tuple[int, ...]
    most_amplified: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """What `inspect` returns.

    The adapter, statistics of every vector, and with a base the plan of a merge.
    """

    adapter: Adapter
    sites: tuple[SiteStatistics, ...]
    plan: Plan | None

    def to_json(self) -> dict[str, Any]:
        """The JSON document of ``inspect --json``."""
        adapter = self.adapter
        content: dict[str, Any] = {
            "schema": "ia3-export/inspect/1",
            "name": adapter.name,
            "format": adapter.format,
            "task_type": adapter.task_type,
            "base_model": adapter.config.get("base_model_name_or_path"),
            "parameters": adapter.parameters,
            "warnings": list(adapter.warnings),
            "bytes": sum((adapter.folder / name).stat().st_size for name in adapter.files),
            "sites": [asdict(site) for site in self.sites],
            "extra_tensors": [
                {"name": name, "dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.nbytes}
                for name, tensor in adapter.extras.items()
            ],
        }
        if self.plan is not None:
            content["plan"] = describe_plan(self.plan) | summarize(self.plan)
        return content


def inspect(
    adapter: str | Path | Adapter, base: str | Path | None = None, *, quantized: Quantized = "keep-or-dense"
) -> Inspection:
    """Describe an IA3 adapter, and with `base` plan its merge without writing anything.

    `quantized` is that of `merge`; by default the plan says which vectors the scales of a quantized base can
    take. Neither torch nor transformers is imported while names and shapes settle everything (``.bin`` files
    need torch). Refusals of the plan are part of the result. Raises `IA3ExportError` for inputs that cannot
    be read.
    """
    check_arguments(inspect, locals())
    read = read_adapter(adapter)
    plan = make_plan(read_base(base), [read], Recipe(quantized=quantized)) if base is not None else None
    return Inspection(read, tuple(describe_vector(site) for site in read.sites.values()), plan)


def summarize(plan: Plan) -> dict[str, Any]:
    """The plan's totals: parameters, tensors, bytes and shards, touched and in all."""
    base = plan.base.stored
    return {
        "base_parameters": _parameters(plan.base.dense),
        "adapter_parameters": sum(adapter.parameters for adapter in plan.adapters),
        "tensors_changed": len(plan.changes),
        "tensors": len(base.tensors),
        "bytes_changed": sum(change.nbytes for change in plan.changes.values()),
        "bytes": base.nbytes,
        "shards_touched": list(plan.touched_shards),
        "shards": len(base.shards),
    }


def _parameters(base: Checkpoint) -> int:
    return sum(tensor.size for tensor in base.tensors.values() if tensor.dtype in FLOAT_DTYPES)


def describe_vector(site: Site) -> SiteStatistics:
    """Statistics of one vector."""
    values = site.vector.astype("<f8")
    counts, (inhibited, amplified) = count_channels(values), strongest_channels(values)
    with np.errstate(invalid="ignore", over="ignore"):
        return SiteStatistics(
            module=site.module,
            direction=site.direction,
            length=len(values),
            dtype=site.dtype,
            min=float(values.min()),
            max=float(values.max()),
            mean=float(values.mean()),
            from_ones=float(np.sqrt(np.mean((values - 1.0) ** 2))),
            not_finite=counts.not_finite,
            inhibited=counts.inhibited,
            amplified=counts.amplified,
            negative=counts.negative,
            most_inhibited=tuple(inhibited),
            most_amplified=tuple(amplified),
        )
