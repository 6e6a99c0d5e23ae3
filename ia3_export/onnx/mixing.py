"""Which weights of a graph have 4 bits and which 8: measured on inputs, one weight after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.blocks import Codes, decode, encode
from ia3_export.onnx.calibration import Feeds, Moments, open_beside
from ia3_export.onnx.quantize import find_weights
from ia3_export.onnx.rounding import encode_nearest

#: Tokens whose outputs are compared when a single weight is replaced.
_ENOUGH = 96
#: From the codes of weights, by name, to what a graph with them loses on all inputs.
Judge = Callable[[Mapping[str, Codes]], float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A weight that may have 4 bits instead of 8.

    Attributes:
        name: the initializer.
        wide, narrow: its codes of 8 and of 4 bits (outputs x inputs).
        saved: bytes that 4 bits save.
        loss: what is lost if it alone has 4 bits, and all other weights are float32.
    """

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
    """Codes of every weight of a graph, the names of those of 4 bits, and what was measured on the way: bytes
    of all codes and loss of every mix that was tried, the chosen one last."""

    codes: Mapping[str, Codes]
    narrow: tuple[str, ...]
    tried: tuple[tuple[int, float], ...]

    @property
    def loss(self) -> float:
        """Of the chosen mix."""
        return self.tried[-1][1]


def size_of_codes(codes: Codes) -> int:
    """Bytes in a file."""
    return sum(part.nbytes for part in (codes.packed, codes.scales, codes.zeros) if part is not None)


def loss_of(name: str, found: Sequence[Array], reference: Sequence[Array]) -> float:
    """What the outputs `name` of some inputs lose: the mean KL divergence, in nats, of ``logits`` of more than one
    class; of anything else the squared distance as a share of the squared length. Infinite where a number is
    none."""
    wide = [x.shape[-1] for x in reference]
    a, b = (
        np.concatenate([x.reshape(-1, n) for x, n in zip(xs, wide, strict=True)]) for xs in (found, reference)
    )
    a, b = a.astype(np.float64), b.astype(np.float64)
    if name == "logits" and wide[0] > 1:
        p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) for x in (b, a))
        p, q = p - b.max(-1, keepdims=True), q - a.max(-1, keepdims=True)
        loss = float(np.maximum((np.exp(p) * (p - q)).sum(-1), 0).mean())
    else:
        loss = float(((a - b) ** 2).sum() / max((b**2).sum(), 1e-30))
    return loss if np.isfinite(loss) else np.inf


@dataclass(frozen=True, slots=True, eq=False)
class Replaceable:
    """A float32 graph whose initializers may be replaced from run to run, and its output on some inputs."""

    session: Any
    held: frozenset[str]
    feeds: Sequence[Feeds]
    output: str
    reference: Sequence[Array]

    def loss(self, weights: Mapping[str, Array]) -> float:
        """What is lost with `weights` in the place of the initializers of their names."""
        return loss_of(self.output, self._run(weights), self.reference)

    def _run(self, weights: Mapping[str, Array]) -> list[Array]:
        return [self.session.run([self.output], {**feed, **weights})[0] for feed in self.feeds]


