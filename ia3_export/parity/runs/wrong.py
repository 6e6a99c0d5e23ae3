"""The live model made wrong on purpose: what an artifact would give whose vectors were folded otherwise."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from ia3_export.errors import Unsupported
from ia3_export.fold import Array
from ia3_export.parity.runs.inputs import Case
from ia3_export.parity.runs.live import LiveModel
from ia3_export.parity.runs.metrics import Outputs
from ia3_export.parity.runs.run_torch import Wanted, run_torch

HALF = "half strength"
#: Layers that are left out, one after the other, at most; evenly chosen of more.
_MOST = 32
#: With no more layers than these, recording their outputs saves nothing.
_FEW_LAYERS = 3
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


class _Prefixes:
    """Forwards on one case that differ from one layer on only: what the layers before it give is recorded,
    and given again.

    Whether that changes nothing is tried with the last layer. Where it does (layers that share keys and
    values), and where a layer is called more than once, every forward is whole.
    """

    def __init__(self, live: LiveModel, case: Case, layers: Sequence[str], wanted: Wanted) -> None:
        self._model, self._case, self._wanted = live.model, case, wanted
        self._modules = {layer: live.inner.get_submodule(layer) for layer in layers}
        self._given: dict[str, Any] = {}
        if len(layers) > _FEW_LAYERS and not case.past:
            whole = self._record()
            if self._given and not self._gives(whole, list(self._given)[-1]):
                self._given = {}

    def outputs(self, layer: str = "") -> dict[str, Array]:
        """Those of the model as it is now, whose vectors differ in `layer` (empty: in any)."""
        with ExitStack() as stack:
            for before in takewhile(lambda name: name != layer, self._given if layer in self._given else ()):
                stack.enter_context(_replaced(self._modules[before], self._given[before]))
            return run_torch(self._model, [self._case], self._wanted).outputs[0]

    def _record(self) -> dict[str, Array]:
        calls: list[str] = []
        with ExitStack() as stack:
            for name, module in self._modules.items():
                stack.callback(module.register_forward_hook(partial(self._keep, name, calls)).remove)
            whole = self.outputs()
        if sorted(calls) != sorted(self._modules):
            self._given.clear()
        return whole

    def _keep(self, name: str, calls: list[str], _module: Any, _inputs: Any, output: Any) -> None:
        calls.append(name)
        self._given[name] = output

    def _gives(self, whole: Mapping[str, Array], layer: str) -> bool:
        try:
            again = self.outputs(layer)
        except Unsupported:
            return False
        return all(np.array_equal(again[name], values) for name, values in whole.items())


@contextmanager
def _replaced(module: Any, output: Any) -> Iterator[None]:
    """In this context `module` gives `output`."""
    own = vars(module).get("forward")  # of a module that another library has wrapped
    module.forward = lambda *_inputs, **_named: copy.deepcopy(output)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


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
    found = {}
    used = [cases[i] for i in probe]
    exact, base = (thinned([outputs[i] for i in probe]) for outputs in (reference, plain))
    runs = [_Prefixes(live, case, layers, wanted) for case in used]
    changes: dict[str, tuple[str, Callable[[str, Any], Any]]] = {HALF: ("", _halved)}
    if len(layers) > 1:
        changes |= {f"{layer} left out": (layer, partial(_left_out, layer=layer)) for layer in chosen}
    for name, (layer, change) in changes.items():
        with live.with_vectors(change):
            wrong = thinned([run.outputs(layer) for run in runs])
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
