"""The safetensors header: parse, validate, write canonically.

Format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length N, N bytes of
JSON, then the data. Offsets tile the data without holes or overlap. The library refuses headers above 100 MB;
so do we. Nothing here allocates more than the file holds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.errors import DamagedFile, NotFound
from ia3_export.fold import DTYPE_BITS, Array, storage_dtype, to_float

MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """How the elements of a tensor are computed from stored ones while they are read: dequantized, for
    example.

    ``read(first, count)`` gives flat elements ``first:first+count`` in the tensor's dtype; both are multiples
    of `unit`, or end with the tensor. `compute_dtype` is the one in which a model has the values, and in
    which they are written unless the user chooses another.
    """

    unit: int
    read: Callable[[int, int], Array]
    compute_dtype: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredTensor:
    """A tensor on disk, never loaded: `nbytes` C-ordered little-endian bytes at `offset` of `file`.

    `data` (uint8) stands in for the file where bytes cannot be addressed there (old ``.bin`` files), and
    `computed` where they are not stored at all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    data: Array | None = None
    computed: Computed | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return count_elements(self.shape)

    @property
    def in_file(self) -> bool:
        """Whether `file` holds the bytes."""
        return self.data is None and self.computed is None

    @property
    def compute_dtype(self) -> str:
        """The dtype in which a model has the tensor: the stored one, unless it is computed."""
        return self.dtype if self.computed is None else self.computed.compute_dtype


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file. `prefix` is its length field and header, verbatim; empty for ``.bin`` files."""

    name: str
    path: Path
    prefix: bytes
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]


def read_bytes(tensor: StoredTensor) -> bytes:
    """All bytes of a (small) tensor. Raises `DamagedFile` when the file has become shorter."""
    if tensor.data is not None:
        return tensor.data.tobytes()
    if tensor.computed is not None:
        return tensor.computed.read(0, tensor.size).tobytes()
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise DamagedFile(f"{tensor.file} ends inside tensor {tensor.name}", hint="fetch the file again")
    return data


def read_values(tensor: StoredTensor) -> Array:
    """All elements of a (small) floating tensor, widened exactly to float32 (float64 stays), in its shape."""
    raw = np.frombuffer(read_bytes(tensor), storage_dtype(tensor.dtype))
    return to_float(raw, tensor.dtype).reshape(tensor.shape)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have equal dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return read_bytes(one) == read_bytes(other)


def count_elements(shape: Iterable[int]) -> int:
    """Product of the dimensions, as a Python integer of any size."""
    count = 1
    for extent in shape:
        count *= extent
    return count


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor of `dtype` and `shape` occupies; -1 when its bits do not fill whole bytes."""
    bits = DTYPE_BITS[dtype] * count_elements(shape)
    return bits // 8 if bits % 8 == 0 else -1


def read_header(path: Path, name: str | None = None) -> Shard:
    """Parse and validate the header of the safetensors file `path`; tensors come in file order.

    Raises `NotFound` and `DamagedFile`, naming file and tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if length < 2 or length > MAX_HEADER or 8 + length > size:
                raise DamagedFile(
                    f"{path} is no complete safetensors file: its header would be {length:,} bytes, "
                    f"the file has {size:,}",
                    hint="the download was cut off, or the file has another format; fetch it again",
                )
            body = file.read(length)
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist", hint="check the path, or download the file again") from None
    except OSError as error:
        raise DamagedFile(
            f"{path} cannot be read: {error.strerror}", hint="check the file's permissions and the disk"
        ) from error
    entries = _parse_json(path, body)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its __metadata__ is not a table of strings")
    start = 8 + length
    tensors = sorted((_entry(path, key, value, start) for key, value in entries.items()), key=_file_order)
    _check_tiling(path, tensors, start, size)
    return Shard(name or path.name, path, prefix + body, metadata, tuple(tensors))


def write_header(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Header bytes for tensors given as (name, dtype, shape), and the file offset of each tensor.

    Order as the safetensors library writes it, falling element size and then name (which aligns every
    tensor), metadata sorted by key: the same input always gives the same bytes.
    """
    ordered = sorted(entries, key=lambda entry: (-DTYPE_BITS[entry[1]], entry[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, dtype, shape in ordered:
        starts[name], end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    body = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    prefix = struct.pack("<Q", len(body)) + body
    return prefix, {name: len(prefix) + start for name, start in starts.items()}


def _file_order(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.offset, tensor.nbytes


def damaged(path: Path, what: str) -> DamagedFile:
    """The error for a file that contradicts itself."""
    return DamagedFile(f"{path} is damaged: {what}", hint="fetch the file again, or ask its author")


def _parse_json(path: Path, body: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice in its header")
        return table

    try:
        entries = json.loads(body.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not the JSON it should be ({error})") from None
    if not isinstance(entries, dict):
        raise damaged(path, "its header is not a JSON object")
    try:
        "".join(entries).encode()
    except UnicodeEncodeError:
        raise damaged(path, "a tensor name in its header is not valid Unicode") from None
    return entries


def _entry(path: Path, name: str, value: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise damaged(path, f"the header entry of tensor {name} is malformed") from None
    if not whole:
        raise damaged(path, f"tensor {name} has a shape or offset that is not a whole number")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise damaged(path, f"tensor {name} has the unknown dtype {dtype!r}")
    if end - begin != tensor_bytes(dtype, shape):
        raise damaged(
            path, f"tensor {name} is {dtype} {list(shape)} but its offsets span {end - begin:,} bytes"
        )
    return StoredTensor(
        name=name, dtype=dtype, shape=shape, file=path, offset=start + begin, nbytes=end - begin
    )


def _check_tiling(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the one before it" if tensor.offset < position else "leaves a hole before it"
            raise damaged(path, f"tensor {tensor.name} {kind}")
        position += tensor.nbytes
        if position > size:
            raise DamagedFile(
                f"{path} is {position - size:,} bytes short: tensor {tensor.name} ends at {position:,}, "
                f"the file at {size:,}",
                hint="the download was cut off; fetch the file again",
            )
    if position != size:
        raise damaged(path, f"{size - position:,} bytes follow its last tensor")
