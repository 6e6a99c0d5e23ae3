"""The dense model that a quantized checkpoint stands for, as a folder of its own.

This is what is exported where the weights stay quantized.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ia3_export.checkpoint.header import StoredTensor, tensor_bytes, write_header
from ia3_export.fold import FLOAT_DTYPES
from ia3_export.quantization.base import Base, read_base
from ia3_export.quantization.config import SIDE_FILES, without_settings
from ia3_export.quantization.packed import read_flat
from ia3_export.writing.stage import copy_file

#: Elements that are in memory at a time.
_BLOCK = 1 << 21


def dense_base(base: Base, folder: Path) -> Base:
    """What `base` stands for: `write_dense` in `folder` where it is quantized, else itself."""
    quantized = base.is_quantized or base.stored.is_gguf
    return read_base(write_dense(base, folder)) if quantized else base


def write_dense(base: Base, folder: Path) -> Path:
    """Write `base` into `folder` with every quantized weight in float32, exactly, and all else as it is.

    Raises the reason why a weight cannot be read.
    """
    base.raise_problems()
    checkpoint, dense = base.stored, base.dense
    tensors = {name: tensor for name, tensor in dense.tensors.items() if tensor.dtype in FLOAT_DTYPES}
    prefix, offsets = write_header(((n, t.dtype, t.shape) for n, t in tensors.items()), {"format": "pt"})
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(prefix)
        for name in sorted(offsets, key=lambda name: offsets[name]):
            file.seek(offsets[name])
            for first, count in _steps(tensors[name]):
                file.write(np.ascontiguousarray(read_flat(tensors[name], first, count)).data)
        file.truncate(
            max((offsets[n] + tensor_bytes(t.dtype, t.shape) for n, t in tensors.items()), default=0)
        )
    for name in checkpoint.side_files:
        if name not in SIDE_FILES:
            copy_file(checkpoint.folder / name, folder / name)
    if checkpoint.config is not None:
        config = without_settings(checkpoint.config) | {"dtype": "float32"}
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _steps(tensor: StoredTensor) -> list[tuple[int, int]]:
    unit = tensor.computed.unit if tensor.computed is not None else 1
    step = max(_BLOCK // unit, 1) * unit
    return [(first, min(step, tensor.size - first)) for first in range(0, tensor.size, step)]
