"""GGUF: llama.cpp's blocks of codes, whose scales are float16 numbers inside the blocks.

Blocks never cross rows, and a weight is linear in its block's d (and m or dmin): an output vector multiplies
those, each rounded once to float16, and no code is touched. Layouts: ggml ``ggml-common.h`` (``block_q4_K``
and so on); values: ``gguf.quants.dequantize``. In files of the permuted architectures
(`ia3_export.checkpoint.gguf_models`) the rows of q and k lie in rotary pairs; the dense view has Hugging
Face's order, and vectors are permuted like the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint.gguf import read_gguf
from ia3_export.checkpoint.header import Computed, StoredTensor
from ia3_export.errors import DamagedFile, NotFinite, Unsupported
from ia3_export.fold import FLOAT_DTYPES, Array, from_float
from ia3_export.quantization.coded import CodedRows, CodeReader, take_rows
from ia3_export.quantization.gguf_codes import CODED, read_coded
from ia3_export.quantization.packed import (
    BY_BLOCK,
    ROUNDING,
    BlockScales,
    NoScale,
    Packed,
    RowReader,
    Side,
    as_float,
    compute,
    read_flat,
    read_rows,
)

METHOD = "gguf"

#: Byte offsets of the float16 scales of a block, by ggml type.
SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ1_S": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
_UNFOLDABLE = {
    "MXFP4": "MXFP4 scales are powers of two",
    "NVFP4": "NVFP4 scales are 8-bit floats",
    "IQ1_M": "IQ1_M scatters its scale over the bits of four words",
}
#: Rows that are decoded to measure what a fold loses: as many of those whose scales lose most, and of all
#: others.
_MEASURED = 32
#: Bytes of blocks that are in memory at a time.
_BYTES = 1 << 24


def find(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[Packed]:
    """The coded tensors of a GGUF file, and those whose rows are permuted. Raises `DamagedFile`."""
    if settings.get("quant_method") != METHOD:
        return
    types, heads = settings["types"], settings["head_rows"]
    for name in dict.fromkeys((*types, *heads)):
        tensor, rows = tensors[name], heads.get(name, 1)
        if name in types:
            yield _coded(tensor, types[name], rows)
        elif tensor.dtype in FLOAT_DTYPES:
            yield _permuted(tensor, rows)
    for name in settings.get("shifted") or ():
        yield _shifted(tensors[name])


def reload_weights(path: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """Every float or coded tensor of a GGUF file as the gguf package reads it: float32, under its Hugging
    Face name and in that row order. The package's reader holds the tokenizer as one array a token, 520 MB of
    them for Llama 3's.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    heads, shifted = settings.get("head_rows") or {}, settings.get("shifted") or ()
    names = {tensor.offset: tensor.name for tensor in read_gguf(path)[0].tensors}
    for tensor in GGUFReader(path).tensors:
        name = names[tensor.data_offset]
        try:
            with np.errstate(all="ignore"):
                values = np.asarray(dequantize(np.asarray(tensor.data), tensor.tensor_type), "<f4")
        except NotImplementedError:  # integers, and types that it only knows by name
            continue
        if name in heads:
            values = _unpermute(values.reshape(len(values), -1), heads[name]).reshape(values.shape)
        yield name, values - np.float32(1) if name in shifted else values


def head_order(rows: int, head: int) -> Array:
    """For every row of the file the row of the dense weight that it is (llama.cpp's
    ``LlamaModel.permute``)."""
    return np.arange(rows).reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(-1)


