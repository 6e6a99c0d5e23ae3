"""Where the tensors of an ONNX file lie in it: a model of any size is read without its weights.

A protobuf message is a sequence of fields, each a tag and a value, and a nested message is a value with its
length in front (protobuf.dev, "Encoding"). So the weights can be passed over, and what is left is the same
model with *external data* that lie in the file itself: an offset and a length, as the ONNX specification
("External Data") has them for other files.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from ia3_export.checkpoint.hub import lies_within
from ia3_export.errors import DamagedFile, NotFound, Refused, first_line
from ia3_export.onnx.files import bodies

_VARINT, _FIXED64, LENGTH, _FIXED32 = 0, 1, 2, 5
#: Messages that may hold a tensor, by the message and the field that they lie in (onnx.proto3).
_INSIDE = {
    ("model", 7): "graph",
    ("model", 25): "function",
    ("function", 7): "node",
    ("graph", 1): "node",
    ("graph", 5): "tensor",
    ("node", 5): "attribute",
    ("attribute", 5): "tensor",
    ("attribute", 6): "graph",
    ("attribute", 10): "tensor",
    ("attribute", 11): "graph",
}
#: ``float_data`` (packed) and ``raw_data``: little-endian numbers, one after the other.
_VALUES = (4, 9)
_EXTERNAL, _LOCATION = 13, 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The `nbytes` of an initializer at `offset` of `file`, little-endian and C-ordered.

    `dtype` is ONNX's name of the element type: ``FLOAT``, ``FLOAT16``, ``UINT8``, ...
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_light(path: Path, *, above: int = 0) -> Any:
    """The ``onnx.ModelProto`` of `path`; tensors of more than `above` bytes that lie in the file refer to it
    as external data.

    Raises `NotFound`, and `DamagedFile` for a file that is no ONNX model or shorter than it says.
    """
    import onnx

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return onnx.ModelProto.FromString(b"".join(_light(_Scanned(data, path.name, above), "model")))
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist", hint="give a folder with .onnx files") from None
    except Exception as error:  # protobuf's errors are of its version
        raise DamagedFile(
            f"{path} is not readable ONNX: {first_line(error)}", hint="export or fetch it again"
        ) from error


def tensor_spans(path: Path) -> list[Span]:
    """The initializers of the ONNX file `path` and of the bodies in it, in its order, and where each lies.

    Empty ones, and those whose values are no raw bytes, are left out. Raises what `read_light` does, and
    `Refused` for external data outside of its folder.
    """
    model = read_light(path)
    return [span for tensor in initializers(model.graph) if (span := span_of(tensor, path)) is not None]


def initializers(graph: Any) -> Iterator[Any]:
    """The initializers of an ``onnx.GraphProto`` and of the bodies in it."""
    for body in bodies(graph):
        yield from body.initializer


def span_of(tensor: Any, path: Path) -> Span | None:
    """Where an ``onnx.TensorProto`` of the file `path` lies; None where it has no bytes of its own.

    Raises `Refused` for external data outside of the folder, `DamagedFile` where the file ends before.
    """
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = PurePosixPath(entries.get("location", ""))
    file = path.parent / location
    outside = location.is_absolute() or ".." in location.parts
    if outside or not (file == path or lies_within(file, path.parent)):
        raise Refused(
            f"{path} names the external data file {file}, which lies outside its folder",
            hint="do not use this file; tell whoever published it",
        )
    kind, shape = _kind_of(tensor, path), tuple(tensor.dims)
    try:
        offset, size = int(entries.get("offset", 0)), file.stat().st_size
        nbytes = int(entries.get("length", size - offset))
    except (OSError, ValueError) as error:
        raise DamagedFile(
            f"{path} keeps {tensor.name} in {file.name}, which cannot be read: {first_line(error)}",
            hint="the external data belong beside the .onnx file; copy or fetch both again",
        ) from error
    wanted = _bytes_of(tensor)
    nbytes = nbytes if wanted is None or "length" in entries else wanted
    if offset < 0 or not 0 <= nbytes <= size - offset:
        raise DamagedFile(
            f"{path} keeps {tensor.name} in {file.name}, which is too short",
            hint="the external data belong beside the .onnx file; copy or fetch both again",
        )
    if wanted is not None and nbytes != wanted:
        raise DamagedFile(
            f"{path}: {tensor.name} of {kind} {list(shape)} has {nbytes:,} bytes in place of {wanted:,}",
            hint="the file is damaged or was made by hand; export or fetch it again",
        )
    return Span(name=tensor.name, dtype=kind, shape=shape, file=file, offset=offset, nbytes=nbytes)


def _kind_of(tensor: Any, path: Path) -> str:
    """ONNX's name of the element type. Raises `DamagedFile` where there is none, or a size is negative."""
    import onnx

    try:
        kind: str = onnx.TensorProto.DataType.Name(tensor.data_type)
    except ValueError:
        kind = ""
    if not kind or min(tensor.dims, default=0) < 0:
        raise DamagedFile(
            f"{path}: {tensor.name} has the type {tensor.data_type} and the shape {list(tensor.dims)}",
            hint="the file is damaged or was made by hand; export or fetch it again",
        )
    return kind


def _bytes_of(tensor: Any) -> int | None:
    """Bytes of a tensor of its type and shape; None for texts, and types that are not known here."""
    import onnx

    count: int = prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return -(-count // 2)
    try:
        width: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        return count * width
    except KeyError:
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _Scanned:
    """The bytes of a file of this `name`, whose tensors of more than `above` bytes stay there."""

    data: Any
    name: str
    above: int


def _light(file: _Scanned, kind: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The message of this `kind` between `start` and `end`, without the bytes of tensors."""
    for field, wire, begin, first, last in _fields(file.data, start, len(file.data) if end is None else end):
        inside = _INSIDE.get((kind, field))
        if kind == "tensor" and field in _VALUES and wire == LENGTH and last - first > file.above:
            yield from _reference(file.name, first, last - first)
        elif inside is not None and wire == LENGTH and (inside == "tensor" or last - first > file.above):
            parts = list(_light(file, inside, first, last))
            yield varint(field << 3 | LENGTH) + varint(sum(map(len, parts)))
            yield from parts
        else:
            yield file.data[begin:last]


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Number and wire type of each field, where it begins, and where its value begins and ends.

    Raises `ValueError` for what is no message.
    """
    at = start
    while at < end:
        tag, first = _read_varint(data, at, end)
        wire = tag & 7
        if wire == LENGTH:
            size, first = _read_varint(data, first, end)
        elif wire == _VARINT:
            size = _read_varint(data, first, end)[1] - first
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of wire type {wire} at byte {at}")
        if first + size > end:
            raise ValueError(f"a field at byte {at} is longer than the file or the message around it")
        yield tag >> 3, wire, at, first, first + size
        at = first + size


def _read_varint(data: Any, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number at byte {at} does not end")


def varint(value: int) -> bytes:
    """A whole number in the encoding of protobuf: 7 bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _reference(location: str, offset: int, length: int) -> Iterator[bytes]:
    """The fields of a tensor that lies elsewhere (``external_data`` and ``data_location``)."""
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        pair = b"".join(
            varint(number << 3 | LENGTH) + varint(len(text.encode())) + text.encode()
            for number, text in ((1, key), (2, value))
        )
        yield varint(_EXTERNAL << 3 | LENGTH) + varint(len(pair)) + pair
    yield varint(_LOCATION << 3 | _VARINT) + varint(1)
