"""Could the forwards have told this artifact from a wrong one?

A wrong artifact is off in a direction that is known: towards the base, towards half of the effect, towards a
model without one layer's vectors. Along it rounding and quantization are off by next to nothing, since their
errors point anywhere. So the component along it finds what the size of an error cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ia3_export.fold import Array
from ia3_export.parity.gates import TOLD, at_most
from ia3_export.parity.runs.forwards import UnmergedRuns
from ia3_export.parity.runs.metrics import Outputs
from ia3_export.parity.runs.wrong import FEW, HALF, thinned
from ia3_export.report.model import Discrimination, Gate, Step

BASE = "the base"
#: Most that an artifact may be like a wrong one, where noise explains no more.
_FLOOR = 0.1
#: Standard deviations of the component that noise explains. They are estimated as if rows were independent;
#: errors of weights are the same in all rows, and were seen to make it 4.4.
_SPREAD = 8.0


@dataclass(frozen=True, slots=True)
class Likeness:
    """How much of the way to a wrong artifact's outputs an artifact is off (1: it is that), and the most that
    its own noise explains."""

    name: str
    value: float
    limit: float


def likeness(name: str, outputs: Outputs, reference: Outputs, wrong: Outputs) -> Likeness | None:
    """The component of ``outputs - reference`` along ``wrong - reference``, by length.

    The limit is `_SPREAD` of its standard deviations, estimated over rows. None where `wrong` is no other
    than the reference, or for too few rows. All are `thinned`.
    """
    products, squares = _by_row(outputs, reference, wrong)
    total = float(squares.sum())
    if len(squares) < FEW or not total or not np.isfinite(total):
        return None
    value = float(products.sum()) / total
    spread = float(np.sqrt(((products - value * squares) ** 2).sum())) / total
    return Likeness(name, abs(value), max(_FLOOR, _SPREAD * spread))


def _by_row(outputs: Outputs, reference: Outputs, wrong: Outputs) -> tuple[Array, Array]:
    """For each row its product with the wrong direction, and the square of that; rows that it leaves alone
    are not counted."""
    products, squares = [np.zeros(0)], [np.zeros(0)]
    for got, exact, other in _arrays(outputs, reference, wrong):
        error, direction = got - exact, other - exact
        products.append((error * direction).sum(-1).reshape(-1))
        squares.append((direction * direction).sum(-1).reshape(-1))
    product, square = np.concatenate(products), np.concatenate(squares)
    return product[square > 0], square[square > 0]


def _arrays(*outputs: Outputs) -> Iterator[tuple[Array, ...]]:
    for case in zip(*outputs, strict=True):
        for name in case[0]:
            if all(name in output for output in case):
                yield tuple(np.asarray(output[name], "<f8") for output in case)


def likenesses(outputs: Outputs, cases: Sequence[int], unmerged: UnmergedRuns) -> list[Likeness]:
    """`likeness` of an artifact's `outputs` on the inputs `cases` to the base, and to every model that was
    made wrong on one of them."""
    positions = {case: i for i, case in enumerate(cases)}
    mine = thinned(outputs)
    exact, plain = (thinned([run.outputs[i] for i in cases]) for run in (unmerged.reference, unmerged.plain))
    found = [likeness(BASE, mine, exact, plain)]
    if all(case in positions for case in unmerged.wrong.cases):
        probe = [positions[case] for case in unmerged.wrong.cases]
        mine, exact = ([run[i] for i in probe] for run in (mine, exact))
        found += [likeness(name, mine, exact, wrong) for name, wrong in unmerged.wrong.outputs.items()]
    return [each for each in found if each is not None]


def likeness_gates(found: Sequence[Likeness]) -> Iterator[Gate]:
    """A gate for the base, one for half strength, and one for the layer that the artifact is likest to be
    without."""
    layers = [each for each in found if each.name not in (BASE, HALF)]
    worst = max(layers, key=lambda each: each.value / each.limit, default=None)
    for each in (*(e for e in found if e.name in (BASE, HALF)), *([worst] if worst is not None else [])):
        yield at_most(f"likeness to {each.name}", each.value, each.limit)


def discrimination(found: Sequence[Likeness], sizes: Mapping[str, float]) -> Discrimination:
    """How far beyond the gates wrong artifacts would have been: by their likeness to themselves, which is 1,
    or by the size of their error, as so many times its limit in `sizes`."""
    factors = dict(sizes)
    for each in found:
        factors[each.name] = max(factors.get(each.name, 0.0), 1 / each.limit)
    layers = {name: factor for name, factor in factors.items() if name not in (BASE, HALF)}
    nearest = min(layers, key=lambda name: layers[name], default="")
    return Discrimination(factors.get(BASE), factors.get(HALF), layers.get(nearest), nearest)


def untold(step: Step) -> Iterator[tuple[str, float]]:
    """What a wrong artifact of `step` could be that its gates would hardly tell, and the factor."""
    told = step.discrimination
    if told is not None:
        for name, factor in ((BASE, told.base), (HALF, told.half), (told.nearest_name, told.nearest)):
            if factor is not None and factor < TOLD:
                yield name, factor