def open_replaceable(path: Path, feeds: Sequence[Feeds]) -> Replaceable:
    """The float32 graph `path` on `feeds`."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    known = {value.name for value in model.graph.input}
    tensors = {t.name: t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        for name, tensor in tensors.items()
        if name not in known
    )
    session = open_beside(path, model)
    output = next(o.name for o in session.get_outputs() if not o.name.startswith("present"))
    plain = Replaceable(session, frozenset(tensors), feeds, output, ())
    return replace(plain, reference=plain._run({}))


def find_choices(path: Path, feeds: Sequence[Feeds], say: Callable[[str], None]) -> list[Choice]:
    """Every matrix of the float32 graph `path` with its codes, and what 4 bits cost it on `feeds`.

    A weight is rounded to 4 bits for the activations that it multiplies on all `feeds`. What that costs is
    measured by forwards of the first of them in which this weight alone is replaced. Weights that no
    initializer holds (experts cut from a larger one) are taken to cost, for a byte, what the others do on
    average.
    """
    import onnx_ir

    model = onnx_ir.load(path)
    weights = {w.value.name: w for w in find_weights(model) if w.rows.ndim == 2}
    factors = [w for w in weights.values() if w.factor is not None and _is_outermost(model, w.factor)]
    moments = Moments(path, feeds, {w.factor.name: w.rows.shape[1] for w in factors})
    graph = open_replaceable(path, _first(feeds))
    made = []
    for number, (name, weight) in enumerate(weights.items(), start=1):
        if number % 10 == 1:
            say(f"weights {number} to {min(number + 9, len(weights))} of {len(weights)} in 4 bits")
        rows = np.ascontiguousarray(weight.rows)
        wide = encode(rows, 8)
        narrow = encode_nearest(rows, None if weight.factor is None else moments.of(weight.factor.name))
        decoded = decode(narrow, rows.shape[1])
        loss = graph.loss({name: decoded.T if weight.turned else decoded}) if name in graph.held else np.nan
        made.append((name, wide, narrow, size_of_codes(wide) - size_of_codes(narrow), loss))
    known = [(saved, loss) for *_, saved, loss in made if not np.isnan(loss)]
    rate = sum(loss for _, loss in known) / max(1, sum(saved for saved, _ in known))
    return [
        Choice(name=n, wide=w, narrow=c, saved=s, loss=rate * s if np.isnan(loss) else loss)
        for n, w, c, s, loss in made
    ]


def choose(
    choices: Sequence[Choice], judge: Judge, *, limit: float | None = None, budget: int | None = None
) -> Mix:
    """The smallest mix of 4 and 8 bits that loses at most `limit` by `judge`, or the nearest of at most
    `budget` bytes of codes.

    Weights become narrow in the order of what they lose for a byte. How many may is searched by halving, with
    a measurement of each whole mix: losses do not simply add up. Where even 8 bits lose more than `limit`,
    all have 8 bits; where even 4 bits are more than `budget`, all have 4.
    """
    order = sorted(choices, key=lambda choice: (choice.rate, choice.name))
    whole = sum(size_of_codes(choice.wide) for choice in order)
    sizes = [whole, *(whole - saved for saved in accumulate(choice.saved for choice in order))]
    tried: dict[int, float] = {}

    def fits(count: int) -> bool:
        if count not in tried:
            tried[count] = judge(_codes_of(order, count))
        return limit is not None and tried[count] <= limit

    if budget is not None:
        count = next((i for i, size in enumerate(sizes) if size <= budget), len(order))
        fits(count)
    else:
        low, high = 0, len(order)
        count = high if fits(high) else low
        while count == low and high - low > 1:
            middle = (low + high) // 2
            if fits(middle):
                count = low = middle
            else:
                high = middle
        fits(count)
    points = [(sizes[i], tried[i]) for i in (*(i for i in tried if i != count), count)]
    return Mix(_codes_of(order, count), tuple(choice.name for choice in order[:count]), tuple(points))


def _codes_of(order: Sequence[Choice], count: int) -> dict[str, Codes]:
    return {choice.name: choice.narrow if i < count else choice.wide for i, choice in enumerate(order)}


def _first(feeds: Sequence[Feeds]) -> Sequence[Feeds]:
    """As many of `feeds` as have `_ENOUGH` tokens (or other places) together."""
    sizes = accumulate(max(np.asarray(v).size for n, v in feed.items() if "past" not in n) for feed in feeds)
    return feeds[: 1 + next((i for i, size in enumerate(sizes) if size >= _ENOUGH), len(feeds) - 1)]


def _is_outermost(model: Any, value: Any) -> bool:
    """Whether a value is one of the outermost graph, so that it can be given out."""
    maker = value.producer()
    return value.is_graph_input() if maker is None else maker.graph is model.graph
