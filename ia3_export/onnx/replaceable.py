"""A float32 graph with other weights in it from run to run, and what its output loses by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.calibration import Feeds, open_beside
from ia3_export.onnx.runtime import open_model

#: Differences of logits beyond which their exponentials are left to float64.
_FAR = 20.0


def loss_of(name: str, found: Sequence[Array], reference: Sequence[Array]) -> float:
    """What the outputs `name` of some inputs lose: the mean KL divergence, in nats, of ``logits`` of more
    than one class; of anything else the squared distance as a share of the squared length. Infinite where a
    number is none."""
    classes = reference[0].shape[-1] if name == "logits" else 1
    if classes > 1:
        losses = [_divergences(a, b) for a, b in zip(found, reference, strict=True)]
        loss = float(np.concatenate(losses).mean())
    else:
        # others, such as start_logits, may have another width for each input
        a, b = (np.concatenate([x.reshape(-1) for x in xs]).astype(np.float64) for xs in (found, reference))
        loss = float(((a - b) ** 2).sum() / max((b**2).sum(), 1e-30))
    return loss if np.isfinite(loss) else np.inf


def _divergences(found: Array, reference: Array) -> Array:
    """KL divergence of each distribution from its `reference`, all given by logits.

    By their difference d it is ``log(sum p exp(d)) - sum p d``: quick in float32, and exact for small ones.
    """
    logits = reference.reshape(-1, reference.shape[-1])
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    apart = found.reshape(logits.shape) - logits
    apart -= (shares * apart).sum(-1, keepdims=True)  # what all logits have in common says nothing
    far = ~(np.abs(apart).max(-1) < _FAR)
    apart[far] = 0
    losses = np.log1p((shares * np.expm1(apart)).sum(-1, dtype=np.float64))
    losses -= (shares * apart).sum(-1, dtype=np.float64)
    if far.any():
        a, b = (x.reshape(logits.shape)[far].astype(np.float64) for x in (found, reference))
        losses[far] = (np.exp(b - _log_sum(b)) * (b - a)).sum(-1) - (_log_sum(b) - _log_sum(a))[:, 0]
    return np.asarray(np.maximum(losses, 0))


def _log_sum(logits: Array) -> Array:
    most = logits.max(-1, keepdims=True)
    return np.asarray(most + np.log(np.exp(logits - most).sum(-1, keepdims=True)))


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Inputs of a graph, and what it gave for them: its first output beside the cache, by name."""

    feeds: Sequence[Feeds]
    output: str
    reference: Sequence[Array]

    def loss(self, session: Any, weights: Mapping[str, Array] = MappingProxyType({})) -> float:
        """What `session` loses, with `weights` for inputs of their names."""
        return loss_of(self.output, _run(session, self.output, self.feeds, weights), self.reference)

    def loss_of_file(self, path: Path) -> float:
        """What the graph `path` loses."""
        return self.loss(_open(path))


def take_sample(path: Path, feeds: Sequence[Feeds]) -> Sample:
    """What the graph `path` gives for `feeds`."""
    return _sample_of(_open(path), feeds)


def _open(path: Path) -> Any:
    return next(iter(open_model([path]).graphs.values())).session


def _sample_of(session: Any, feeds: Sequence[Feeds]) -> Sample:
    output = next(o.name for o in session.get_outputs() if not o.name.startswith("present"))
    return Sample(feeds, output, _run(session, output, feeds, {}))


def _run(session: Any, output: str, feeds: Sequence[Feeds], weights: Mapping[str, Array]) -> list[Array]:
    return [session.run([output], {**feed, **weights})[0] for feed in feeds]


@dataclass(frozen=True, slots=True, eq=False)
class Replaceable:
    """A float32 graph whose initializers, those `held`, may be replaced from run to run."""

    session: Any
    held: frozenset[str]
    sample: Sample

    def loss(self, weights: Mapping[str, Array]) -> float:
        """What is lost with `weights` in the place of the initializers of their names."""
        return self.sample.loss(self.session, weights)


def open_replaceable(path: Path, feeds: Sequence[Feeds]) -> Replaceable:
    """The float32 graph `path`, to be run on `feeds`."""
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
    return Replaceable(session, frozenset(tensors), _sample_of(session, feeds))
