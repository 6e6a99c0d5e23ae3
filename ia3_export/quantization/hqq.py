"""HQQ: half-quadratic quantization, groups along either axis.

Source: hqq ``core/quantize.py`` (``Quantizer.dequantize``) and ``core/bitpack.py``: codes form a matrix with a group a row
(axis 1) or a column (axis 0), and each packed element holds codes of rows that lie far apart, the first in its high bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor, count_elements, read_bytes
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.fold import Array
from ia3_export.quantization.packed import Foldable, Packed, ScaleTensor, as_float, read_flat

METHOD = "hqq"
_LEAVES = (
    "W_q", "scale", "zero", "shape", "axis", "group_size", "nbits", "packing", "channel_wise", "compute_dtype",
    "encoded_state_dict", "offload_meta", "optimize", "quant_scale", "quant_zero", "round_zero", "stores_quant_config",
    "unpack_view_dtype", "view_as_float", "meta_scale", "meta_zero",
)  # fmt: skip
#: Codes in a packed element, and bits of the element that hold them, by bits a code (``Quantizer.bit_to_packing``).
_PACKED = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, eq=False)
class _Codes:
    """The matrix of codes: `lines` of `length` codes of `bits`, packed in `stored`."""

    stored: StoredTensor
    bits: int
    lines: int
    length: int

    def read(self, first: int, count: int) -> Array:
        """Lines ``first:first+count`` as float32."""
        each = _PACKED[self.bits]
        step = -(-self.lines // each)
        wide = self.bits == 3
        nbytes = self.length * (4 if wide else 1)
        itemsize = self.stored.nbytes // max(self.stored.size, 1)
        values = np.empty((count, self.length), "<f4")
        for part in range(each):
            begin, end = max(first, part * step), min(first + count, (part + 1) * step, self.lines)
            if begin >= end:
                continue
            skip = (begin - part * step) * nbytes
            raw = read_flat(self.stored, skip // itemsize, (end - begin) * nbytes // itemsize).view("u1")
            words = raw.view("<u4" if wide else "u1").reshape(end - begin, self.length)
            shift = self.bits * (each - 1 - part)
            values[begin - first : end - first] = words >> shift & ((1 << self.bits) - 1)
        return values


def find(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """The HQQ weights among `tensors`. Raises `DamagedFile` and `Unsupported`."""
    for name, codes in tensors.items():
        if name.endswith(".W_q"):
            yield _packed(tensors, codes, name.removesuffix(".W_q"), settings)


def _packed(
    tensors: Mapping[str, StoredTensor], codes: StoredTensor, module: str, settings: Mapping[str, Any]
) -> Packed:
    parts = {
        f"{module}.{leaf}": tensors[f"{module}.{leaf}"] for leaf in _LEAVES if f"{module}.{leaf}" in tensors
    }
    configured = (settings.get("quant_config") or {}).get("weight_quant_params") or {}

    def number(leaf: str) -> int:
        stored = parts.get(f"{module}.{leaf}")
        value = int.from_bytes(read_bytes(stored), "little") if stored is not None else configured.get(leaf)
        if not isinstance(value, int):
            raise DamagedFile(
                f"{module}.{leaf} is neither in {codes.file.name} nor in the configuration",
                hint="fetch it again",
            )
        return value

    if any(
        f"{module}.{leaf}" in parts and any(read_bytes(parts[f"{module}.{leaf}"]))
        for leaf in ("quant_scale", "quant_zero")
    ):
        raise Unsupported(
            f"the scales of {codes.name} are quantized themselves, which this version does not read",
            hint="quantize again with quant_scale and quant_zero off",
        )
    try:
        scale, zero, shape_tensor = (parts[f"{module}.{leaf}"] for leaf in ("scale", "zero", "shape"))
    except KeyError as error:
        raise DamagedFile(
            f"{codes.file.name} holds {codes.name} without {error}", hint="fetch it again"
        ) from None
    bits, axis = number("nbits"), number("axis")
    shape = tuple(int(n) for n in read_flat(shape_tensor, 0, shape_tensor.size))
    size, groups = count_elements(shape), scale.size
    step = _PACKED.get(bits, 0)
    if (
        len(shape) != 2
        or min(shape) < 1
        or not step
        or groups < 1
        or size % groups
        or axis not in (0, 1)
        or zero.size != groups
        or {scale.dtype, zero.dtype} - set(_FLOATS)
    ):
        raise DamagedFile(
            f"{codes.name}: {bits} bits, axis {axis}, shape {list(shape)} and {groups} scales do not fit together",
            hint="the file is damaged, or of a variant that this version does not read",
        )
    group = size // groups
    lines, length = (groups, group) if axis == 1 else (group, groups)
    matrix = _Codes(codes, bits, lines, length)
    if codes.nbytes != -(-lines // step) * length * (4 if bits == 3 else 1):
        raise DamagedFile(
            f"{codes.name} has {codes.nbytes} bytes, which do not hold {size} codes", hint="fetch it again"
        )
    out, columns = shape

    def factors(tensor: StoredTensor, first: int, count: int) -> Array:
        if axis == 1:
            return as_float(read_flat(tensor, first, count), tensor.dtype)[:, None]
        return as_float(read_flat(tensor, 0, groups), tensor.dtype)

    def rows(first: int, count: int) -> Array:
        begin, end = first * columns, (first + count) * columns
        line, last = begin // length, -(-end // length)
        values = matrix.read(line, last - line)
        values -= factors(zero, line, last - line)
        values *= factors(scale, line, last - line)
        return values.reshape(-1)[begin - line * length :][: end - begin].reshape(count, columns)

    on_output: Foldable | str = "groups run down the rows"
    on_input: Foldable | str = "every scale belongs to a row"
    if axis == 1 and columns % group == 0:
        on_output = Foldable((ScaleTensor(scale, columns // group),))
    elif axis == 1:
        on_output = f"rows of {columns} elements share groups of {group}"
    elif groups % columns == 0:
        on_input = Foldable((ScaleTensor(scale, 1),))
    else:
        on_input = f"columns of {out} elements share groups of {group}"
    return Packed(
        f"{module}.weight", METHOD, f"HQQ {bits} bit, axis {axis}", (out, columns), {codes.name: codes} | parts, rows, 1,
        on_output, on_input,
    )  # fmt: skip
