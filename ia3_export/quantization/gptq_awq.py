"""GPTQ and AWQ: packed integers with scales and zero points by group.

Sources: GPTQModel ``gptqmodel/utils/model_dequant.py`` and ``utils/model.py`` (versions of the zero points),
AutoAWQ ``awq/modules/linear/gemm.py`` and ``gemv.py``. Weights are (codes - zeros) * scales in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.fold import Array
from ia3_export.quantization.coded import CodedRows, CodeReader, in_groups
from ia3_export.quantization.codes import dequantize_groups, unpack, unpack_planes
from ia3_export.quantization.packed import (
    SCALE_DTYPES,
    NoScale,
    Packed,
    RowReader,
    Scales,
    ScaleTensor,
    as_float,
    expect,
    group_columns,
    parts_of,
    read_columns,
    read_flat,
    read_rows,
)

_UNREADABLE = ("marlin", "gemv_fast", "llm-awq", "exllama", "machete", "bitblas", "qqq", "ipex")
#: Columns of a dense weight that lie behind the nibbles of one word, lowest first (AWQ GEMM).
_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ON_INPUT = NoScale("every scale belongs to a row and a group of columns")
_WORDS = ("I32", "U32")


@dataclass(frozen=True, slots=True, eq=False)
class _Tensors:
    """The tensors of one weight; `parts` are all of them by name."""

    module: str
    codes: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    parts: Mapping[str, StoredTensor]


def find(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """The GPTQ and AWQ weights among `tensors`. Raises `DamagedFile` and `Unsupported`."""
    for name, codes in tensors.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        _refuse_variants(settings, codes)
        parts = parts_of(module, ("qweight", "qzeros", "scales", "g_idx"), tensors)
        for leaf in ("qzeros", "scales"):
            if f"{module}.{leaf}" not in parts:
                raise DamagedFile(
                    f"{codes.file.name} holds {name} without {module}.{leaf}",
                    hint="quantize or fetch the base again",
                )
        zeros, scales = parts[f"{module}.qzeros"], parts[f"{module}.scales"]
        expect(codes, _WORDS, (None, None))
        expect(zeros, _WORDS, (None, None))
        expect(scales, SCALE_DTYPES, (None, None))
        weight = _Tensors(module, codes, zeros, scales, parts)
        if _is_gptq(codes, scales, settings):
            yield _gptq(weight, settings)
        elif codes.shape[1] * 8 == scales.shape[1]:
            yield _gemm(weight, settings)
        elif codes.shape[0] == scales.shape[0] == zeros.shape[0]:
            yield _gemv(weight, settings)
        else:
            raise DamagedFile(
                f"{name} {list(codes.shape)}, its zero points {list(zeros.shape)} and scales "
                f"{list(scales.shape)} fit neither GPTQ nor AWQ",
                hint="the file is damaged, or of a variant that this version does not read",
            )


def _refuse_variants(settings: Mapping[str, Any], codes: StoredTensor) -> None:
    labels = [settings.get(key) for key in ("checkpoint_format", "version", "format", "packing_format")]
    found = next((label for label in labels if str(label).lower() in _UNREADABLE), None)
    if found is not None or codes.dtype == "I16":
        raise Unsupported(
            f"{codes.name} is packed for the kernels of {found or 'gemv_fast'}, which this "
            "version does not read",
            hint="give the checkpoint in GPTQ (v1, v2) or AWQ (gemm, gemv) packing",
        )


def _is_gptq(codes: StoredTensor, scales: StoredTensor, settings: Mapping[str, Any]) -> bool:
    if codes.shape[1] != scales.shape[1]:
        return False
    label = f"{settings.get('quant_method', '')} {settings.get('packing_format', '')}".lower()
    return "awq" not in label or codes.shape[0] != scales.shape[0]


def _gptq(weight: _Tensors, settings: Mapping[str, Any]) -> Packed:
    codes, zeros = weight.codes, weight.zeros
    groups, out = weight.scales.shape
    bits = zeros.shape[1] * 32 // max(out, 1)
    planar = settings.get("checkpoint_format") == "gptq_p"
    if bits not in (range(2, 9) if planar else (2, 3, 4, 8)) or codes.shape[0] * 32 % bits:
        raise Unsupported(
            f"{codes.name} looks like GPTQ of {bits} bits, which this version does not read",
            hint="2, 3, 4 and 8 bits are read",
        )
    columns = codes.shape[0] * 32 // bits
    expect(zeros, _WORDS, (groups, out * bits // 32))
    group = _column_groups(weight, columns, settings)
    ordered = bool((np.diff(group) >= 0).all())
    offset, note = _zero_offset(zeros, bits, settings)
    layout = _Gptq(weight, bits, unpack_planes if planar else unpack, group, offset)
    return Packed(
        name=f"{weight.module}.weight",
        method="gptq",
        format=f"GPTQ {bits} bit{', planar' if planar else ''}{'' if ordered else ', act-order'}{note}",
        shape=(out, columns),
        parts=weight.parts,
        rows=layout.rows,
        unit=32,
        on_output=Scales((ScaleTensor(weight.scales, 1),)),
        on_input=_ON_INPUT,
        mislabelled=bool(note),
        coded=layout.coded,
    )


def _column_groups(weight: _Tensors, columns: int, settings: Mapping[str, Any]) -> Array:
    """The group of every column, as stored or by the even division."""
    groups = weight.scales.shape[0]
    g_idx = weight.parts.get(f"{weight.module}.g_idx")
    if g_idx is None:
        sizes = [settings.get("group_size"), settings.get("q_group_size")]
        # GPTQModel's `dynamic` gives modules sizes of their own
        strict = "dynamic" not in settings
        return np.arange(columns) // group_columns(weight.scales, columns, groups, sizes, strict=strict)
    expect(g_idx, ("I32", "I64"), (columns,))
    group = read_flat(g_idx, 0, columns).astype("<i8")
    if len(group) and (group.min() < 0 or group.max() >= groups):
        raise DamagedFile(
            f"{g_idx.name} names a group beyond {groups}", hint="quantize or fetch the base again"
        )
    return group


def _zero_offset(zeros: StoredTensor, bits: int, settings: Mapping[str, Any]) -> tuple[int, str]:
    """What is added to stored zero points: 1 in version 1 of the format, 0 in version 2.

    Labels are wrong in published files; where all zeros are one constant (symmetric) the constant tells.
    """
    label = str(settings.get("checkpoint_format", "gptq"))
    as_they_are = label in ("gptq_v2", "gptq_p") or settings.get("packing_format") == "auto_round"
    by_label = 0 if as_they_are else 1
    if settings.get("sym", True) and label != "gptq_p":
        sample = unpack(read_rows(zeros, 0, min(zeros.shape[0], 64)), bits, zeros.shape[1] * 32 // bits)
        middle = 1 << (bits - 1)
        if len(values := np.unique(sample)) == 1 and values[0] in (middle, middle - 1):
            by_value = 0 if values[0] == middle else 1
            if by_value != by_label:
                return by_value, f", version {2 - by_value} although labelled {label}"
            return by_value, ""
    return by_label, ""


@dataclass(frozen=True, slots=True, eq=False)
class _Gptq:
    """Codes and zero points of `bits` that `take` unpacks, the `group` of every column, and what the writer
    subtracted from the zero points (`offset`: 1 in version 1)."""

    weight: _Tensors
    bits: int
    take: Callable[[Array, int, int], Array]
    group: Array
    offset: int

    def rows(self, first: int, count: int) -> Array:
        """Rows ``first:first+count`` of the dense weight; `first` is a multiple of 32."""
        codes, zeros, scales = self._read(first, count)
        return dequantize_groups(codes.astype("<f4"), zeros, scales, self.group)

    def coded(self, first: int, count: int) -> CodedRows:
        """The codes of these rows."""
        codes, zeros, scales = self._read(first, count)
        return in_groups(codes, self.bits, zeros, scales, self.group)

    def _read(self, first: int, count: int) -> tuple[Array, Array, Array]:
        """Codes (count, columns), zero points and scales (count, groups)."""
        words = np.ascontiguousarray(read_columns(self.weight.codes, first, count).T)
        codes = self.take(words, self.bits, len(self.group))
        # 32 zero points fill whole words in every width
        packed = read_columns(self.weight.zeros, first * self.bits // 32, -(-count * self.bits // 32))
        zeros = self._zero_points(packed, count).T.astype("<f4")
        return codes, zeros, _transposed(self.weight.scales, first, count)

    def _zero_points(self, packed: Array, count: int) -> Array:
        """Zero points (groups, count). The writers of version 1 subtract one from each with whole words, so
        that a zero borrows from its neighbour; adding one the same way gives it back. Words of 3 bits are
        shifted code by code."""
        if 32 % self.bits:
            mask = np.uint8((1 << self.bits) - 1)
            return (self.take(packed, self.bits, count) + np.uint8(self.offset)) & mask
        ones = sum(self.offset << shift for shift in range(0, 32, self.bits))
        return self.take(packed.view("<u4") + np.uint32(ones), self.bits, count)


def _transposed(scales: StoredTensor, first: int, count: int) -> Array:
    """Scales (groups, out) of rows ``first:first+count``, as (count, groups)."""
    return as_float(read_columns(scales, first, count), scales.dtype).T


def _gemm(weight: _Tensors, settings: Mapping[str, Any]) -> Packed:
    columns, (groups, out) = weight.codes.shape[0], weight.scales.shape
    expect(weight.zeros, _WORDS, (groups, out // 8))
    size = group_columns(weight.scales, columns, groups, [settings.get("group_size")], strict=True)
    group = np.arange(columns) // size

    def read(first: int, count: int) -> tuple[Array, Array, Array]:
        def nibbles(packed: StoredTensor) -> Array:
            words = read_columns(packed, first // 8, -(-count // 8))
            found = unpack(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
            return found[..., np.argsort(_GEMM_ORDER)].reshape(len(words), -1)

        codes = np.ascontiguousarray(nibbles(weight.codes).T)
        return codes, nibbles(weight.zeros).T.astype("<f4"), _transposed(weight.scales, first, count)

    rows, coded = _readers(read, group)

    return Packed(
        name=f"{weight.module}.weight",
        method="awq",
        format="AWQ GEMM 4 bit",
        shape=(out, columns),
        parts=weight.parts,
        rows=rows,
        unit=8,
        on_output=Scales((ScaleTensor(weight.scales, 1),)),
        on_input=_ON_INPUT,
        coded=coded,
    )


def _readers(
    read: Callable[[int, int], tuple[Array, Array, Array]], group: Array
) -> tuple[RowReader, CodeReader]:
    """What reads rows of a weight, and their codes, from what `read` gives: 4-bit codes, zero points,
    scales."""

    def rows(first: int, count: int) -> Array:
        codes, zeros, scales = read(first, count)
        return dequantize_groups(codes.astype("<f4"), zeros, scales, group)

    def coded(first: int, count: int) -> CodedRows:
        codes, zeros, scales = read(first, count)
        return in_groups(codes, 4, zeros, scales, group)

    return rows, coded


def _gemv(weight: _Tensors, settings: Mapping[str, Any]) -> Packed:
    codes, zeros, scales = weight.codes, weight.zeros, weight.scales
    out, columns = codes.shape[0], codes.shape[1] * 8
    size = settings.get("group_size", settings.get("q_group_size"))
    if (
        not isinstance(size, int)
        or size <= 0
        or columns % size
        or columns // size > min(scales.shape[1], 8 * zeros.shape[1])
    ):
        raise DamagedFile(
            f"{codes.name} is AWQ GEMV, whose group size ({size!r}) the configuration must state",
            hint="config.json or quant_config.json belongs to another checkpoint; fetch the folder again",
        )
    groups, group = columns // size, np.arange(columns) // size

    def read(first: int, count: int) -> tuple[Array, Array, Array]:
        values = unpack(read_rows(codes, first, count), 4, columns)
        zero = unpack(read_rows(zeros, first, count), 4, groups).astype("<f4")
        return values, zero, as_float(read_rows(scales, first, count)[:, :groups], scales.dtype)

    rows, coded = _readers(read, group)

    return Packed(
        name=f"{weight.module}.weight",
        method="awq",
        format="AWQ GEMV 4 bit",
        shape=(out, columns),
        parts=weight.parts,
        rows=rows,
        unit=1,
        on_output=Scales((ScaleTensor(scales, scales.shape[1]),)),
        on_input=_ON_INPUT,
        coded=coded,
    )


#: AWQ divides the activations of a feed-forward without a gate: the tensor that does, and what it feeds.
_SCALED_ACTIVATIONS = (".act.scales", ".gelu_impl.scales")
_FED = ("dense_4h_to_h", "fc_out", "down_proj", "c_proj", "fc2")


def scale_activations(
    packed: Mapping[str, Packed], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Packed]]:
    """`packed` with AWQ's activation scales (transformers ``integrations/awq.py``) in the weights that they
    feed.

    The file divides the activation; a dense weight has its columns divided instead. An input vector folds
    into them. Raises `DamagedFile` for scales that feed nothing.
    """
    found = {name: tensor for name, tensor in tensors.items() if name.endswith(_SCALED_ACTIVATIONS)}
    fed: dict[str, StoredTensor] = {}
    for name, scales in found.items():
        parent = name.rsplit(".", 2)[0]
        names = [f"{parent}.{leaf}.weight" for leaf in _FED]
        target = next((n for n in names if n in packed and packed[n].shape[1:] == scales.shape), None)
        if target is None:
            raise DamagedFile(
                f"{name} divides the input of no quantized weight that this version knows",
                hint="report the model's type, or give the unquantized checkpoint",
            )
        fed[target] = scales
    for name, weight in packed.items():
        yield name, _divided(weight, fed[name]) if name in fed else weight


def _divided(weight: Packed, scales: StoredTensor) -> Packed:
    def rows(first: int, count: int) -> Array:
        values = weight.rows(first, count)
        return values / as_float(read_flat(scales, 0, scales.size), scales.dtype)

    return replace(
        weight,
        rows=rows,
        parts={**weight.parts, scales.name: scales},
        format=f"{weight.format}, scaled activations",
        on_input=Scales((ScaleTensor(scales, 1, divides=True),)),
        coded="each column is divided by a scale of its activation",
    )
