"""Bases that bitsandbytes quantized: the model as that library runs it, and the same dequantized exactly.

PEFT cannot run IA3 on such a base in 16 bits (its layers then give float32 and attention refuses), so everything that is
not quantized, and the products themselves, are in float32.
"""

from __future__ import annotations

from typing import Any

from ia3_export.checkpoint.folder import Checkpoint


def is_bitsandbytes(base: Checkpoint) -> bool:
    """Whether the configuration says that bitsandbytes quantized the checkpoint."""
    settings = (base.config or {}).get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == "bitsandbytes"


def widen(model: Any) -> None:
    """Everything of a bitsandbytes model but the codes in float32, in place: parameters, buffers, products."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = torch.float32


def dequantize(model: Any, dense: Any) -> None:
    """Fill `dense`, a model of the same class without quantization, from a widened bitsandbytes model, in float32, with the
    library's own functions (``functional.dequantize_4bit``, ``int8_vectorwise_dequant``).

    Before any forward of `model`: on some CPUs that repacks the codes.
    """
    import bitsandbytes

    functional = bitsandbytes.functional
    wanted = dense.state_dict()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    for path, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            continue
        name = f"{path}.weight"
        # a Conv1D (GPT-2) is transposed before bitsandbytes packs it
        conv1d = type(dense.get_submodule(path)).__name__ == "Conv1D"
        state[name] = weight.T if conv1d else weight.reshape(wanted[name].shape)
    dense.load_state_dict({name: tensor.float() for name, tensor in state.items()})
