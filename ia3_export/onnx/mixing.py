"""Which weights have 4 bits and which 8: measured on inputs, one weight after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.blocks import BLOCK, Codes, decode, encode
from ia3_export.onnx.calibration import Feeds, Moments
from ia3_export.onnx.replaceable import open_replaceable
from ia3_export.onnx.rounding import encode_nearest
from ia3_export.onnx.weights import Weight, find_weights

#: Tokens whose outputs are compared when a single weight is replaced.
_ENOUGH = 48
#: What a mix may lose by itself. Half of what `verify` lets pass: texts lose more than those it was chosen
#: on.
LIMIT = 0.05
#: Codes of a model's weights: by the name of the graph without ``.onnx``, then of the initializer.
GivenCodes = Mapping[str, Mapping[str, Codes]]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A float32 graph and inputs of it, as they come in use; the weights `left` get no codes."""

    path: Path
    feeds: Sequence[Feeds]
    left: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Aim:
    """What a mix of 4 and 8 bits is to meet: a `loss` (`loss_of`) with as few bytes as possible, or a `size`
    of the files in bytes with as little loss."""

    loss: float = LIMIT
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A weight that may have 4 bits instead of 8.

    Attributes:
        graph, name: the graph without ``.onnx``, and the initializer.
        wide, narrow: its codes of 8 and of 4 bits (outputs x inputs).
        saved: bytes that 4 bits save.
        loss: what is lost (`loss_of`) if it alone has 4 bits, and all other weights are float32.
    """

    graph: str
    name: str
    wide: Codes
    narrow: Codes
    saved: int
    loss: float

    @property
    def rate(self) -> float:
        """Loss for each byte saved."""
        return self.loss / self.saved


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """The weights of all graphs of a model in the order in which they become narrow, the `count` of those
    that did, and what was measured on the way: bytes of all codes and loss, by the number of narrow
    weights."""

    order: Sequence[Choice]
    count: int
    tried: Mapping[int, tuple[int, float]]

    @property
    def codes(self) -> GivenCodes:
        """Those that were chosen."""
        return codes_of(self.order, self.count)

    @property
    def loss(self) -> float:
        """On the inputs on which the bits were chosen."""
        return self.tried[self.count][1]

    def to_json(self) -> dict[str, Any]:
        """For ``onnx --json``: the loss, each mix that was measured, and each weight, the first to become
        narrow first."""
        tried = [{"narrow": n, "bytes": size, "loss": loss} for n, (size, loss) in sorted(self.tried.items())]
        weights = [
            {
                "graph": c.graph,
                "name": c.name,
                "bits": 4 if i < self.count else 8,
                "loss": c.loss,
                "saved": c.saved,
            }
            for i, c in enumerate(self.order)
        ]
        return {"loss": self.loss, "tried": tried, "weights": weights}


def find_choices(graph: Calibrated, say: Callable[[str], None]) -> list[Choice]:
    """Every matrix of a graph (of whole blocks) with its codes, and what 4 bits cost it; none without inputs.

    A weight is rounded to 4 bits for the activations that it multiplies on all inputs. What that costs is
    measured by forwards of the first of them in which this weight alone is replaced. Weights that no
    initializer holds (experts cut from a larger one) are taken to cost, for a byte, what the others do on
    average.
    """
    import onnx_ir

    if not graph.feeds:
        return []
    model = onnx_ir.load(graph.path)
    weights = {
        w.value.name: w
        for w in find_weights(model)
        if w.rows.ndim == 2 and w.rows.shape[1] % BLOCK == 0 and w.value.name not in graph.left
    }
    factors = [w for w in weights.values() if w.factor is not None and _is_outermost(model, w.factor)]
    moments = Moments(graph.path, graph.feeds, {w.factor.name: w.rows.shape[1] for w in factors if w.factor})
    whole = open_replaceable(graph.path, _first(graph.feeds))
    choices = []
    for number, (name, weight) in enumerate(weights.items(), start=1):
        if number % 20 == 1:
            say(f"weighing bits of {graph.path.stem}: {number} of {len(weights)} weights")
        wide, narrow = _both(weight, moments)
        decoded = decode(narrow, weight.rows.shape[1])
        loss = whole.loss({name: decoded.T if weight.turned else decoded}) if name in whole.held else np.nan
        saved = wide.nbytes - narrow.nbytes
        choices.append(
            Choice(graph=graph.path.stem, name=name, wide=wide, narrow=narrow, saved=saved, loss=loss)
        )
    known = [choice for choice in choices if not np.isnan(choice.loss)]
    rate = sum(choice.loss for choice in known) / max(1, sum(choice.saved for choice in known))
    return [replace(c, loss=rate * c.saved) if np.isnan(c.loss) else c for c in choices]


def _both(weight: Weight, moments: Moments) -> tuple[Codes, Codes]:
    rows = np.ascontiguousarray(weight.rows)
    known: Array | None = None if weight.factor is None else moments.of(weight.factor.name)
    return encode(rows, 8), encode_nearest(rows, known)


def choose(
    choices: Sequence[Choice],
    judge: Callable[[GivenCodes], float],
    *,
    limit: float | None = None,
    budget: int | None = None,
) -> Mix:
    """The smallest mix of 4 and 8 bits that loses at most `limit` by `judge`, or the largest of at most
    `budget` bytes of codes.

    Weights become narrow in the order of what they lose for a byte. How many may is searched by halving, with
    a measurement of each whole mix: losses do not simply add up. Where even 8 bits lose more than `limit`,
    all have 8 bits; where even 4 bits are more than `budget`, all have 4.
    """
    order = sorted(choices, key=lambda choice: (choice.rate, choice.graph, choice.name))
    whole = sum(choice.wide.nbytes for choice in order)
    sizes = [whole, *(whole - saved for saved in accumulate(choice.saved for choice in order))]
    tried: dict[int, tuple[int, float]] = {}

    def fits(count: int) -> bool:
        if count not in tried:
            tried[count] = (sizes[count], judge(codes_of(order, count)))
        return limit is not None and tried[count][1] <= limit

    if budget is not None:
        count = next((i for i, size in enumerate(sizes) if size <= budget), len(order))
    else:
        # `count` fits (or nothing does), `beyond` does not
        count, beyond = (len(order), len(order)) if fits(len(order)) else (0, len(order))
        while beyond - count > 1:
            middle = (count + beyond) // 2
            count, beyond = (middle, beyond) if fits(middle) else (count, middle)
    fits(count)
    return Mix(order, count, tried)


def codes_of(order: Sequence[Choice], count: int) -> GivenCodes:
    """The codes of all weights, of which the first `count` are narrow."""
    codes: dict[str, dict[str, Codes]] = {}
    for i, choice in enumerate(order):
        codes.setdefault(choice.graph, {})[choice.name] = choice.narrow if i < count else choice.wide
    return codes


def _first(feeds: Sequence[Feeds]) -> Sequence[Feeds]:
    """As many of `feeds` as have `_ENOUGH` tokens (or other places) together."""
    sizes = accumulate(max(np.asarray(v).size for n, v in feed.items() if "past" not in n) for feed in feeds)
    return feeds[: 1 + next((i for i, size in enumerate(sizes) if size >= _ENOUGH), len(feeds) - 1)]


def _is_outermost(model: Any, value: Any) -> bool:
    """Whether a value is one of the outermost graph, so that it can be given out."""
    maker = value.producer()
    return value.is_graph_input() if maker is None else maker.graph is model.graph
