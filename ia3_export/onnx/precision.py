"""Further precisions of an exported graph: float16, and weights of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ia3_export.errors import Unsupported
from ia3_export.onnx.files import save_model
from ia3_export.onnx.float16 import to_float16
from ia3_export.onnx.passes import Pass, run_passes
from ia3_export.onnx.quantize import is_weight, quantize


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a graph's weights a precision reached.

    Weights are the float32 initializers of more than 1 KB with two axes longer than 1 (biases and norms are
    none): `weight_bytes` is their size in the source, `converted_bytes` the part that is no longer held in
    float32, and `left` names the others, largest first.
    """

    weight_bytes: int
    converted_bytes: int
    left: tuple[str, ...]


_REWRITES: Mapping[str, Pass] = {
    "fp16": to_float16,
    "q8": partial(quantize, bits=8, dense=True),
    "int8": partial(quantize, bits=8),
    "int4": partial(quantize, bits=4),
}


def convert_precision(source: Path, target: Path, precision: str) -> Coverage:
    """Write the float32 graph `source` to `target` in `precision`: ``fp16``, ``int8`` or ``int4``; inputs and
    outputs stay as they are.

    ``fp16``: weights and activations are float16, except what float16 cannot hold (`to_float16`). ``int8``
    and ``int4``: weights are codes (`quantize`), all else is float32. External data are read tensor by
    tensor; what is held in memory is the result.

    Raises `Unsupported` when no weight of the graph can be held in `precision`.
    """
    import onnx_ir
    import onnx_ir.passes.common as common

    model = onnx_ir.load(source)
    run_passes(model, common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0))
    before = dict(_weights(model))
    run_passes(
        model, _REWRITES[precision], common.RemoveUnusedNodesPass(), common.ClearMetadataAndDocStringPass()
    )
    after = {name: size for name, size in _weights(model) if name in before}
    left = tuple(sorted(after, key=lambda name: (-after[name], name)))
    coverage = Coverage(sum(before.values()), sum(before.values()) - sum(after.values()), left)
    if not coverage.converted_bytes:
        raise Unsupported(
            f"{source.name} has no weight that {precision} reaches",
            hint=f"leave out --precision {precision}: the file would be the float32 one under another name",
        )
    # tensors that stayed float32 would be written as references to the source's external data
    onnx_ir.external_data.load_to_model(model)
    save_model(model, target)
    return coverage


def _weights(model: Any) -> Iterator[tuple[str, int]]:
    """Name and bytes of every float32 weight, those in bodies of ``If`` too."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value.dtype.name == "FLOAT" and is_weight(value.const_value):
                yield name, value.const_value.nbytes
