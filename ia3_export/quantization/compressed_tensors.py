"""compressed-tensors' packed integers (pack-quantized) and 4-bit floats (NVFP4, MXFP4), and ModelOpt's NVFP4.

Sources: compressed-tensors ``compressors/pack_quantized``, ``nvfp4``, ``mxfp4``; NVIDIA ModelOpt's export, in
which the global scale multiplies where compressed-tensors' divides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile
from ia3_export.fold import Array
from ia3_export.quantization.coded import CodedRows, in_groups
from ia3_export.quantization.codes import (
    E2M1,
    E4M3,
    E8M0,
    combine_groups,
    dequantize_groups,
    unpack,
    unpack_padded,
)
from ia3_export.quantization.config import schemes
from ia3_export.quantization.packed import (
    BY_ROW,
    SCALE_DTYPES,
    NoScale,
    Packed,
    Scales,
    ScaleTensor,
    as_float,
    expect,
    group_columns,
    parts_of,
    read_flat,
    read_rows,
)

METHOD = "compressed-tensors"
_LEAVES = (
    "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",
    "input_global_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point",
    "weight_scale_2",
)  # fmt: skip


def find(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """The packed weights among `tensors`. Raises `DamagedFile`."""
    for name, codes in tensors.items():
        module, _, leaf = name.rpartition(".")
        nvidia = leaf == "weight" and codes.dtype == "U8" and f"{module}.weight_scale_2" in tensors
        if leaf != "weight_packed" and not nvidia:
            continue
        parts = {name: codes, **parts_of(module, _LEAVES, tensors)}
        if f"{module}.weight_scale" not in parts:
            raise DamagedFile(
                f"{codes.file.name} holds {name} without {module}.weight_scale",
                hint="quantize or fetch the base again",
            )
        if codes.dtype in ("I32", "U32"):
            yield _integers(module, codes, parts, settings)
        else:
            yield _four_bit_floats(module, codes, parts, "modelopt" if nvidia else METHOD)


def _integers(
    module: str, codes: StoredTensor, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> Packed:
    scale = parts[f"{module}.weight_scale"]
    expect(codes, ("I32", "U32"), (None, None))
    expect(scale, SCALE_DTYPES, (codes.shape[0], None))
    declared = parts.get(f"{module}.weight_shape")
    if declared is None:
        raise DamagedFile(
            f"{codes.file.name} holds {codes.name} without {module}.weight_shape", hint="fetch it again"
        )
    expect(declared, ("I64", "I32"), (2,))
    out, columns = (int(n) for n in read_flat(declared, 0, 2))
    bits, padded = _width(codes, (out, columns), settings)
    sizes = {s.weights.get("group_size") for s in schemes(settings) if s.weights.get("num_bits") == bits}
    groups = scale.shape[1]
    size = group_columns(scale, columns, groups, sizes, strict=True)
    group = _column_groups(parts.get(f"{module}.weight_g_idx"), size, columns, groups)
    zero = parts.get(f"{module}.weight_zero_point")
    if zero is not None:
        lines = out if zero.dtype == "I8" else -(-out // (32 // bits)) if padded else -(-out * bits // 32)
        expect(zero, ("I8", "I32", "U32"), (lines, groups))
    layout = _PackedCodes(codes=codes, scale=scale, zero=zero, bits=bits, padded=padded, group=group)
    return Packed(
        name=f"{module}.weight",
        method=METHOD,
        format=f"packed int{bits}{', act-order' if (np.diff(group) < 0).any() else ''}",
        shape=(out, columns),
        parts=parts,
        rows=layout.rows,
        unit=32,
        on_output=Scales((ScaleTensor(scale, groups),)),
        on_input=BY_ROW,
        coded=layout.coded,
    )


def _column_groups(order: StoredTensor | None, size: int, columns: int, groups: int) -> Array:
    """The group of every column: `size` in a row, or as stored where activations order them."""
    if order is None:
        return np.arange(columns) // size
    expect(order, ("I32", "I64"), (columns,))
    stored = read_flat(order, 0, columns).astype("<i8")
    group = stored if (stored != -1).any() else np.arange(columns) // size  # -1 throughout: not ordered
    if group.min() < 0 or group.max() >= groups:
        raise DamagedFile(
            f"{order.name} names a group beyond {groups}", hint="quantize or fetch the base again"
        )
    return group


def _width(codes: StoredTensor, shape: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, bool]:
    """Bits a code, and whether words end in unused bits (versions before 0.13 packed 3, 5, 6 and 7 bits
    so)."""
    out, columns = shape
    fits = [
        (bits, padded)
        for bits in range(2, 9)
        for padded in (False, True)
        if codes.shape == (out, -(-columns // (32 // bits)) if padded else -(-columns * bits // 32))
        and not (padded and 32 % bits == 0)
    ]
    configured = {s.weights.get("num_bits") for s in schemes(settings)}
    best = [fit for fit in fits if fit[0] in configured] or fits
    if not best:
        raise DamagedFile(
            f"{codes.name} is {list(codes.shape)}, which is no packing of a weight {list(shape)}",
            hint="the file is damaged, or of a variant that this version does not read",
        )
    return best[0]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _PackedCodes:
    """Codes of `bits`, in words that end in unused bits or do not (`padded`), and the `group` of every
    column; without `zero` points the codes are offset by half their range."""

    codes: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None
    bits: int
    padded: bool
    group: Array

    def rows(self, first: int, count: int) -> Array:
        """Rows ``first:first+count`` of the dense weight; `first` is a multiple of 32."""
        values = self._unpacked(first, count).astype("<f4")
        scales = as_float(read_rows(self.scale, first, count), self.scale.dtype)
        if self.zero is not None:
            return dequantize_groups(values, self._zeros(self.zero, first, count), scales, self.group)
        values -= np.float32(1 << (self.bits - 1))
        combine_groups(np.multiply, values, scales, self.group)
        return values

    def coded(self, first: int, count: int) -> CodedRows:
        """The codes of these rows."""
        scales = as_float(read_rows(self.scale, first, count), self.scale.dtype)
        zeros = np.full_like(scales, 1 << (self.bits - 1))
        if self.zero is not None:
            zeros = self._zeros(self.zero, first, count)
        return in_groups(self._unpacked(first, count), self.bits, zeros, scales, self.group)

    def _unpacked(self, first: int, count: int) -> Array:
        take = unpack_padded if self.padded else unpack
        return take(read_rows(self.codes, first, count), self.bits, len(self.group))

    def _zeros(self, zero: StoredTensor, first: int, count: int) -> Array:
        """Zero points of rows ``first:first+count``, packed along the rows, offset as the codes are: (rows,
        groups)."""
        bits = self.bits
        if zero.dtype == "I8":  # not packed: signed, around zero
            return read_rows(zero, first, count).astype("<f4") + np.float32(1 << (bits - 1))
        each = 32 // bits
        if self.padded:
            begin = first // each
            words = read_rows(zero, begin, -(-(first + count) // each) - begin)
            found = unpack_padded(np.ascontiguousarray(words.T), bits, len(words) * each)
            return found[:, first - begin * each :][:, :count].T.astype("<f4")
        # 32 rows fill whole words in every width
        begin = first * bits // 32
        words = read_rows(zero, begin, min(-(-count * bits // 32), zero.shape[0] - begin))
        return unpack(np.ascontiguousarray(words.T), bits, count).T.astype("<f4")


def _one(tensor: StoredTensor) -> Any:
    if tensor.size != 1:
        raise DamagedFile(
            f"{tensor.name} holds {tensor.size} numbers, it should be one", hint="fetch it again"
        )
    return as_float(read_flat(tensor, 0, 1), tensor.dtype)[0]


def _four_bit_floats(
    module: str, codes: StoredTensor, parts: Mapping[str, StoredTensor], method: str
) -> Packed:
    scale = parts[f"{module}.weight_scale"]
    expect(codes, ("U8",), (None, None))
    out, columns = codes.shape[0], codes.shape[1] * 2
    expect(scale, ("F8_E4M3", "U8", "F8_E8M0"), (out, None))
    if scale.shape[1] < 1 or columns % scale.shape[1]:
        raise DamagedFile(f"{scale.name} does not divide {columns} columns", hint="fetch the file again")
    size = columns // scale.shape[1]
    micro = scale.dtype != "F8_E4M3"
    divisor, factor = np.float32(1), np.float32(1)
    if f"{module}.weight_global_scale" in parts:
        divisor = _one(parts[f"{module}.weight_global_scale"])
    elif f"{module}.weight_scale_2" in parts:
        factor = _one(parts[f"{module}.weight_scale_2"])
    table = E8M0 if micro else E4M3

    def rows(first: int, count: int) -> Array:
        values = E2M1[unpack(read_rows(codes, first, count), 4, columns)]
        scales = table[read_rows(scale, first, count)] / divisor * factor
        values.reshape(count, -1, size)[...] *= scales[:, :, None]
        return values

    return Packed(
        name=f"{module}.weight",
        method=method,
        format="MXFP4" if micro else "NVFP4",
        shape=(out, columns),
        parts=parts,
        rows=rows,
        unit=1,
        on_output=NoScale(f"the scales are {'powers of two' if micro else '8-bit floats'}"),
        on_input=BY_ROW,
        coded=f"the codes of {'MXFP4' if micro else 'NVFP4'} are small floats",
    )
