"""PyTorch ``.bin`` checkpoints as byte ranges.

``torch.load`` runs with ``weights_only=True`` (no pickled code is executed) under ``FakeTensorMode``, which
reads shapes and storage offsets but no data (torch documentation of ``torch.serialization``); a zip-format
``.bin`` keeps its storages uncompressed, so every contiguous tensor is a byte range of the file like a
safetensors one. Files of the format before torch 1.6, and strided tensors, are loaded into memory instead.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.header import Shard, StoredTensor, tensor_bytes
from ia3_export.errors import DamagedFile, NotFound, Unsupported

_SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def read_bin(path: Path, name: str | None = None) -> Shard:
    """Tensors of the ``torch.save`` file `path`, in its own order. Aliased tensors each get an entry.

    Raises `NotFound`, `DamagedFile`, and `Unsupported` for files that hold more than tensors.
    """
    if not path.is_file():
        raise NotFound(f"{path} does not exist", hint="check the path, or download the file again")
    addressable = zipfile.is_zipfile(path)
    state = _load(path, fake=addressable)
    if isinstance(state, dict) and set(state) == {"state_dict"}:
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise Unsupported(
            f"{path} holds a {type(state).__name__}, not a table of tensors",
            hint="save model.state_dict(), better with save_pretrained(), which writes safetensors",
        )
    size = path.stat().st_size
    tensors = []
    real: dict[str, Any] | None = None if addressable else state
    for key, value in state.items():
        stored = _address(path, str(key), value, size) if addressable else None
        if stored is None:
            if real is None:
                real = _load(path, fake=False)
            stored = _in_memory(path, str(key), real[key])
        tensors.append(stored)
    return Shard(name or path.name, path, b"", {"format": "pt"}, tuple(tensors))


def _load(path: Path, *, fake: bool) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        if fake:
            with FakeTensorMode():
                return torch.load(path, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first_line = str(error).splitlines()[0]
        raise Unsupported(
            f"{path} is a pickle with more than tensors in it, which is not executed ({first_line})",
            hint="load it where you trust it and save it again with save_pretrained(), as safetensors",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFile(
            f"{path} cannot be read as a torch file: {first_line}", hint="fetch the file again"
        ) from None


def _dtype_name(path: Path, key: str, value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        raise Unsupported(
            f"{path} holds {key}, a {type(value).__name__}, beside its tensors",
            hint="save model.state_dict() alone, better with save_pretrained()",
        )
    name = str(value.dtype).removeprefix("torch.")
    if name not in _SAFETENSORS_DTYPES:
        raise Unsupported(f"tensor {key} in {path} has dtype {name}, which safetensors cannot hold")
    return _SAFETENSORS_DTYPES[name]


def _address(path: Path, key: str, value: Any, size: int) -> StoredTensor | None:
    dtype = _dtype_name(path, key, value)
    storage_start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if storage_start is None or not value.is_contiguous():
        return None
    offset = storage_start + value.storage_offset() * value.element_size()
    nbytes = tensor_bytes(dtype, value.shape)
    if offset + nbytes > size:
        raise DamagedFile(f"{path} is too short for tensor {key}", hint="fetch the file again")
    return StoredTensor(key, dtype, tuple(value.shape), path, offset, nbytes)


def _in_memory(path: Path, key: str, value: Any) -> StoredTensor:
    import torch

    dtype = _dtype_name(path, key, value)
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return StoredTensor(key, dtype, tuple(value.shape), path, 0, data.nbytes, data)
