"""One code an element and a tensor of scales beside it: compressed-tensors' int8 and FP8, fine-grained FP8,
FBGEMM, MXFP8.

Sources: compressed-tensors ``compressors/`` and ``quantization/lifecycle/forward.py``, transformers
``integrations/finegrained_fp8.py`` and ``fbgemm_fp8.py``. The scale multiplies, whatever its name says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import Computed, StoredTensor
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.fold import Array
from ia3_export.quantization.coded import CodedRows, CodeReader, signed_bytes
from ia3_export.quantization.codes import E8M0, FLOAT_CODES, code_values
from ia3_export.quantization.config import block_shape, scheme_of, schemes
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
    compute,
    expect,
    group_columns,
    parts_of,
    read_flat,
    read_rows,
)

#: Names of the scale, after the module path; all of them multiply.
_SCALES = ("weight_scale", "weight_scale_inv", "scale", "qscale_weight")
_COMPANIONS = (
    "weight_zero_point", "input_scale", "input_zero_point", "input_scale_ub", "output_scale",
    "output_zero_point", "activation_scale", "qscale_act",
)  # fmt: skip


def find(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """The weights of 8-bit codes with one tensor of scales among `tensors`. Raises `DamagedFile`,
    `Unsupported`."""
    for name, codes in tensors.items():
        if not name.endswith(".weight") or codes.dtype not in ("I8", *FLOAT_CODES) or len(codes.shape) != 2:
            continue
        module = name.removesuffix(".weight")
        scale = next(iter(parts_of(module, _SCALES, tensors).values()), None)
        if scale is None:
            continue
        parts = {name: codes, scale.name: scale, **parts_of(module, _COMPANIONS, tensors)}
        yield _packed(name, codes, scale, parts.get(f"{module}.weight_zero_point"), parts, settings)


def find_torchao(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """torchao's tensor subclasses of plain codes (Int8Tensor, Float8Tensor, IntxUnpackedToInt8Tensor) among
    `tensors`, as ``torchao.prototype.safetensors`` flattens them. Raises `DamagedFile`, `Unsupported`."""
    for name, codes in tensors.items():
        if not name.endswith("._weight_qdata"):
            continue
        module = name.removesuffix("._weight_qdata")
        leaves = ("_weight_scale", "_weight_zero_point")
        scale, zero = (tensors.get(f"{module}.{leaf}") for leaf in leaves)
        if codes.dtype not in ("I8", *FLOAT_CODES) or len(codes.shape) != 2 or scale is None:
            raise Unsupported(
                f"{name} in {codes.file.name} is {codes.dtype} {list(codes.shape)}, a packed torchao "
                "tensor that this version does not read",
                hint="int8, float8 and unpacked intx weights are read",
            )
        parts = {tensor.name: tensor for tensor in (codes, scale, zero) if tensor is not None}
        yield _packed(
            f"{module}.weight", codes, scale, zero, parts, {"quant_method": "torchao"} | dict(settings)
        )


def _packed(
    name: str,
    codes: StoredTensor,
    scale: StoredTensor,
    zero: StoredTensor | None,
    parts: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
) -> Packed:
    out, columns = codes.shape
    kind = "int8" if codes.dtype == "I8" else "FP8"
    method = str(settings.get("quant_method", "compressed-tensors"))
    if scale.dtype not in (*SCALE_DTYPES, "U8", "F8_E8M0"):
        raise DamagedFile(
            f"{scale.name} holds scales as {scale.dtype}", hint="fetch the file again, or report it"
        )
    if zero is not None:
        expect(zero, ("I8",), scale.shape)
    if scale.size == 1:
        grid, strategy = (out, columns), "tensor"
    elif scale.shape in ((out,), (out, 1)):
        grid, strategy = (1, columns), "channel"
    else:
        grid, strategy = _grid(codes, scale, settings), "block"
    if scale.dtype in ("U8", "F8_E8M0"):
        on_output: Side = NoScale("its scales are powers of two")
        kind = "MXFP8"
    elif strategy == "block" and grid[0] != 1:
        on_output = NoScale(f"{grid[0]} rows share a scale")
    elif strategy == "tensor":
        on_output = _promote(codes, scale, method, settings)
    else:
        on_output = Scales((ScaleTensor(scale, scale.size // out),))
    return Packed(
        name=name,
        method=method,
        format=f"{kind} by {strategy}",
        shape=codes.shape,
        parts=parts,
        rows=partial(_decode, codes, scale, zero, grid),
        unit=grid[0] if strategy == "block" else 1,
        on_output=on_output,
        on_input=BY_ROW,
        coded=_coded(codes, scale, zero, grid, kind),
    )


def _grid(codes: StoredTensor, scale: StoredTensor, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale. The configuration's: the last block of a row or column may be
    smaller, so the extents alone do not tell."""
    expect(scale, (*SCALE_DTYPES, "U8", "F8_E8M0"), (None, None))
    out, columns = codes.shape
    if scale.shape[0] == out:  # groups within rows
        sizes = {s.weights.get("group_size") for s in schemes(settings)}
        return 1, group_columns(scale, columns, scale.shape[1], sizes, strict=False)
    size = block_shape(settings, scheme_of(settings, codes.name.removesuffix(".weight"))) or (128, 128)
    if (-(-out // size[0]), -(-columns // size[1])) != scale.shape:
        raise DamagedFile(
            f"{scale.name} is {list(scale.shape)}: blocks of {list(size)} of {list(codes.shape)} give "
            "another grid",
            hint="weight_block_size in the configuration is not that of the file",
        )
    return size


def _promote(
    codes: StoredTensor, scale: StoredTensor, method: str, settings: Mapping[str, Any]
) -> Scales | NoScale:
    """One scale a tensor becomes one a row, which the configuration then has to say of all modules of its
    group."""
    if method != "compressed-tensors":
        return NoScale(f"{OF_WHOLE.reason}, and this format has none by row")
    scheme = scheme_of(settings, codes.name.removesuffix(".weight"))
    if scheme is None or scheme.weights.get("strategy") != "tensor":
        return OF_WHOLE

    def read(_: int, count: int) -> Array:
        return np.repeat(as_float(read_flat(scale, 0, 1), scale.dtype), count)

    wide = compute(scale.name, "F32", (codes.shape[0], 1), scale, Computed(1, read, "F32"))
    return Scales((ScaleTensor(wide, 1),), group=scheme.name)


def _decode(
    codes: StoredTensor,
    scale: StoredTensor,
    zero: StoredTensor | None,
    grid: tuple[int, int],
    first: int,
    count: int,
) -> Array:
    values = code_values(read_rows(codes, first, count), codes.dtype)
    if zero is not None:
        values -= _spread(zero, grid, first, count, codes.shape)
    values *= _spread(scale, grid, first, count, codes.shape)
    return values


def _coded(
    codes: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, grid: tuple[int, int], kind: str
) -> CodeReader | str:
    if codes.dtype != "I8":
        return f"the codes of {kind} are small floats"
    if scale.dtype not in SCALE_DTYPES:
        return "its scales are powers of two"
    columns = codes.shape[1]
    group = min(grid[1], columns)

    def numbers(tensor: StoredTensor, first: int, count: int) -> Array:
        values = _spread(tensor, grid, first, count, codes.shape)
        one = values[:, ::group] if values.shape[1] > 1 else values
        return np.broadcast_to(one, (count, -(-columns // group)))

    def read(first: int, count: int) -> CodedRows:
        scales = np.ascontiguousarray(numbers(scale, first, count))
        coded = signed_bytes(read_rows(codes, first, count), scales, group)
        return coded if zero is None else replace(coded, zeros=coded.zeros + numbers(zero, first, count))

    return read


def _spread(
    tensor: StoredTensor, grid: tuple[int, int], first: int, count: int, shape: tuple[int, ...]
) -> Array:
    """The part of a grid of scales (or zero points) that lies on rows ``first:first+count``: one value an
    element, or a row."""
    lines = -(-shape[0] // grid[0])
    begin, end = first // grid[0], -(-(first + count) // grid[0])
    width = tensor.size // lines
    raw = read_flat(tensor, begin * width, (end - begin) * width).reshape(end - begin, width)
    values = E8M0[raw] if tensor.dtype in ("U8", "F8_E8M0") else _numbers(raw, tensor.dtype)
    rows = np.repeat(values, grid[0], axis=0)[first - begin * grid[0] :][:count] if grid[0] > 1 else values
    if grid[1] >= shape[1]:
        return rows[:, :1]
    return np.repeat(rows, grid[1], axis=1)[:, : shape[1]]


def _numbers(raw: Array, dtype: str) -> Array:
    return raw.astype("<f4") if dtype == "I8" else as_float(raw, dtype)
