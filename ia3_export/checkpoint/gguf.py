"""GGUF files: parse, validate, write a header with other tensor types.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, metadata pairs,
one record a tensor, padding, then the data, every tensor aligned. Sizes of the block types come from the
``gguf`` package; its own reader is not used, since it keeps an array for every token (9 s and 520 MB for
Llama 3's vocabulary) and trusts every count. Nothing here allocates more than the file holds.

Tensors are named as in the Hugging Face checkpoint that the file was converted from, where that name is known
(`ia3_export.checkpoint.gguf_models`).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.gguf_models import (
    Architecture,
    config_of_metadata,
    find_architecture,
    hugging_face_name,
)
from ia3_export.checkpoint.header import MAX_HEADER, Shard, StoredTensor, count_elements, damaged
from ia3_export.errors import DamagedFile, NotFound, Unsupported

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
#: Longest array of integers whose values are kept: heads by layer. Longer ones belong to the tokenizer.
_MAX_LISTED = 4096

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
#: ggml types that are dtypes of their own; all others are blocks of codes, here rows of bytes (U8).
_DTYPES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_TYPES = {dtype: number for number, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Record:
    """One tensor of the header; `shape` in numpy's order, `offset` from the start of the data."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class _Header:
    """A parsed header: metadata, and where records and data start.

    `values` are scalars, strings and short lists of integers, `records_at` is where the tensors start,
    `data_at` where their data does.
    """

    values: Mapping[str, Any]
    records: tuple[_Record, ...]
    records_at: int
    data_at: int
    alignment: int


def read_gguf(path: Path, name: str | None = None) -> tuple[Shard, dict[str, Any]]:
    """Parse and validate the GGUF file `path`; tensors come in file order.

    Blocks of codes are ``U8`` of shape (rows, bytes a row). The second result is what the metadata says of a
    ``config.json``; its ``quantization_config`` holds the ggml `types` of coded tensors, and by name the rows
    of one head where those are permuted. Raises `NotFound`, `DamagedFile` and `Unsupported`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise DamagedFile(
                    f"{path} is no GGUF file: its magic number is missing",
                    hint="the download was cut off, or the file has another format; fetch it again",
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse(data, path)
                if header.data_at > MAX_HEADER:
                    raise damaged(path, f"its header would be {header.data_at:,} bytes")
                prefix = data[: header.data_at]
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist", hint="check the path, or download the file again") from None
    except (OSError, ValueError) as error:
        raise DamagedFile(
            f"{path} cannot be read: {error}", hint="check the file's permissions and the disk"
        ) from error
    known = find_architecture(path, header.values)
    names = _names(header, known)
    tensors = [
        _stored(record, name, path, header) for record, name in zip(header.records, names, strict=True)
    ]
    tensors.sort(key=lambda tensor: tensor.offset)
    _check_extents(path, tensors, size)
    metadata = {"general.architecture": str(header.values["general.architecture"])}
    shard = Shard(name or path.name, path, prefix, metadata, tuple(tensors))
    shapes = {name: record.shape for name, record in zip(names, header.records, strict=True)}
    types = {
        name: type_name(record.type)
        for name, record in zip(names, header.records, strict=True)
        if record.type not in _DTYPES
    }
    return shard, config_of_metadata(path, header.values, known, shapes, types)


def write_prefix(
    prefix: bytes, rows: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[bytes, dict[str, int], int]:
    """The header `prefix` rewritten for tensors of other dtypes.

    `rows` gives dtype and shape of every tensor by name, in the order of the data.

    Metadata is copied byte for byte, and types of coded tensors stay. Returns the new bytes, the file offset
    of every tensor, and the size of the file.
    """
    path = Path("the base")
    header = _parse(prefix, path)
    names = _names(header, find_architecture(path, header.values))
    described = {
        name: (_TYPES[dtype], shape) if dtype in _TYPES else (record.type, record.shape)
        for name, record in zip(names, header.records, strict=True)
        for dtype, shape in [rows[name]]
    }
    relative, end = {}, 0
    for name in rows:
        relative[name] = end
        kind, shape = described[name]
        end += -(-_type_bytes(kind, shape) // header.alignment) * header.alignment
    body = bytearray(prefix[: header.records_at])
    for name, record in zip(names, header.records, strict=True):
        kind, shape = described[name]
        text = record.name.encode()
        body += struct.pack("<Q", len(text)) + text
        body += struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        body += struct.pack("<IQ", kind, relative[name])
    body += bytes(-len(body) % header.alignment)
    return bytes(body), {name: len(body) + start for name, start in relative.items()}, len(body) + end


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """A tensor as the file names it: `kind` is its dtype, or ggml's name of a type of `block` elements each,
    `shape` counts elements."""

    name: str
    kind: str
    block: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_table(path: Path) -> list[TableRow]:
    """Every tensor of the GGUF file `path`, of whatever architecture, in file order.

    Raises `DamagedFile` and `Unsupported`.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            size = len(data)
            if data[:4] != MAGIC:
                raise damaged(path, "its magic number is missing")
            header = _parse(data, path)
    except (OSError, ValueError) as error:
        raise DamagedFile(
            f"{path} cannot be read: {error}", hint="check the file's permissions and the disk"
        ) from error
    tensors = [_stored(record, record.name, path, header) for record in header.records]
    _check_extents(path, sorted(tensors, key=lambda tensor: tensor.offset), size)
    rows = [
        TableRow(
            name=record.name,
            kind=_DTYPES.get(record.type) or type_name(record.type),
            block=_sizes(record.type, record.name, path)[0],
            shape=record.shape,
            offset=tensor.offset,
            nbytes=tensor.nbytes,
        )
        for record, tensor in zip(header.records, tensors, strict=True)
    ]
    return sorted(rows, key=lambda row: row.offset)


