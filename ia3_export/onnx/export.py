"""From a loaded model to its graphs in float32: planned, traced and written one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.fold import Array
from ia3_export.onnx.conditional import merge_decoders
from ia3_export.onnx.contract import GraphSpec
from ia3_export.onnx.exported import MERGED
from ia3_export.onnx.files import external_files, save_model
from ia3_export.onnx.options import GraphOptions
from ia3_export.onnx.provenance import Origin, trace_origins
from ia3_export.onnx.trace import trace

#: Graphs above this many bytes get external data, which are streamed: a protobuf is held in memory twice
#: while it is written.
_STREAMED = 500_000_000


@dataclass(frozen=True, slots=True)
class TracedGraph:
    """A graph in float32 that was written, where its initializers come from, and those that are `left` in
    float32 where the others become codes."""

    path: Path
    origins: Mapping[str, Origin]
    left: frozenset[str] = frozenset()


def export_graphs(
    model: Any,
    specs: Sequence[GraphSpec],
    folder: Path,
    options: GraphOptions,
    *,
    stored: Mapping[str, StoredTensor] | None,
    say: Callable[[str], None],
) -> list[TracedGraph]:
    """Write the graphs `specs` of `model` (float32, eval mode) into `folder`, in their order. `say` is told
    of each; `stored` are the tensors that the model was loaded from, None where nobody asks for origins.

    Raises `Unsupported` when torch cannot trace one.
    """
    graphs = []
    for spec in specs:
        say(f"tracing {spec.file}")
        traced = trace(model, spec, options.opset)
        path = folder / f"{spec.file}.onnx"
        say(f"writing {path.name}")
        save_model(traced, path, external_above=_STREAMED)
        graphs.append(TracedGraph(path, {} if stored is None else trace_origins(traced, model, stored)))
        del traced
    if options.decoder == "if" and len(graphs) == 3:
        encoder, first, cached = graphs
        return [encoder, _merge(first, cached, folder / f"{MERGED}.onnx")]
    return graphs


def _merge(first: TracedGraph, cached: TracedGraph, path: Path) -> TracedGraph:
    """Both decoders in one file; theirs go."""
    import onnx_ir

    save_model(merge_decoders(onnx_ir.load(first.path), onnx_ir.load(cached.path)), path)
    for graph in (first.path, cached.path):
        for file in (graph, *external_files(graph)):
            file.unlink()
    return TracedGraph(path, {**first.origins, **cached.origins})


def with_values(graph: TracedGraph, values: Mapping[str, Callable[[], Array]], folder: Path) -> TracedGraph:
    """`graph` with other `values` for stored tensors, read one by one in their stored shapes; written into
    `folder`."""
    import onnx_ir

    model = onnx_ir.load(graph.path)
    for part in model.graphs():
        for name, value in part.initializers.items():
            origin = graph.origins.get(name)
            read = None if origin is None else values.get(origin.tensor or "")
            if origin is not None and read is not None:
                old = value.const_value
                value.const_value = onnx_ir.LazyTensor(
                    partial(_read, read, origin), dtype=old.dtype, shape=old.shape, name=name
                )
    path = folder / graph.path.name
    save_model(model, path, external_above=_STREAMED)
    return replace(graph, path=path)


def _read(read: Callable[[], Array], origin: Origin) -> Any:
    import onnx_ir

    values = read().astype("<f4")
    return onnx_ir.tensor(np.ascontiguousarray(values.T) if origin.transposed else values)
