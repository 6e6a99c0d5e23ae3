"""The live model made wrong on purpose: what an artifact would give whose vectors were folded otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.parity.runs.inputs import Case
from ia3_export.parity.runs.live import LiveModel
from ia3_export.parity.runs.metrics import Outputs
from ia3_export.parity.runs.run_torch import Wanted, run_torch

HALF = "half strength"
#: Layers that are left out, one after the other, at most; evenly chosen of more.
_MOST = 32
#: Rows of outputs from which the spread of a component along a direction can be estimated.
_ENOUGH = 40
#: Fewer rows say nothing of their spread.
FEW = 8
#: What changes the outputs by less than this share of the adapters' effect is no wrong artifact.
_LEAST = 1e-3
#: Elements of a row that are kept: a vocabulary has 50 times as many.
_COLUMNS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class WrongRuns:
    """Outputs of wrong models by what is wrong with them, each on the inputs `cases`, `thinned`."""

    cases: tuple[int, ...]
    outputs: Mapping[str, Sequence[Mapping[str, Array]]]


def run_wrong(
    live: LiveModel, cases: Sequence[Case], reference: Outputs, plain: Outputs, wanted: Wanted
) -> WrongRuns:
    """Run `live` with its vectors at half strength, and without those of each layer, on one of `cases`: the
    one with the fewest rows that are `_ENOUGH`, or with the most; on all where that has fewer than `FEW`.

    A layer is what has a number in the module path, as ``model.layers.3``. What is no further from the
    `reference` than a thousandth of the base's outputs (`plain`) is not wrong, and left out.
    """
    rows = {i: _rows(output) for i, output in enumerate(reference) if not cases[i].past}
    best = min(rows, key=lambda i: (rows[i] < _ENOUGH, rows[i] if rows[i] >= _ENOUGH else -rows[i]))
    probe = (best,) if rows[best] >= FEW else tuple(rows)
    layers = list(dict.fromkeys(layer_of(module) for module, _ in live.vectors))
    chosen = [layers[int(i)] for i in np.unique(np.linspace(0, len(layers) - 1, min(_MOST, len(layers))))]
    changes: dict[str, Callable[[str, Any], Any]] = {HALF: _halved}
    if len(layers) > 1:
        changes |= {f"{layer} left out": partial(_left_out, layer=layer) for layer in chosen}
    found = {}
    exact, base = (thinned([outputs[i] for i in probe]) for outputs in (reference, plain))
    for name, change in changes.items():
        with live.with_vectors(change):
            wrong = thinned(run_torch(live.model, [cases[i] for i in probe], wanted).outputs)
        if _apart(wrong, exact) > _LEAST * _apart(base, exact):
            found[name] = wrong
    return WrongRuns(probe, found)


def _apart(outputs: Outputs, others: Outputs) -> float:
    """The length of their difference."""
    squares = [
        float(((values - other[name]) ** 2).sum())
        for output, other in zip(outputs, others, strict=True)
        for name, values in output.items()
    ]
    return float(sum(squares) ** 0.5)


def layer_of(module: str) -> str:
    """The path up to its first number, the whole path where there is none."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module)
    return found.group(0) if found else module


def thinned(outputs: Outputs) -> list[dict[str, Array]]:
    """`outputs` with `_COLUMNS` elements of each row at most, evenly chosen, in float32.

    Logits are given their distance from the mean of those: what all have in common changes no probability.
    """
    return [{name: _thinned(name, values) for name, values in output.items()} for output in outputs]


def _thinned(name: str, values: Array) -> Array:
    width = values.shape[-1]
    kept = values
    if width > _COLUMNS:
        kept = values[..., np.linspace(0, width - 1, _COLUMNS).astype(int)]
    if name.endswith("logits") and width > 1:
        kept = kept - kept.mean(axis=-1, dtype="<f8", keepdims=True)
    return kept.astype("<f4")


def _rows(output: Mapping[str, Array]) -> int:
    return max(int(np.prod(values.shape[:-1])) for values in output.values())


def _halved(_module: str, vector: Any) -> Any:
    return 1 + (vector - 1) / 2


def _left_out(module: str, vector: Any, *, layer: str) -> Any:
    import torch

    return torch.ones_like(vector) if layer_of(module) == layer else vector
