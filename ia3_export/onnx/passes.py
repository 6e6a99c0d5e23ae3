"""Rewrites of a graph have the shape of onnx_ir's own passes: they change a model in place and say whether
they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: From an ``onnx_ir.Model`` to an ``onnx_ir.passes.PassResult`` with that model: a function of ours, or a
#: pass of onnx_ir.
Pass = Callable[[Any], Any]


def run_passes(model: Any, *passes: Pass) -> bool:
    """Run `passes` on an ``onnx_ir.Model``, in order; whether one of them changed it.

    What a pass raises comes through as it is: ``onnx_ir.passes.Sequential`` would put a ``PassError`` around
    our refusals.
    """
    changed = False
    for step in passes:
        changed |= step(model).modified
    return changed
