"""Which values of a graph are weights, and in which shape their readers see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.exported import TASK

#: A weight has more bytes than this, and two axes longer than 1 (biases and norms have one).
SMALL = 1024
#: What may lie between a weight, or the ids of tokens, and their reader.
SHAPING = ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def constant(value: Any) -> Array | None:
    """What `value` always holds: a weight, possibly transposed, cut or reshaped on its way.

    None if it depends on inputs.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx_ir import to_proto

    array: Array
    if value.const_value is not None:
        array = value.const_value.numpy()
        return array
    node = value.producer()
    if node is None or node.op_type not in SHAPING:
        return None
    given = {v.name: constant(v) for v in node.inputs if v is not None}
    if any(known is None for known in given.values()):
        return None
    (array,) = ReferenceEvaluator(to_proto(node)).run([value.name], given)
    return array


def is_weight(array: Any) -> bool:
    """Whether an array (or tensor) is a weight: more than 1 KB, and two axes longer than 1."""
    return array.nbytes > SMALL and sum(int(size) > 1 for size in array.shape) > 1


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """What a node reads as a weight, a value of ``onnx_ir``.

    Attributes:
        value: it, or of a transposed one (a head that is tied to the embedding) what it is the transpose of.
        rows: its numbers, outputs x inputs, or tokens x columns; batches of matrices have more axes in front.
        turned: whether `value` holds the transpose of `rows`.
        factor: what a product multiplies it with; None for a table.
    """

    value: Any
    rows: Array
    turned: bool
    factor: Any | None


def find_weights(model: Any) -> Iterator[Weight]:
    """The weights that `quantize` holds as codes, except those of convolutions, in the order of their
    nodes."""
    for node in model.graph.all_nodes():
        read = {"MatMul": factor_of, "Gemm": factor_of, "Gather": table_of}.get(node.op_type)
        weight = None if read is None or node.domain else read(node)
        if weight is not None:
            yield weight


def factor_of(node: Any) -> Weight | None:
    """The weight that a ``MatMul`` or ``Gemm`` multiplies with; None if that is none, or scaled."""
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if options.get("transA") or options.get("alpha", 1) != 1 or options.get("beta", 1) != 1:
        return None
    factor, value = node.inputs[:2]
    array = constant(value)
    if array is None or not is_weight(array):
        return None
    turned = not options.get("transB")
    rows = np.swapaxes(array, -1, -2) if turned else array
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose" and turned and array.ndim == 2:
        value, turned = maker.inputs[0], False
    return Weight(value, rows, turned, factor)


def table_of(node: Any) -> Weight | None:
    """The table of tokens that a ``Gather`` looks up; None if it looks up something else."""
    value = node.inputs[0]
    if not _looks_up(node, "input_ids"):
        return None
    array = constant(value)
    if array is None or array.ndim != 2 or not is_weight(array):
        return None
    return Weight(value, array, False, None)


def looks_up_task(node: Any) -> bool:
    """Whether `node` gives the rows of a table for the graph's input ``task``."""
    return bool(node.op_type == "Gather" and not node.domain and _looks_up(node, TASK))


def _looks_up(node: Any, name: str) -> bool:
    """Whether a ``Gather`` gives rows for the graph's input `name`, perhaps in another shape."""
    along, value = node.attributes.get("axis"), node.inputs[1]
    while value.producer() is not None and value.producer().op_type in SHAPING:
        value = value.producer().inputs[0]
    return bool(not (along and along.value) and value.is_graph_input() and value.name == name)
