"""How far two outputs are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ia3_export.fold import Array

#: ``err(artifact) <= FACTOR * adapters * err(unmerged) + MARGIN * eps(dtype) * max|reference|``. Folding rounds every
#: changed weight once per adapter, the live adapter every activation once: errors of the same size, which a
#: factor bounds. The margin covers outputs on which the live adapter happens to round to nothing.
FACTOR = 3.0
MARGIN = 2.0
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

Outputs = Sequence[Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Distance:
    """Difference of an artifact's outputs from the reference, over all inputs.

    ``top1`` is the share of rows whose largest logit is the same one, None where nothing has logits.
    """

    max_error: float
    mean_error: float
    cosine: float
    top1: float | None


def compare(outputs: Outputs, reference: Outputs) -> Distance:
    """`Distance` of `outputs` from `reference`, computed in float64. Names missing in `outputs` are an error."""
    worst, total, count = 0.0, 0.0, 0
    dot = norm_a = norm_b = 0.0
    agree, rows = 0, 0
    for got, expected in zip(outputs, reference, strict=True):
        for name, b in expected.items():
            a = got[name].astype("<f8")
            b = b.astype("<f8")
            if a.shape != b.shape:
                raise ValueError(f"output {name} has shape {a.shape}, the reference {b.shape}")
            with np.errstate(invalid="ignore"):
                error = np.nan_to_num(np.abs(a - b), nan=np.inf)
            worst = max(worst, float(error.max(initial=0.0)))
            total, count = total + float(error.sum()), count + error.size
            dot += float((a * b).sum())
            norm_a, norm_b = norm_a + float((a * a).sum()), norm_b + float((b * b).sum())
            if name == "logits":
                agree += int((a.argmax(-1) == b.argmax(-1)).sum())
                rows += int(np.prod(a.shape[:-1]))
    cosine = dot / (norm_a * norm_b) ** 0.5 if norm_a and norm_b else float(norm_a == norm_b)
    return Distance(worst, total / max(1, count), cosine, agree / rows if rows else None)


def largest(outputs: Outputs) -> float:
    """Largest absolute value in `outputs`, infinite when one is NaN."""
    values = [float(np.abs(v).max(initial=0.0)) for output in outputs for v in output.values()]
    return max((np.inf if np.isnan(v) else v for v in values), default=0.0)


def bound(unmerged: Distance, reference: Outputs, dtype: str, adapters: int) -> float:
    """The error that rounding explains in `dtype`, for so many `adapters` (each rounds once)."""
    return FACTOR * max(1, adapters) * unmerged.max_error + MARGIN * EPSILON[dtype] * largest(reference)
