"""optimum-quanto: qint8, qfloat8 (``weight._data``) and the packed qint4, qint2 (``weight._data._data``).

Source: optimum-quanto ``tensor/packed.py``, ``tensor/grouped.py`` and ``tensor/weights``: codes of the first
rows lie in the low bits, groups are runs of the flat weight, and ``W = codes * scale - shift``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.fold import Array
from ia3_export.quantization.coded import CodedRows, CodeReader, signed_bytes
from ia3_export.quantization.codes import FLOAT_CODES, code_values
from ia3_export.quantization.packed import (
    BY_ROW,
    OF_WHOLE,
    SCALE_DTYPES,
    NoScale,
    Packed,
    Scales,
    ScaleTensor,
    Side,
    as_float,
    expect,
    parts_of,
    read_flat,
    read_rows,
)

METHOD = "quanto"
_LEAVES = ("weight._data", "weight._data._data", "weight._shift", "input_scale", "output_scale")


def find(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """The quanto weights among `tensors`. Raises `DamagedFile` and `Unsupported`."""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    for name, scale in tensors.items():
        if not name.endswith(".weight._scale"):
            continue
        dense = name.removesuffix("._scale")
        module = dense.removesuffix(".weight")
        parts = {**parts_of(module, _LEAVES, tensors), name: scale}
        expect(scale, SCALE_DTYPES, tuple(scale.shape))
        if f"{dense}._data" in parts:
            yield _whole(dense, parts[f"{dense}._data"], scale, parts)
        elif f"{dense}._data._data" in parts and f"{dense}._shift" in parts:
            codes = parts[f"{dense}._data._data"]
            kind = str(((settings.get("qmap") or {}).get(module) or {}).get("weights"))
            if kind not in ("qint4", "qint2"):
                raise Unsupported(
                    f"{codes.name} is packed, and quanto_qmap.json does not say how ({kind})",
                    hint="quanto_qmap.json belongs beside the weights; fetch the folder again",
                )
            bits = int(kind[-1])
            shape = _shape(codes, scale, 8 // bits)
            if shape is None:
                shapes = _model_shapes(settings) if shapes is None else shapes
                shape = shapes.get(dense)
            yield _grouped(dense, codes, scale, parts, bits, shape)
        else:
            raise DamagedFile(f"{scale.file.name} holds {name} without codes", hint="fetch it again")


def _whole(dense: str, codes: StoredTensor, scale: StoredTensor, parts: Mapping[str, StoredTensor]) -> Packed:
    expect(codes, ("I8", *FLOAT_CODES), (None, None))
    out = codes.shape[0]

    def rows(first: int, count: int) -> Array:
        values = code_values(read_rows(codes, first, count), codes.dtype)
        where = (0, 1) if scale.size == 1 else (first, count)
        return values * as_float(read_flat(scale, *where), scale.dtype)[:, None]

    def coded(first: int, count: int) -> CodedRows:
        where = (0, 1) if scale.size == 1 else (first, count)
        scales = np.broadcast_to(as_float(read_flat(scale, *where), scale.dtype)[:, None], (count, 1))
        return signed_bytes(read_rows(codes, first, count), scales, codes.shape[1])

    if scale.size not in (1, out):
        raise DamagedFile(f"{scale.name} is {list(scale.shape)} for {out} rows", hint="fetch it again")
    return Packed(
        name=dense,
        method=METHOD,
        format=f"quanto {'qint8' if codes.dtype == 'I8' else 'qfloat8'}",
        shape=codes.shape,
        parts={codes.name: codes, **parts},
        rows=rows,
        unit=1,
        on_output=Scales((ScaleTensor(scale, 1),)) if scale.size == out else OF_WHOLE,
        on_input=BY_ROW,
        coded=coded if codes.dtype == "I8" else "the codes of qfloat8 are small floats",
    )


def _shape(codes: StoredTensor, scale: StoredTensor, each: int) -> tuple[int, ...] | None:
    """The weight's shape where a row is one group: of smaller groups, which have one of four lengths, the
    file does not tell the shape (``quanto.tensor.weights.qbits``)."""
    expect(codes, ("U8",), (None, None))
    whole = scale.size == codes.shape[0] * each and codes.shape[1] not in (128, 96, 64, 32)
    return (scale.size, codes.shape[1]) if whole else None


def _model_shapes(settings: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    from ia3_export.models.answers import parameter_shapes

    return parameter_shapes(settings.get("model") or {})


def _grouped(
    dense: str,
    codes: StoredTensor,
    scale: StoredTensor,
    parts: Mapping[str, StoredTensor],
    bits: int,
    shape: tuple[int, ...] | None,
) -> Packed:
    each = 8 // bits
    lines, length = codes.shape[0] * each, codes.shape[1]
    shift = parts[f"{dense}._shift"]
    expect(shift, SCALE_DTYPES, scale.shape)
    if shape is None or len(shape) != 2 or shape[0] * shape[1] != lines * length or scale.size != lines:
        raise Unsupported(
            f"the shape of {dense} cannot be told: the file holds groups of {length}, and config.json "
            "names no model that has it",
            hint="give the folder with its config.json, or the unquantized checkpoint",
        )
    out, columns = shape

    def unpacked(line: int, last: int) -> Array:
        values = np.empty((last - line, length), "u1")
        for part in range(each):
            low, high = max(line, part * codes.shape[0]), min(last, (part + 1) * codes.shape[0])
            if low < high:
                raw = read_rows(codes, low - part * codes.shape[0], high - low)
                values[low - line : high - line] = raw >> np.uint8(bits * part) & np.uint8((1 << bits) - 1)
        return values

    def rows(first: int, count: int) -> Array:
        begin, end = first * columns, (first + count) * columns
        line, last = begin // length, -(-end // length)
        values = unpacked(line, last).astype("<f4")
        values *= as_float(read_flat(scale, line, last - line), scale.dtype)[:, None]
        values -= as_float(read_flat(shift, line, last - line), shift.dtype)[:, None]
        return values.reshape(-1)[begin - line * length :][: end - begin].reshape(count, columns)

    def codes_of(first: int, count: int) -> CodedRows:
        line, lines = first * inner, count * inner
        scales = as_float(read_flat(scale, line, lines), scale.dtype).reshape(count, -1)
        return CodedRows(
            codes=unpacked(line, line + lines).reshape(count, columns),
            bits=bits,
            scales=scales,
            zeros=np.zeros_like(scales),
            offsets=-as_float(read_flat(shift, line, lines), shift.dtype).reshape(count, -1),
            group=length,
        )

    inner = columns // length
    reason = f"rows of {columns} elements share groups of {length}"
    on_output: Side = NoScale(reason)
    coded: CodeReader | str = reason
    if columns % length == 0:
        on_output = Scales((ScaleTensor(scale, inner), ScaleTensor(shift, inner)))
        coded = codes_of
    return Packed(
        name=dense,
        method=METHOD,
        format=f"quanto qint{bits}",
        shape=(out, columns),
        parts={codes.name: codes, **parts},
        rows=rows,
        unit=1,
        on_output=on_output,
        on_input=BY_ROW,
        coded=coded,
    )
