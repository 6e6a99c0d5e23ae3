"""The words of options, and the names of floating dtypes in safetensors files and in torch.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

#: Several adapters: one after the other, ``sum w l`` (PEFT's ``add_weighted_adapter``), or ``1 +
#: sum w (l - 1)``.
Combine = Literal["product", "linear", "delta"]
#: Vectors as saved, or rounded to the base's dtype first, as PEFT's low-memory loading does.
Cast = Literal["peft", "peft-low-mem"]
#: Dtype of an output; ``auto`` keeps what is stored.
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
#: Dtype in which PyTorch runs a model; ``auto`` is the stored one.
RunDtype = Literal["auto", "float64", "float32", "float16", "bfloat16"]
#: Who applied the vectors of a live model; ``graph``: multiplications in the base's own ONNX graph.
AppliedBy = Literal["peft", "hooks", "graph", "none"]
#: What becomes of a quantized base: dense; its scales folded, or refused; its scales folded,
#: dense where that fails.
Quantized = Literal["dequantize", "keep", "keep-or-dense"]
#: Whose tokenizer, generation and processor settings an output gets.
TokenizerChoice = Literal["auto", "base", "adapter"]
#: PEFT's names of tasks that an adapter is written for.
TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
#: SHA-256 of inputs and outputs, of outputs, or of nothing.
Digests = Literal["full", "output", "none"]
ReloadCheck = Literal["streamed", "whole", "none"]

#: Precisions for which weights are rounded to codes; a graph computes in float32 with them.
INTEGER_PRECISIONS = ("int8", "int4")
#: With the codes that a quantized base has already: nothing is rounded, and a graph must be as exact as
#: float32.
CODED_PRECISIONS = (*INTEGER_PRECISIONS, "keep")

#: Torch's names of floating dtypes by those in safetensors headers ...
TORCH_NAMES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: ... and the way back.
STORED_NAMES: Mapping[str, str] = {torch: stored for stored, torch in TORCH_NAMES.items()}
#: ONNX's floating element types (onnx.proto3, ``TensorProto.DataType``), by their names in safetensors.
ONNX_FLOATS: Mapping[str, str] = {"FLOAT": "F32", "FLOAT16": "F16", "DOUBLE": "F64", "BFLOAT16": "BF16"}


def torch_name(dtype: object) -> str:
    """``float32`` of a torch dtype, or of its name in a configuration, with the module before it or not."""
    return str(dtype).removeprefix("torch.")
