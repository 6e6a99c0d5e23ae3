"""What ``torch.save`` writes since torch 1.6, read without torch: a zip archive of ``data.pkl`` and storages.

``data.pkl`` names the tensors' storages, shapes and strides; ``data/KEY`` are the storages, uncompressed
(``torch.serialization``, "Serialized file format for torch.save"). The pickle is read as
``torch.load(weights_only=True)`` reads it: a handful of names are known, and stand here for descriptions of
their own; any other name, and whatever is not the plain case, is left to torch itself.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ia3_export.checkpoint.header import StoredTensor, tensor_bytes

_STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


#: A record's own header: signature, method, size of what is stored, lengths of name and of extra fields.
_LOCAL_HEADER = struct.Struct("<4s4xH12xIHH")

#: Bytes between a record and the next: none, or its checksum and sizes.
_DESCRIPTORS = (0, 16, 24)

#: More than any tensor has; torch itself stops at 64.
_DIMENSIONS = 64


class _NotPlain(Exception):
    """Something in the file that torch may know and this reader does not."""


class _Storage(NamedTuple):  # tuples, since a pickle can give other objects any state
    dtype: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def read_plain(path: Path) -> dict[str, StoredTensor] | None:
    """The tensors of `path`, each as its range of bytes in the file, in the pickle's order.

    None where the file is not a zip archive or holds anything but contiguous dense tensors (at its top or
    under ``state_dict``), for torch to read or to refuse.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = {entry.filename: entry for entry in archive.infolist()}
            if len(records) < len(archive.infolist()):
                return None
            root = next(name for name in records if name.count("/") == 1 and name.endswith("/data.pkl"))
            root = root.removesuffix("data.pkl")
            if root + "byteorder" in records and archive.read(root + "byteorder") != b"little":
                return None
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in records.values()):
                return None
            state = state_table(_Unpickler(io.BytesIO(archive.read(root + "data.pkl"))).load())
            starts = _starts(file, archive)
            return {key: _placed(key, value, path, root, starts) for key, value in state.items()}
    except Exception:  # a damaged pickle makes the machine that runs it fail in any way there is
        return None


class LocalHeader(NamedTuple):
    """What stands before a record in the archive itself, and where the record's bytes start."""

    signature: bytes
    method: int
    size: int
    name: bytes
    start: int


def local_header(file: BinaryIO, entry: zipfile.ZipInfo) -> LocalHeader:
    """The header of a record, which may be longer than the archive's directory says. Raises `struct.error` at
    the end of the file."""
    file.seek(entry.header_offset)
    signature, method, size, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    name = file.read(name_length)
    return LocalHeader(
        signature, method, size, name, entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    )


def state_table(value: Any) -> Any:
    """The table of tensors in what ``torch.save`` saved.

    Trainers put it under ``state_dict``, beside other things.
    """
    nested = value.get("state_dict") if isinstance(value, dict) else None
    return nested if isinstance(nested, dict) else value


def _starts(file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Where the bytes of every record begin, by the record's own header, and how many they are.

    Raises `_NotPlain` where records do not follow each other as a writer leaves them, since of a damaged
    header other bytes would be read.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
    starts = {}
    for entry, end in zip(entries, ends, strict=True):
        header = local_header(file, entry)
        # the size may follow the record instead (0), or stand in the field of ZIP64
        as_written = (
            header.signature == b"PK\3\4",
            header.method == zipfile.ZIP_STORED,
            header.size in (0, entry.file_size, 0xFFFFFFFF),
            header.name == entry.filename.encode(),
            end - header.start - entry.file_size in _DESCRIPTORS,
        )
        if not all(as_written):
            raise _NotPlain(entry.filename)
        starts[entry.filename] = (header.start, entry.file_size)
    return starts


def _placed(
    name: Any, value: Any, path: Path, root: str, starts: Mapping[str, tuple[int, int]]
) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(value, _Tensor):
        raise _NotPlain(name)
    name.encode()
    storage = value.storage
    start, size = starts[f"{root}data/{storage.key}"]
    width, nbytes = tensor_bytes(storage.dtype, (1,)), tensor_bytes(storage.dtype, value.shape)
    offset = value.offset * width
    if size != storage.elements * width or offset + nbytes > size:
        raise _NotPlain(name)
    return StoredTensor(
        name=name, dtype=storage.dtype, shape=value.shape, file=path, offset=start + offset, nbytes=nbytes
    )


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _requires_grad: Any, hooks: Any, *metadata: Any
) -> _Tensor:
    """``torch._utils._rebuild_tensor_v2``, of a contiguous tensor."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers):
        raise _NotPlain("tensor")
    if any(metadata) or hooks or len(shape) != len(stride) or len(shape) > _DIMENSIONS:
        raise _NotPlain("tensor")
    step, empty = 1, 0 in shape
    for count, distance in zip(reversed(shape), reversed(stride), strict=True):
        if count != 1 and distance != step and not empty:
            raise _NotPlain("strided")
        step *= count
    return _Tensor(storage, offset, tuple(shape))


def _parameter(data: Any, *_options: Any) -> Any:
    """``torch._utils._rebuild_parameter``."""
    return data


_KNOWN: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickling machine, whose memo is a dictionary: the one in C makes room for whatever index
    a file names."""

    def find_class(self, module: str, name: str, /) -> Any:
        """The description that stands for a name of torch; `_NotPlain` for all others."""
        if (module, name) not in _KNOWN:
            raise _NotPlain(f"{module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """What ``torch.save`` says of a storage: ``("storage", type, key, device, elements)``."""
        kind, dtype, key, _, elements = pid
        if (
            kind != "storage"
            or dtype not in _STORAGES.values()
            or type(key) is not str
            or type(elements) is not int
        ):
            raise _NotPlain("storage")
        return _Storage(dtype, key, elements)
