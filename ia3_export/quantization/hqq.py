"""HQQ: half-quadratic quantization, groups along either axis.

Source: hqq ``core/quantize.py`` (``Quantizer.dequantize``) and ``core/bitpack.py``: codes form a matrix with
a group a row (axis 1) or a column (axis 0), and each packed element holds codes of rows that lie far apart,
the first in its high bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor, count_elements, read_bytes
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.fold import Array
from ia3_export.quantization.coded import CodedRows, CodeReader
from ia3_export.quantization.packed import (
    BY_ROW,
    SCALE_DTYPES,
    NoScale,
    Packed,
    Scales,
    ScaleTensor,
    Side,
    as_float,
    parts_of,
    read_flat,
)

METHOD = "hqq"
_LEAVES = (
    "W_q", "scale", "zero", "shape", "axis", "group_size", "nbits", "packing", "channel_wise",
    "compute_dtype", "encoded_state_dict", "offload_meta", "optimize", "quant_scale", "quant_zero",
    "round_zero", "stores_quant_config", "unpack_view_dtype", "view_as_float", "meta_scale", "meta_zero",
)  # fmt: skip
#: Codes in a packed element, and bits of the element that hold them, by bits a code
#: (``Quantizer.bit_to_packing``).
_PACKED = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Layout:
    """A weight of `shape` whose codes of `bits` are a matrix in `codes`: along `axis` 1 a line is a group
    with a scale and a zero point, along axis 0 every column is one."""

    codes: StoredTensor
    scale: StoredTensor
    zero: StoredTensor
    bits: int
    axis: int
    shape: tuple[int, int]

    @property
    def group(self) -> int:
        """Codes that share a scale."""
        return count_elements(self.shape) // self.scale.size

    @property
    def lines(self) -> int:
        """Lines of the matrix."""
        return self.scale.size if self.axis == 1 else self.group

    @property
    def length(self) -> int:
        """Codes of a line."""
        return self.group if self.axis == 1 else self.scale.size

    @property
    def itemsize(self) -> int:
        """Bytes of a packed element."""
        return 4 if self.bits == 3 else 1

    def rows(self, first: int, count: int) -> Array:
        """Rows ``first:first+count`` of the dense weight."""
        columns, length = self.shape[1], self.length
        begin, end = first * columns, (first + count) * columns
        line, last = begin // length, -(-end // length)
        values = self._unpack(line, last - line)
        values -= self._factors(self.zero, line, last - line)
        values *= self._factors(self.scale, line, last - line)
        return values.reshape(-1)[begin - line * length :][: end - begin].reshape(count, columns)

    def coded(self, first: int, count: int) -> CodedRows:
        """The codes of these rows, whose groups are whole ones."""
        each = self.shape[1] // self.group
        line, lines = first * each, count * each
        return CodedRows(
            codes=self._unpack(line, lines).astype("u1").reshape(count, -1),
            bits=self.bits,
            scales=self._factors(self.scale, line, lines).reshape(count, -1),
            zeros=self._factors(self.zero, line, lines).reshape(count, -1),
            group=self.group,
        )

    def _unpack(self, first: int, count: int) -> Array:
        """Lines ``first:first+count`` of codes as float32; an element packs codes of lines that lie a `step`
        apart."""
        each = _PACKED[self.bits]
        step = -(-self.lines // each)
        nbytes = self.length * self.itemsize
        stored = self.codes.nbytes // max(self.codes.size, 1)
        values = np.empty((count, self.length), "<f4")
        for part in range(each):
            begin, end = max(first, part * step), min(first + count, (part + 1) * step, self.lines)
            if begin >= end:
                continue
            skip = (begin - part * step) * nbytes
            raw = read_flat(self.codes, skip // stored, (end - begin) * nbytes // stored).view("u1")
            words = raw.view(f"<u{self.itemsize}").reshape(end - begin, self.length)
            shift = self.bits * (each - 1 - part)
            values[begin - first : end - first] = words >> shift & ((1 << self.bits) - 1)
        return values

    def _factors(self, tensor: StoredTensor, first: int, count: int) -> Array:
        """Scales or zero points of lines ``first:first+count``."""
        if self.axis == 1:
            return as_float(read_flat(tensor, first, count), tensor.dtype)[:, None]
        return as_float(read_flat(tensor, 0, tensor.size), tensor.dtype)


def find(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """The HQQ weights among `tensors`. Raises `DamagedFile` and `Unsupported`."""
    for name, codes in tensors.items():
        if name.endswith(".W_q"):
            module = name.removesuffix(".W_q")
            yield _packed(module, codes, parts_of(module, _LEAVES, tensors), settings)


def _packed(
    module: str, codes: StoredTensor, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> Packed:
    _refuse_quantized_scales(module, codes, parts)
    layout = _layout(module, codes, parts, settings)
    on_output, on_input = _sides(layout)
    return Packed(
        name=f"{module}.weight",
        method=METHOD,
        format=f"HQQ {layout.bits} bit, axis {layout.axis}",
        shape=layout.shape,
        parts={codes.name: codes, **parts},
        rows=layout.rows,
        unit=1,
        on_output=on_output,
        on_input=on_input,
        coded=_coded(layout),
    )


def _refuse_quantized_scales(module: str, codes: StoredTensor, parts: Mapping[str, StoredTensor]) -> None:
    flags = [parts.get(f"{module}.{leaf}") for leaf in ("quant_scale", "quant_zero")]
    if any(flag is not None and any(read_bytes(flag)) for flag in flags):
        raise Unsupported(
            f"the scales of {codes.name} are quantized themselves, which this version does not read",
            hint="quantize again with quant_scale and quant_zero off",
        )


def _layout(
    module: str, codes: StoredTensor, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> _Layout:
    try:
        scale, zero, stored_shape = (parts[f"{module}.{leaf}"] for leaf in ("scale", "zero", "shape"))
    except KeyError as error:
        raise DamagedFile(
            f"{codes.file.name} holds {codes.name} without {error}", hint="fetch it again"
        ) from None
    configured = (settings.get("quant_config") or {}).get("weight_quant_params") or {}
    bits, axis = (_number(module, leaf, codes, parts, configured) for leaf in ("nbits", "axis"))
    shape = tuple(int(n) for n in read_flat(stored_shape, 0, stored_shape.size))
    size, groups, each = count_elements(shape), scale.size, _PACKED.get(bits, 0)
    if (
        len(shape) != 2
        or min(shape) < 1
        or not each
        or groups < 1
        or size % groups
        or axis not in (0, 1)
        or zero.size != groups
        or {scale.dtype, zero.dtype} - set(SCALE_DTYPES)
    ):
        raise DamagedFile(
            f"{codes.name}: {bits} bits, axis {axis}, shape {list(shape)} and {groups} scales "
            "do not fit together",
            hint="the file is damaged, or of a variant that this version does not read",
        )
    layout = _Layout(codes=codes, scale=scale, zero=zero, bits=bits, axis=axis, shape=(shape[0], shape[1]))
    if codes.nbytes != -(-layout.lines // each) * layout.length * layout.itemsize:
        raise DamagedFile(
            f"{codes.name} has {codes.nbytes} bytes, which do not hold {size} codes", hint="fetch it again"
        )
    return layout


def _number(
    module: str,
    leaf: str,
    codes: StoredTensor,
    parts: Mapping[str, StoredTensor],
    configured: Mapping[str, Any],
) -> int:
    """A number that lies beside the codes, or else in the configuration."""
    stored = parts.get(f"{module}.{leaf}")
    value = int.from_bytes(read_bytes(stored), "little") if stored is not None else configured.get(leaf)
    if not isinstance(value, int):
        raise DamagedFile(
            f"{module}.{leaf} is neither in {codes.file.name} nor in the configuration", hint="fetch it again"
        )
    return value


def _coded(layout: _Layout) -> CodeReader | str:
    if layout.axis == 0:
        return "its groups run down the rows"
    if layout.shape[1] % layout.group:
        return f"rows of {layout.shape[1]} elements share groups of {layout.group}"
    return layout.coded


def _sides(layout: _Layout) -> tuple[Side, Side]:
    """What takes vectors on the output, and on the input."""
    (out, columns), group = layout.shape, layout.group
    if layout.axis == 1:
        if columns % group:
            return NoScale(f"rows of {columns} elements share groups of {group}"), BY_ROW
        return Scales((ScaleTensor(layout.scale, columns // group),)), BY_ROW
    down = NoScale("groups run down the rows")
    if layout.scale.size % columns:
        return down, NoScale(f"columns of {out} elements share groups of {group}")
    return down, Scales((ScaleTensor(layout.scale, 1),))
