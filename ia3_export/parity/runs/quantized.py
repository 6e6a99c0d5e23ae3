"""Quantized bases and merges: the dense model that one stands for, and bitsandbytes' as that library runs it.

PEFT cannot run IA3 on a base of bitsandbytes in 16 bits (its layers then give float32 and attention refuses),
so there everything that is not quantized, and the products themselves, are in float32.
"""

from __future__ import annotations

from typing import Any

from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import read_values
from ia3_export.errors import Unsupported
from ia3_export.fold import FLOAT_DTYPES


def is_bitsandbytes(base: Checkpoint) -> bool:
    """Whether the configuration says that bitsandbytes quantized the checkpoint."""
    settings = (base.config or {}).get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == "bitsandbytes"


def dense_state(dense: Checkpoint) -> dict[str, Any]:
    """Every floating tensor of a dense view as a torch tensor: quantized weights in float32, exactly, others
    as stored.
    """
    import torch

    floats = {name: tensor for name, tensor in dense.tensors.items() if tensor.dtype in FLOAT_DTYPES}
    return {name: torch.from_numpy(read_values(tensor)) for name, tensor in floats.items()}


def load_dense(
    dense: Checkpoint, class_name: str, config: Any, dtype: Any, *, other_sizes: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The dense view as a transformers model of `class_name`, and the report of its loading.

    It goes through ``from_pretrained``'s own renames and fusions; with `other_sizes` tensors of another size
    than the class's are left out and reported.
    """
    import transformers

    if dense.config is None:
        raise Unsupported(
            f"{dense.location.given} has no config.json, so no model can be built from it",
            hint="give the model folder that save_pretrained() wrote",
        )
    model, report = getattr(transformers, class_name).from_pretrained(
        None,
        config=config,
        state_dict=dense_state(dense),
        dtype=dtype,
        ignore_mismatched_sizes=other_sizes,
        output_loading_info=True,
        trust_remote_code=False,
    )
    return model, report


def widen(model: Any) -> None:
    """All of a bitsandbytes model but the codes in float32, in place: parameters, buffers, products."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        # codes may be stored under a floating dtype
        packed = getattr(tensor, "quant_state", None) is not None
        if tensor.dtype in (torch.float16, torch.bfloat16) and not packed:
            tensor.data = tensor.data.float()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = torch.float32
