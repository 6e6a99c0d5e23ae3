"""PyTorch ``.bin`` and ``.pt`` checkpoints as byte ranges.

The plain ones are read without torch (``torch_zip``). For all others ``torch.load`` runs with
``weights_only=True`` (no pickled code is executed) under ``FakeTensorMode``, which reads shapes and storage
offsets but no data (torch documentation of ``torch.serialization``); a zip-format ``.bin`` keeps its storages
uncompressed, so every contiguous tensor is a byte range of the file like a safetensors one. Files of the
format before torch 1.6, and strided tensors, are loaded into memory instead.
"""

from __future__ import annotations

import logging
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.header import Shard, StoredTensor, tensor_bytes
from ia3_export.checkpoint.torch_zip import local_header, read_plain, state_table
from ia3_export.errors import DamagedFile, NotFound, Unsupported, kind_and_line
from ia3_export.libraries import private
from ia3_export.words import STORED_NAMES, torch_name

_SAFETENSORS_DTYPES = {
    **STORED_NAMES, "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

#: Bytes that a tensor may have beyond those of its storage, of which it repeats elements.
_REPEATED = 1 << 24


def read_bin(path: Path, name: str | None = None) -> Shard:
    """Tensors of the ``torch.save`` file `path`, in its own order. Aliased tensors each get an entry.

    Raises `NotFound`, `DamagedFile`, and `Unsupported` for files that hold more than tensors.
    """
    if not path.is_file():
        raise NotFound(f"{path} does not exist", hint="check the path, or download the file again")
    plain = read_plain(path)
    if plain is not None:
        return Shard(name or path.name, path, b"", {"format": "pt"}, tuple(plain.values()))
    records = _records(path)
    state = _load(path, fake=records is not None)
    state = state_table(state)
    if not isinstance(state, dict):
        raise Unsupported(
            f"{path} holds a {type(state).__name__}, not a table of tensors",
            hint="save model.state_dict(), better with save_pretrained(), which writes safetensors",
        )
    if records is not None and not _where_torch_thinks(path, state, records):
        records, state = None, _load(path, fake=False)
    tensors = []
    real = None if records is not None else state
    for key, value in state.items():
        _check_key(path, str(key))
        stored = _address(path, str(key), value) if records is not None else None
        if stored is None:
            real = _load(path, fake=False) if real is None else real
            stored = _in_memory(path, str(key), state_table(real)[key])
        tensors.append(stored)
    return Shard(name or path.name, path, b"", {"format": "pt"}, tuple(tensors))


def _check_key(path: Path, key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise DamagedFile(
            f"{path} holds a key that is not valid Unicode: {key!r}", hint="fetch the file again"
        ) from None


def _records(path: Path) -> dict[int, int] | None:
    """Start and size of every uncompressed record of a zip-format file.

    None when its bytes cannot be addressed.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = {}
            for entry in archive.infolist():
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    return None
                start = local_header(file, entry).start
                if entry.compress_type == zipfile.ZIP_STORED:
                    records[start] = entry.file_size
            return records
    except (zipfile.BadZipFile, struct.error, OSError, NotImplementedError, RuntimeError, ValueError):
        return None


def _where_torch_thinks(path: Path, state: dict[Any, Any], records: dict[int, int]) -> bool:
    """Whether every storage lies where torch computes it to lie.

    It knows the layout of its own writer only.
    """
    for key, value in state.items():
        _dtype_name(path, str(key), value)
        storage = value.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is not None and records.get(start, -1) < storage.nbytes():
            return False
    return True


def _load(path: Path, *, fake: bool) -> Any:
    import torch

    fake_mode = private("torch._subclasses.fake_tensor:FakeTensorMode")

    try:
        with warnings.catch_warnings(), _silenced("torch._subclasses.fake_tensor"):
            warnings.simplefilter("ignore")
            if fake:
                with fake_mode():
                    return torch.load(path, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Unsupported(
            f"{path} is a pickle with more than tensors in it, which is not executed",
            hint="load it where you trust it and save it again with save_pretrained(), as safetensors",
        ) from None
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise DamagedFile(
            f"{path} cannot be read as a torch file: {kind_and_line(error)}",
            hint="fetch the file again",
        ) from None


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Without what a logger says: torch writes tracebacks of its own for tensors that it cannot fake."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _dtype_name(path: Path, key: str, value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        raise Unsupported(
            f"{path} holds {key}, a {type(value).__name__}, beside its tensors",
            hint="save model.state_dict() alone, better with save_pretrained()",
        )
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
        raise Unsupported(
            f"tensor {key} in {path} is sparse, nested, quantized or without data",
            hint="save it as a plain dense tensor",
        )
    if value.numel() * value.element_size() > max(value.untyped_storage().nbytes(), _REPEATED):
        raise Unsupported(
            f"tensor {key} in {path} repeats fewer stored elements than it has",
            hint="save it as a plain dense tensor",
        )
    name = torch_name(value.dtype)
    if name not in _SAFETENSORS_DTYPES:
        raise Unsupported(f"tensor {key} in {path} has dtype {name}, which safetensors cannot hold")
    return _SAFETENSORS_DTYPES[name]


def _address(path: Path, key: str, value: Any) -> StoredTensor | None:
    dtype = _dtype_name(path, key, value)
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not value.is_contiguous() or value.is_conj() or value.is_neg():
        return None
    offset = start + value.storage_offset() * value.element_size()
    return StoredTensor(
        name=key,
        dtype=dtype,
        shape=tuple(value.shape),
        file=path,
        offset=offset,
        nbytes=tensor_bytes(dtype, value.shape),
    )


def _in_memory(path: Path, key: str, value: Any) -> StoredTensor:
    import torch

    dtype = _dtype_name(path, key, value)
    data = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return StoredTensor(
        name=key, dtype=dtype, shape=tuple(value.shape), file=path, offset=0, nbytes=data.nbytes, data=data
    )
