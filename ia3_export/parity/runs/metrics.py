"""How far two sets of outputs are apart, computed in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ia3_export.fold import Array
from ia3_export.report.model import Distance

#: Distance from 1 to the next number.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_SMALLEST_EXPONENT = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}
#: Relative errors and units in the last place are taken of elements that are at least this share
#: of the largest.
_RELEVANT = 1e-3

#: What one model gives: by input, output name → array.
Outputs = Sequence[Mapping[str, Array]]


@dataclass(slots=True)
class _Running:
    """Largest and mean of what is added, an array at a time."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, values: Array) -> None:
        self.largest = max(self.largest, float(values.max(initial=0.0)))
        with np.errstate(over="ignore"):
            self.total += float(values.sum())
        self.count += values.size

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)


def distance_between(outputs: Outputs, reference: Outputs, dtype: str) -> Distance:
    """`Distance` of `outputs` from `reference`; `dtype` is the precision whose last place is counted.

    Output names that `reference` has not are ignored; NaN counts as infinitely far. Raises `ValueError` when
    shapes differ and `KeyError` when an output is missing.
    """
    scale = largest_magnitude(reference)
    worst = total = squares = dot = norm_a = norm_b = 0.0
    count = 0
    relative, places = _Running(), _Running()
    for a, b in _pairs(outputs, reference):
        error = _error(a, b)
        worst, total, count = (
            max(worst, float(error.max(initial=0.0))),
            total + float(error.sum()),
            count + error.size,
        )
        squares += float(np.vdot(error, error))
        dot += float(np.vdot(a, b))
        norm_a, norm_b = norm_a + float(np.vdot(a, a)), norm_b + float(np.vdot(b, b))
        relevant = np.abs(b) >= max(_RELEVANT * scale, np.finfo("<f8").tiny)
        apart, magnitude = error[relevant], np.abs(b[relevant])
        with np.errstate(over="ignore"):
            relative.add(apart / magnitude)
            places.add(apart / last_place(magnitude, dtype))
    with np.errstate(invalid="ignore"):
        cosine = dot / (norm_a**0.5 * norm_b**0.5) if norm_a and norm_b else float(norm_a == norm_b)
    kl, max_kl, top1, top5 = _of_logits(
        (np.asarray(got["logits"], "<f8"), np.asarray(must["logits"], "<f8"))
        for got, must in zip(outputs, reference, strict=True)
        if "logits" in must and must["logits"].shape[-1] > 1
    )
    return Distance(
        max_error=worst,
        mean_error=total / max(1, count),
        rms_error=(squares / max(1, count)) ** 0.5,
        max_relative=relative.largest,
        mean_relative=relative.mean,
        max_ulp=places.largest,
        mean_ulp=places.mean,
        cosine=cosine,
        kl=kl,
        max_kl=max_kl,
        top1=top1,
        top5=top5,
    )


def last_place(values: Array, dtype: str) -> Array:
    """The unit in the last place of `dtype` at `values` (of its smallest normal number below that)."""
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(values)))
    return EPSILON[dtype] * 2.0 ** np.maximum(exponent, _SMALLEST_EXPONENT[dtype])


def largest_magnitude(outputs: Outputs) -> float:
    """Largest absolute value in `outputs`, infinite when one is NaN."""
    values = [float(np.abs(v).max(initial=0.0)) for output in outputs for v in output.values()]
    return max((np.inf if np.isnan(v) else v for v in values), default=0.0)


def root_mean_square(outputs: Outputs) -> tuple[float, int]:
    """That of all values in `outputs`, and how many there are."""
    arrays = [np.asarray(values, "<f8") for output in outputs for values in output.values()]
    count = sum(array.size for array in arrays)
    with np.errstate(over="ignore"):
        return (sum(float((array * array).sum()) for array in arrays) / max(1, count)) ** 0.5, count


def beyond(outputs: Outputs, reference: Outputs, rtol: float) -> float:
    """The largest ``|a - b| - rtol |b|``: what ``atol`` must cover (``numpy.allclose``)."""
    return max(
        (float((_error(a, b) - rtol * np.abs(b)).max(initial=0.0)) for a, b in _pairs(outputs, reference)),
        default=0.0,
    )


