"""What `export_onnx` knows of a model beside its graphs when it chooses bits: inputs, and the base's
weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ia3_export.errors import Unsupported
from ia3_export.fold import Array
from ia3_export.onnx.calibration import record
from ia3_export.onnx.export import TracedGraph
from ia3_export.onnx.mixing import LIMIT, Aim, Calibrated, Mix
from ia3_export.onnx.options import GraphOptions
from ia3_export.onnx.precision import choose_bits
from ia3_export.onnx.replaceable import open_replaceable
from ia3_export.onnx.runtime import open_model
from ia3_export.parity.bits.expected import Expected, expected_tensors, whole
from ia3_export.parity.runs.inputs import Case
from ia3_export.parity.runs.run_onnx import run_onnx
from ia3_export.planning.plan import Plan


def mix_bits(
    traced: Sequence[TracedGraph],
    cases: Sequence[Case],
    plan: Plan,
    options: GraphOptions,
    say: Callable[[str], None],
) -> Mix:
    """The bits of the weights of the graphs `traced`, chosen on `cases` for what `options` ask.

    Raises `Unsupported` where a share of the adapters' effect is to be kept and none is seen.
    """
    opened, feeds = record(open_model([graph.path for graph in traced]))
    run_onnx(opened, cases)
    by_stem = feeds if len(traced) > 1 else {traced[0].path.stem: next(iter(feeds.values()))}
    graphs = [Calibrated(graph.path, by_stem.get(graph.path.stem, ()), graph.left) for graph in traced]
    loss = LIMIT
    if options.keep_effect is not None:
        loss = (1 - options.keep_effect) * _effect(graphs, traced, plan)
    return choose_bits(graphs, Aim(loss, options.budget), say)


def _effect(graphs: Sequence[Calibrated], traced: Sequence[TracedGraph], plan: Plan) -> float:
    """What the graphs lose with the base's weights, without adapters: the largest loss of them."""
    rows = expected_tensors(plan)
    losses = [0.0]
    for graph, origins in zip(graphs, (one.origins for one in traced), strict=True):
        weights: dict[str, Array] = {}
        for name, origin in origins.items():
            row = rows.get(origin.tensor or "")
            if (
                row is not None
                and row.changed
                and row.base is not None
                and row.base.shape == row.source.shape
            ):
                weights[name] = np.ascontiguousarray(_of_base(row).T) if origin.transposed else _of_base(row)
        if graph.feeds and weights:
            opened = open_replaceable(graph.path, graph.feeds)
            losses.append(opened.loss({name: w for name, w in weights.items() if name in opened.held}))
    if not max(losses) > 0:
        raise Unsupported(
            "the adapters change nothing that the graphs show, so there is no effect to keep",
            hint="leave out --keep-effect; it needs --base and --adapter",
        )
    return max(losses)


def _of_base(row: Expected) -> Array:
    """The base's tensor in float32, in its own shape."""
    assert row.base is not None
    plain = replace(row, source=row.base, scales=(), dtype=row.base.dtype)
    return whole(plain).astype("<f4")
