"""Which errors rounding explains, and which precisions may lose how much. Derived in docs/parity.md."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ia3_export.parity.runs.metrics import EPSILON
from ia3_export.report.model import Distance, Gate
from ia3_export.words import CODED_PRECISIONS

#: ``err(artifact) <= FACTOR * adapters * err(unmerged) + MARGIN * eps(dtype) * max|reference|``. Folding
#: rounds every changed weight once per adapter, the live adapter every activation once: errors of the same
#: size, and the factor bounds how far the maxima of two such samples lie apart. The margin covers outputs on
#: which the live model happens to round to nothing.
FACTOR = 6.0
MARGIN = 2.0
#: The root mean squares of two such samples of thousands of errors lie nearer to one another.
RMS_FACTOR = 3.0
_MANY = 1000
#: Another runtime orders sums differently and approximates exp, erf and tanh to some units in the last place
#: where PyTorch stays within one or two; so its errors may be this many times as large.
RUNTIME = 4.0
#: Inner layers are compared one by one, and the first to leave its bound is named: twice as wide, since many
#: are looked at.
LAYER = 2.0

#: Largest mean KL divergence (nats), least top-1 agreement, largest relative change of perplexity, least
#: cosine where there are no logits. They bound what the *precision* may cost, not what rounding explains.
QUANTIZED = {
    "int8": {"kl": 0.02, "top1": 0.95, "perplexity": 0.02, "cosine": 0.98},
    "int4": {"kl": 0.10, "top1": 0.85, "perplexity": 0.10, "cosine": 0.95},
}
#: Share of the adapters' effect that a quantized artifact must show, at least and at most.
EFFECT = (0.75, 1.25)
#: A wrong artifact must be so many times beyond the gates; below, the report warns.
TOLD = 10.0


def computes_in(precision: str) -> str:
    """The dtype of the products of an artifact of `precision`: float32 where its weights are codes."""
    return "float32" if precision in CODED_PRECISIONS else precision


def coarser(*dtypes: str) -> str:
    """The dtype of the largest epsilon."""
    return max(dtypes, key=lambda dtype: EPSILON[dtype])


def rounding_bound(
    unmerged: float, scale: float, dtype: str, adapters: int, *, runtime: bool = False, layer: bool = False
) -> float:
    """The error that rounding in `dtype` explains, for so many `adapters` (each rounds once).

    `unmerged` is the unmerged model's own error, `scale` the largest reference value. `runtime`:
    not run by PyTorch.
    """
    wider = (RUNTIME if runtime else 1.0) * (LAYER if layer else 1.0)
    return wider * (FACTOR * max(1, adapters) * unmerged + MARGIN * EPSILON[dtype] * scale)


def rms_bound(
    unmerged: float, scale: float, count: int, dtype: str, adapters: int, *, runtime: bool
) -> float:
    """`rounding_bound` of the root mean square of `count` errors, from the root mean squares `unmerged` and
    `scale`."""
    factor = RMS_FACTOR if count >= _MANY else FACTOR
    wider = RUNTIME if runtime else 1.0
    return wider * (factor * max(1, adapters) * unmerged + MARGIN * EPSILON[dtype] * scale)


def at_most(name: str, value: float, limit: float) -> Gate:
    """The gate ``value <= limit``; NaN fails, and a limit that is infinite is none."""
    return Gate(name, value, "<=", limit, value <= limit and math.isfinite(limit))


def at_least(name: str, value: float, limit: float) -> Gate:
    """The gate ``value >= limit``; NaN fails."""
    return Gate(name, value, ">=", limit, value >= limit)


def quantized_gates(precision: str, distance: Distance, effect: float | None) -> Iterable[Gate]:
    """The gates of an int8 or int4 artifact; `effect` is the share of the adapters' effect that it shows."""
    limits = QUANTIZED[precision]
    if distance.kl is not None and distance.top1 is not None:
        yield at_most("KL divergence", distance.kl, limits["kl"])
        yield at_least("top-1 agreement", distance.top1, limits["top1"])
    else:
        yield at_least("cosine", distance.cosine, limits["cosine"])
    if distance.perplexity_change is not None:
        yield at_most("perplexity change", abs(distance.perplexity_change), limits["perplexity"])
    if effect is not None:
        yield at_least("effect present, least", effect, EFFECT[0])
        yield at_most("effect present, most", effect, EFFECT[1])
