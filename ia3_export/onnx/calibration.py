"""What flows through a float32 graph on given inputs: the second moments of what its weights multiply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.runtime import OnnxModel

#: Inputs of a graph by name.
Feeds = Mapping[str, Any]
#: Moments that are held at a time, in numbers (512 MB): all those of SmolLM2-135M.
_HELD = 128_000_000


@dataclass(slots=True)
class Moments:
    """Second moments of values of the float32 graph `path` on `feeds`, made when they are asked for.

    `sizes` gives the values that may be asked for, with the length of their last axis, in the order of the
    graph. They are made some at a time, and forgotten for the next; who asks in that order runs the graph
    a few times only.
    """

    path: Path
    feeds: Sequence[Feeds]
    sizes: Mapping[str, int]
    known: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> Array | None:
        """Mean of ``x xT`` (size, size) in float32 over all vectors x of the value `name`; None for a value
        that is not among `sizes`, or without inputs."""
        if name not in self.sizes or not self.feeds:
            return None
        if name not in self.known:
            self.known = _moments(self.path, self.feeds, list(self._next(name)))
        return self.known[name]

    def _next(self, name: str) -> Iterator[str]:
        held, names = 0, list(self.sizes)
        for other in names[names.index(name) :]:
            held += self.sizes[other] ** 2
            if held > _HELD and other != name:
                return
            yield other


def _moments(path: Path, feeds: Sequence[Feeds], names: Sequence[str]) -> dict[str, Array]:
    session = open_with_outputs(path, names)
    sums: dict[str, Array] = {}
    count: dict[str, int] = {}
    for feed in feeds:
        mask = feed.get("attention_mask")
        for name, value in zip(names, session.run(list(names), dict(feed)), strict=True):
            attended = mask is not None and value.shape[: mask.ndim] == mask.shape
            vectors = value[np.asarray(mask, bool)] if attended else value.reshape(-1, value.shape[-1])
            sums[name] = sums.get(name, 0) + vectors.T @ vectors
            count[name] = count.get(name, 0) + len(vectors)
    return {name: total / np.float32(max(1, count[name])) for name, total in sums.items()}


@dataclass(frozen=True, slots=True)
class _Recorder:
    """A session that keeps what it is fed."""

    session: Any
    feeds: list[Feeds]

    def run_with_ort_values(self, outputs: Sequence[str], feeds: Feeds) -> Any:
        self.feeds.append({name: np.array(value.numpy()) for name, value in feeds.items()})
        return self.session.run_with_ort_values(outputs, feeds)


def record(model: OnnxModel) -> tuple[OnnxModel, Mapping[str, list[Feeds]]]:
    """`model`, and what each of its graphs is fed from now on, as arrays."""
    feeds: dict[str, list[Feeds]] = {stem: [] for stem in model.graphs}
    graphs = {s: replace(g, session=_Recorder(g.session, feeds[s])) for s, g in model.graphs.items()}
    return OnnxModel(graphs), feeds


def open_with_outputs(path: Path, names: Sequence[str]) -> Any:
    """A session of the graph `path` that also gives the inner values `names`."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    return open_beside(path, model)


def open_beside(path: Path, model: Any) -> Any:
    """A session of a changed `model` of the file `path`, with its external data."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    copy = path.with_name(f"{path.stem}.changed.onnx")
    copy.write_bytes(model.SerializeToString())
    try:
        return onnxruntime.InferenceSession(str(copy), options, providers=["CPUExecutionProvider"])
    finally:
        copy.unlink()