def type_name(number: int) -> str:
    """ggml's name of a type."""
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(number).name)


class _Cursor:
    """Reads forward through `data`, never past its end."""

    def __init__(self, data: Any, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def skip(self, count: int) -> int:
        """Move over `count` bytes and return where they start."""
        start = self.at
        if count > len(self.data) - start:
            raise DamagedFile(
                f"{self.path} ends inside its header: {count:,} bytes are announced at byte {start:,} of "
                f"{len(self.data):,}",
                hint="the download was cut off, or the file is damaged; fetch it again",
            )
        self.at = start + count
        return start

    def number(self, code: str) -> Any:
        start = self.skip(struct.calcsize(code))
        return struct.unpack_from(code, self.data, start)[0]

    def text(self) -> bytes:
        count = self.number("<Q")
        start = self.skip(count)
        return bytes(self.data[start : start + count])

    def count(self, each: int, what: str) -> int:
        """A count of things that take `each` bytes at least."""
        count = int(self.number("<Q"))
        if count * each > len(self.data) - self.at:
            raise damaged(self.path, f"it announces {count:,} {what}, for which it is too short")
        return count


def _parse(data: Any, path: Path) -> _Header:
    cursor = _Cursor(data, path)
    cursor.skip(4)
    version = cursor.number("<I")
    if version not in _VERSIONS:
        swapped = version & 0xFFFF == 0
        raise Unsupported(
            f"{path} is {'a big-endian GGUF file' if swapped else f'GGUF version {version}'}; versions 2 "
            "and 3 in little-endian order are read",
            hint="convert the model again with a recent llama.cpp",
        )
    tensors, pairs = cursor.number("<Q"), cursor.count(8 + 4 + 1, "metadata entries")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key = _text(cursor.text(), path)
        if key in values:
            raise damaged(path, f"its metadata has {key} twice")
        values[key] = _value(cursor, cursor.number("<I"))
    alignment = values.get("general.alignment", 32)
    power = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
    if not power or not alignment <= _MAX_ALIGNMENT:
        raise damaged(path, f"its alignment is {alignment!r}, no power of two")
    records_at = cursor.at
    if tensors * (8 + 4 + 8 + 4 + 8) > len(data) - records_at:
        raise damaged(path, f"it announces {tensors:,} tensors, for which it is too short")
    records = tuple(_record(cursor) for _ in range(tensors))
    return _Header(values, records, records_at, -(-cursor.at // alignment) * alignment, alignment)


def _value(cursor: _Cursor, kind: int) -> Any:
    """A metadata value; None for arrays that are only stepped over."""
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text().decode(errors="replace")
    if kind != _ARRAY:
        raise damaged(cursor.path, f"its metadata has a value of the unknown type {kind}")
    item = cursor.number("<I")
    if item in _SCALARS:
        width = struct.calcsize(_SCALARS[item])
        count = cursor.count(width, "values")
        start = cursor.skip(count * width)
        if count > _MAX_LISTED:
            return None
        return list(struct.unpack_from(f"<{count}{_SCALARS[item][1]}", cursor.data, start))
    if item != _STRING:
        raise damaged(cursor.path, f"its metadata has an array of the type {item}")
    for _ in range(cursor.count(8, "strings")):
        cursor.skip(cursor.number("<Q"))
    return None


def _record(cursor: _Cursor) -> _Record:
    name = _text(cursor.text(), cursor.path)
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise damaged(cursor.path, f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if min(shape) < 1 or max(shape) > 1 << 48:
        raise damaged(cursor.path, f"tensor {name} has the shape {list(shape)}")
    block, _ = _sizes(kind, name, cursor.path)
    if shape[-1] % block:
        raise damaged(
            cursor.path,
            f"tensor {name} has rows of {shape[-1]} elements in {type_name(kind)} blocks of {block}",
        )
    return _Record(name, kind, shape, offset)


def _sizes(kind: int, name: str, path: Path) -> tuple[int, int]:
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}.get(kind)
    if sizes is None:
        raise Unsupported(
            f"tensor {name} in {path} has the ggml type {kind}, which this version does not know",
            hint="the file is damaged, or needs a newer gguf package",
        )
    return sizes


def _type_bytes(kind: int, shape: Sequence[int]) -> int:
    block, nbytes = _sizes(kind, "", Path())
    return count_elements(shape) // block * nbytes


def _text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise damaged(path, "a name in its header is not valid Unicode") from None


def _names(header: _Header, known: Architecture) -> list[str]:
    """The names of the tensors: Hugging Face's where they are known, else the file's own."""
    found: dict[str, str] = {}
    given: set[str] = set()
    for record in header.records:
        if record.name in found:
            raise DamagedFile(
                f"tensor {record.name} is in the file twice", hint="fetch the file again, or ask its author"
            )
        name = hugging_face_name(record.name, known)
        found[record.name] = record.name if name is None or name in given else name
        given.add(found[record.name])
    return list(found.values())


def _stored(record: _Record, name: str, path: Path, header: _Header) -> StoredTensor:
    nbytes, dtype = _type_bytes(record.type, record.shape), _DTYPES.get(record.type)
    if record.offset % header.alignment:
        raise damaged(path, f"tensor {record.name} starts at {record.offset:,}, which is not aligned")
    if dtype is None:
        rows = count_elements(record.shape[:-1])
        return StoredTensor(
            name=name,
            dtype="U8",
            shape=(rows, nbytes // rows),
            file=path,
            offset=header.data_at + record.offset,
            nbytes=nbytes,
        )
    return StoredTensor(
        name=name,
        dtype=dtype,
        shape=record.shape,
        file=path,
        offset=header.data_at + record.offset,
        nbytes=nbytes,
    )


def _check_extents(path: Path, tensors: Sequence[StoredTensor], size: int) -> None:
    if not tensors:
        raise damaged(path, "it holds no tensors")
    end = 0
    for tensor in tensors:
        if tensor.offset < end:
            raise damaged(path, f"tensor {tensor.name} overlaps the one before it")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise DamagedFile(
                f"{path} is {end - size:,} bytes short: tensor {tensor.name} ends at {end:,}, "
                f"the file at {size:,}",
                hint="the download was cut off; fetch the file again",
            )