def _coded(tensor: StoredTensor, kind: str, head: int) -> Packed:
    block, nbytes = _sizes(kind)
    rows, width = tensor.shape
    if width % nbytes:
        raise DamagedFile(f"{tensor.name} in {tensor.file.name} has rows of {width} bytes for {kind} blocks")
    shape = (rows, width // nbytes * block)
    on_output: Side = NoScale(_UNFOLDABLE.get(kind, f"{kind} has no known scale"))
    if kind in SCALES:
        fold = partial(_scale_blocks, tensor, SCALES[kind], nbytes, head)
        on_output = BlockScales(fold, partial(_measure_blocks, tensor, kind, head, fold))
    read = partial(_decode, tensor, kind)
    found = _packed(tensor, f"GGUF {kind}", shape, read, head, on_output, BY_BLOCK)
    coded: CodeReader | str = f"the codes of {kind} are not evenly spaced"
    if kind in CODED and len(shape) == 2:
        coded = partial(_read_codes, tensor, kind, nbytes, head)
    return replace(found, coded=coded)


def _read_codes(tensor: StoredTensor, kind: str, nbytes: int, head: int, first: int, count: int) -> CodedRows:
    raw = read_rows(tensor, first, count)
    coded = read_coded(raw, kind, nbytes, lambda changed: _dequantize(tensor, changed, kind))
    # the inverse of `head_order`: which row of the file a dense row is
    return coded if head == 1 else take_rows(coded, np.argsort(head_order(count, head)))


def _permuted(tensor: StoredTensor, head: int) -> Packed:
    """A weight or bias that is dense, its rows in the file's order."""
    shape = tensor.shape
    columns = shape[1] if len(shape) == 2 else 1

    def read(first: int, count: int) -> Array:
        raw = read_flat(tensor, first * columns, count * columns)
        return as_float(raw, tensor.dtype).reshape(count, columns)

    rounding = ROUNDING.get(tensor.dtype, 0.0)
    on_output = BlockScales(partial(_scale_floats, tensor, columns, head), lambda _: rounding)
    on_input = NoScale("its rows are permuted for llama.cpp")
    found = _packed(tensor, f"GGUF {tensor.dtype}", shape, read, head, on_output, on_input)
    return replace(found, coded=f"the base holds it as {tensor.dtype}")


def _shifted(tensor: StoredTensor) -> Packed:
    """A norm that llama.cpp's converter stores plus one (Gemma)."""

    def read(first: int, count: int) -> Array:
        return as_float(read_flat(tensor, first, count), tensor.dtype).reshape(count, 1) - np.float32(1)

    neither = NoScale("its norm is stored plus one")
    return _packed(tensor, f"GGUF {tensor.dtype}, plus one", tensor.shape, read, 1, neither, neither)


def _packed(
    tensor: StoredTensor,
    label: str,
    shape: tuple[int, ...],
    read: RowReader,
    head: int,
    on_output: Side,
    on_input: NoScale,
) -> Packed:
    """`read` gives rows in the file's order, float32."""

    def rows(first: int, count: int) -> Array:
        if len(shape) == 1:
            found = read(0, shape[0])
            return (found if head == 1 else _unpermute(found, head)).reshape(1, -1)
        found = read(first, count)
        return found if head == 1 else _unpermute(found, head)

    return Packed(
        name=tensor.name,
        method=METHOD,
        format=label,
        shape=shape,
        parts={tensor.name: tensor},
        rows=rows,
        unit=head if len(shape) == 2 else 1,
        on_output=on_output,
        on_input=on_input,
    )


def _unpermute(rows: Array, head: int) -> Array:
    columns = rows.shape[1]
    return rows.reshape(-1, head // 2, 2, columns).swapaxes(1, 2).reshape(-1, columns)


def _sizes(kind: str) -> tuple[int, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def _decode(tensor: StoredTensor, kind: str, first: int, count: int) -> Array:
    return _dequantize(tensor, read_rows(tensor, first, count), kind)


def _dequantize(tensor: StoredTensor, raw: Array, kind: str) -> Array:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        try:
            found = dequantize(raw, GGMLQuantizationType[kind])
        except NotImplementedError:
            raise Unsupported(
                f"{tensor.name} is {kind}, which the gguf package cannot dequantize",
                hint="install a newer gguf package",
            ) from None
    return np.asarray(found, "<f4")


def _in_file_order(factors: Array, head: int) -> Array:
    return factors if head == 1 else factors[head_order(len(factors), head)]


def _scale_blocks(
    tensor: StoredTensor, offsets: tuple[int, ...], nbytes: int, head: int, factors: Array
) -> StoredTensor:
    """`tensor` with the scales of every row's blocks times the row's factor."""
    width = tensor.shape[1]
    laid = _in_file_order(factors, head).astype("<f4")

    def read(first: int, count: int) -> Array:
        start, rows = first // width, count // width
        raw = np.array(read_rows(tensor, start, rows))
        blocks = raw.reshape(rows, width // nbytes, nbytes)
        for at in offsets:
            scales = np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0]
            with np.errstate(all="ignore"):
                scaled = (scales.astype("<f4") * laid[start : start + rows, None]).astype("<f2")
            _check_finite(tensor, scaled, start)
            blocks[:, :, at : at + 2] = scaled[:, :, None].view("u1")
        return raw.reshape(-1)

    return compute(tensor.name, tensor.dtype, tensor.shape, tensor, Computed(width, read, tensor.dtype))


def _measure_blocks(
    tensor: StoredTensor, kind: str, head: int, fold: Callable[[Array], StoredTensor], factors: Array
) -> float:
    """The relative error (Frobenius norm) of the row that loses most when `fold` folds `factors` in.

    A scale below 6e-5 is subnormal and has fewer bits, as most of Q6_K's are and as small factors make
    others; of two scales the errors do not cancel as the values do.
    """
    laid, folded = _in_file_order(factors, head).astype("<f4"), fold(factors)
    losses = _scale_losses(tensor, SCALES[kind], _sizes(kind)[1], laid)
    worst = np.argsort(losses)[-_MEASURED:]
    spread = np.linspace(0, len(losses) - 1, min(_MEASURED, len(losses))).astype(int)
    largest = 0.0
    for row in sorted({*worst.tolist(), *spread.tolist()}):
        wanted = _decode(tensor, kind, row, 1).astype("<f8") * laid[row]
        norm = np.linalg.norm(wanted)
        if norm:
            largest = max(
                largest, float(np.linalg.norm(_decode(folded, kind, row, 1).astype("<f8") - wanted) / norm)
            )
    return largest


def _scale_losses(tensor: StoredTensor, offsets: tuple[int, ...], nbytes: int, laid: Array) -> Array:
    """The largest relative error of every row's scales, in the file's order."""
    rows, width = tensor.shape
    losses = np.zeros(rows)
    step = max(_BYTES // max(width, 1), 1)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = read_rows(tensor, start, count).reshape(count, width // nbytes, nbytes)
        for at in offsets:
            scales = np.ascontiguousarray(raw[:, :, at : at + 2]).view("<f2")[:, :, 0]
            with np.errstate(all="ignore"):
                exact = scales.astype("<f4") * laid[start : start + count, None]
                lost = np.abs(exact.astype("<f2").astype("<f4") / exact - 1)
            found = np.where(np.isfinite(lost), lost, 0).max(axis=1, initial=0.0)
            losses[start : start + count] = np.maximum(losses[start : start + count], found)
    return losses


def _scale_floats(tensor: StoredTensor, columns: int, head: int, factors: Array) -> StoredTensor:
    laid = _in_file_order(factors, head).astype("<f4")

    def read(first: int, count: int) -> Array:
        start, rows = first // columns, count // columns
        values = as_float(read_flat(tensor, first, count), tensor.dtype).reshape(rows, columns)
        with np.errstate(all="ignore"):
            scaled = values * laid[start : start + rows, None]
        _check_finite(tensor, scaled, start)
        return from_float(scaled.reshape(-1), tensor.dtype)

    return compute(tensor.name, tensor.dtype, tensor.shape, tensor, Computed(columns, read, tensor.dtype))


def _check_finite(tensor: StoredTensor, scaled: Array, first: int) -> None:
    bad = ~np.isfinite(scaled).all(axis=1)
    if bad.any():
        raise NotFinite(
            f"{tensor.name}, row {first + int(np.argmax(bad))} of the file, is NaN or infinite after "
            "the fold",
            hint="the vector is too large for this file's scales, or the base is damaged",
        )