def effect_present(outputs: Outputs, reference: Outputs, plain: Outputs) -> float | None:
    """Share of the adapters' effect that `outputs` show: the component of ``outputs - plain`` along
    ``reference - plain``, by length. None when the adapters change nothing."""
    along = length = 0.0
    for (a, b), (_, base) in zip(_pairs(outputs, reference), _pairs(outputs, plain), strict=True):
        along += float(((a - base) * (b - base)).sum())
        length += float(((b - base) ** 2).sum())
    return along / length if length else None


def error_histogram(outputs: Outputs, reference: Outputs) -> tuple[tuple[int, int], ...]:
    """Elements by the power of ten of their error relative to the largest reference value.

    Exact ones under -99.
    """
    scale = largest_magnitude(reference) or 1.0
    counts: Counter[int] = Counter()
    for a, b in _pairs(outputs, reference):
        error = _error(a, b) / scale
        with np.errstate(divide="ignore"):
            powers = np.where(error > 0, np.clip(np.floor(np.log10(error)), -20, 9), -99).astype(int)
        counts.update(dict(zip(*(x.tolist() for x in np.unique(powers, return_counts=True)), strict=True)))
    return tuple(sorted(counts.items()))


def perplexity(outputs: Outputs, token_ids: Sequence[Array], masks: Sequence[Array | None]) -> float | None:
    """Perplexity of next tokens: exp of the mean negative log-likelihood of each attended token after the
    first.

    `token_ids` (batch, length) belong to ``logits`` (batch, length, vocabulary); inputs whose logits have
    another length are left out.
    """
    total, count = 0.0, 0
    for output, ids, mask in zip(outputs, token_ids, masks, strict=True):
        logits = output.get("logits")
        if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            continue
        likelihood = _log_softmax(np.asarray(logits, "<f8"))[:, :-1]
        chosen = np.take_along_axis(likelihood, ids[:, 1:, None], axis=-1)[..., 0]
        counted = np.ones(chosen.shape, bool) if mask is None else (mask[:, 1:] * mask[:, :-1]).astype(bool)
        total, count = total - float(chosen[counted].sum()), count + int(counted.sum())
    return float(np.exp(total / count)) if count else None


def _pairs(outputs: Outputs, reference: Outputs) -> Iterator[tuple[Array, Array]]:
    for got, expected in zip(outputs, reference, strict=True):
        for name, b in expected.items():
            a = got[name]
            if a.shape != b.shape:
                raise ValueError(f"output {name} has shape {list(a.shape)}, the reference {list(b.shape)}")
            yield np.asarray(a, "<f8"), np.asarray(b, "<f8")


def _error(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore"):
        error: Array = np.nan_to_num(np.abs(a - b), nan=np.inf)
    return error


def _of_logits(
    pairs: Iterable[tuple[Array, Array]],
) -> tuple[float | None, float | None, float | None, float | None]:
    """KL divergence of the reference from the outputs (mean, largest), top-1 and top-5 agreement, over rows.

    Rows that are zero on both sides are padding. Top-5 is the share of the reference's five likeliest classes
    that are among the five likeliest of the outputs.
    """
    divergences, first, five = [], [], []
    for a, b in pairs:
        a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
        real = (a != 0).any(axis=-1) | (b != 0).any(axis=-1)
        a, b = a[real], b[real]
        p, q = _log_softmax(b), _log_softmax(a)
        with np.errstate(invalid="ignore"):
            divergence = (np.exp(p) * (p - q)).sum(-1)
        divergences.append(np.maximum(np.nan_to_num(divergence, nan=np.inf), 0.0))
        first.append(a.argmax(-1) == b.argmax(-1))
        if a.shape[-1] > 5:
            tops = [np.argpartition(-x, 5, axis=-1)[:, :5] for x in (a, b)]
            five.append((tops[0][:, :, None] == tops[1][:, None, :]).any(1).mean(-1))
    if not divergences or not sum(map(len, divergences)):
        return None, None, None, None
    kl = np.concatenate(divergences)
    return (
        float(min(kl.mean(), kl.max())),  # the mean of equal numbers can be rounded above them
        float(kl.max()),
        float(np.concatenate(first).mean()),
        float(np.concatenate(five).mean()) if five else None,
    )


def _log_softmax(logits: Array) -> Array:
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
