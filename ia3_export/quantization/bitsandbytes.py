"""bitsandbytes: NF4, FP4 (plain and doubly quantized) and LLM.int8.

Source: bitsandbytes ``functional.py`` (``QuantState.as_dict``, ``dequantize_4bit``, ``dequantize_blockwise``,
``int8_vectorwise_dequant``), whose float32 results are met to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from math import gcd
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import Computed, StoredTensor, count_elements, read_bytes
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.fold import Array
from ia3_export.quantization.coded import CodedRows, signed_bytes
from ia3_export.quantization.packed import (
    BY_BLOCK,
    BY_ROW,
    NoScale,
    Packed,
    Scales,
    ScaleTensor,
    Side,
    as_float,
    compute,
    expect,
    given,
    read_flat,
    read_rows,
)

METHOD = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"


def find(tensors: Mapping[str, StoredTensor], _: Mapping[str, Any]) -> Iterator[Packed]:
    """The 4-bit and 8-bit weights among `tensors`. Raises `DamagedFile` and `Unsupported`."""
    for name in tensors:
        if _STATE in name:
            yield _four_bit(tensors, *name.split(_STATE))
        elif name.endswith(".SCB"):
            yield _eight_bit(tensors, name.removesuffix(".SCB"))


def _four_bit(tensors: Mapping[str, StoredTensor], name: str, kind: str) -> Packed:
    state_tensor = tensors[f"{name}{_STATE}{kind}"]
    state = _read_state(state_tensor)
    prefix = f"{name}."
    parts = {n: t for n, t in tensors.items() if n == name or n.startswith(prefix)}
    try:
        codes, absmax, table = tensors[name], tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"]
        blocksize, shape = int(state["blocksize"]), tuple(int(n) for n in state["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(state_tensor, f"{error} is missing or not what it should be") from None
    size = count_elements(shape)
    blocksize = min(blocksize, size)
    if len(shape) != 2 or min(shape) < 1 or blocksize < 1 or codes.nbytes != -(-size // 2):
        raise _damaged(
            state_tensor, f"shape {list(shape)} and {codes.nbytes} bytes of codes do not fit together"
        )
    blocks = -(-size // blocksize)
    expect(table, ("F32",), (16,))
    values = read_flat(table, 0, 16)
    nested = "nested_blocksize" in state
    scale = _nested(tensors, name, state, blocks) if nested else _plain(absmax, blocks, shape, blocksize)
    rows = partial(
        _decode_4bit,
        codes,
        np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=1),
        scale,
        shape,
        blocksize,
    )
    on_output: Side = NoScale(f"rows of {shape[1]} elements share blocks of {blocksize}")
    if shape[1] % blocksize == 0:
        takes = (ScaleTensor(scale, shape[1] // blocksize),)
        on_output = _without_nesting(takes, state_tensor, state, name) if nested else Scales(takes)
    return Packed(
        name=name,
        method=METHOD,
        format=f"{kind.upper()}{', doubly quantized' if nested else ''}",
        shape=shape,
        parts={name: codes} | parts,  # the dense weight goes where the codes were
        rows=rows,
        unit=2 // gcd(2, shape[1]),
        on_output=on_output,
        on_input=BY_BLOCK,
        coded=f"the codes of {kind.upper()} are places in a table",
    )


def _without_nesting(
    takes: tuple[ScaleTensor, ...], state_tensor: StoredTensor, state: Mapping[str, Any], name: str
) -> Scales:
    """Scales that are no longer quantized themselves: without what they were quantized by, and a state that
    says so."""
    plain = {key: value for key, value in state.items() if not key.startswith("nested_")}
    rewritten = given(state_tensor, np.frombuffer(json.dumps(plain).encode(), "u1"), "U8")
    return Scales(takes, (f"{name}.nested_absmax", f"{name}.nested_quant_map"), (rewritten,))


def _read_state(tensor: StoredTensor) -> dict[str, Any]:
    if tensor.dtype != "U8" or tensor.nbytes > 1 << 16:
        raise _damaged(tensor, "it is no short JSON text")
    try:
        state = json.loads(read_bytes(tensor))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise _damaged(tensor, "it is not the JSON that bitsandbytes writes")
    return state


def _damaged(tensor: StoredTensor, what: str) -> DamagedFile:
    return DamagedFile(
        f"{tensor.name} in {tensor.file.name}: {what}", hint="quantize or fetch the base again"
    )


def _plain(absmax: StoredTensor, blocks: int, shape: tuple[int, ...], blocksize: int) -> StoredTensor:
    """The blocks' scales, float32. A forward on a CPU with AVX512-BF16 leaves them bfloat16 and
    transposed."""
    if len(absmax.shape) == 1:
        expect(absmax, ("F32",), (blocks,))
        return absmax
    expect(absmax, ("BF16", "F32"), (shape[1] // blocksize, shape[0]))

    def read(first: int, count: int) -> Array:
        stored = as_float(read_flat(absmax, 0, absmax.size), absmax.dtype)
        return np.ascontiguousarray(stored.reshape(absmax.shape).T).reshape(-1)[first : first + count]

    return compute(absmax.name, "F32", (blocks,), absmax, Computed(1, read, "F32"))


def _nested(
    tensors: Mapping[str, StoredTensor], name: str, state: Mapping[str, Any], blocks: int
) -> StoredTensor:
    """The blocks' scales, themselves quantized in blocks: ``map[code] * nested_absmax + offset``."""
    absmax = tensors[f"{name}.absmax"]
    try:
        outer, table = tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"]
        size, offset = int(state["nested_blocksize"]), np.float32(float(state["nested_offset"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(absmax, f"{error} of its double quantization is missing") from None
    if size < 1:
        raise _damaged(absmax, f"its scales lie in blocks of {size}")
    expect(absmax, ("U8",), (blocks,))
    expect(outer, ("F32",), (-(-blocks // size),))
    expect(table, ("F32",), (256,))
    values = read_flat(table, 0, 256)

    def read(first: int, count: int) -> Array:
        begin, end = first // size, -(-(first + count) // size)
        scales = np.repeat(read_flat(outer, begin, end - begin), size)[first - begin * size :][:count]
        found: Array = values[read_flat(absmax, first, count)] * scales + offset
        return found

    return compute(absmax.name, "F32", (blocks,), absmax, Computed(1, read, "F32"))


def _decode_4bit(
    codes: StoredTensor,
    pairs: Array,
    scale: StoredTensor,
    shape: tuple[int, ...],
    blocksize: int,
    first: int,
    count: int,
) -> Array:
    columns = shape[1]
    begin, end = first * columns, (first + count) * columns
    itemsize = codes.nbytes // max(codes.size, 1)
    start, stop = begin // 2, -(-end // 2)
    raw = read_flat(codes, start // itemsize, -(-stop // itemsize) - start // itemsize).view("u1")
    raw = raw[start % itemsize :][: stop - start]
    values = np.take(pairs.view("<u8")[:, 0], raw).view("<f4")[: end - begin]
    block, last = begin // blocksize, -(-end // blocksize)
    scales = as_float(read_flat(scale, block, last - block), scale.dtype)
    if begin % blocksize == 0 and end % blocksize == 0:
        values = values.reshape(-1, blocksize)
        np.multiply(values, scales[:, None], out=values)
    else:
        values = values * np.repeat(scales, blocksize)[begin - block * blocksize :][: end - begin]
    return values.reshape(count, columns)


def _eight_bit(tensors: Mapping[str, StoredTensor], module: str) -> Packed:
    scales = tensors[f"{module}.SCB"]
    codes = tensors.get(f"{module}.weight")
    if codes is None:
        raise _damaged(scales, f"there is no {module}.weight beside it")
    expect(codes, ("I8",), (None, None))
    expect(scales, ("F32",), (codes.shape[0],))
    parts = {codes.name: codes, scales.name: scales}
    order = tensors.get(f"{module}.weight_format")
    if order is not None:
        parts[order.name] = order
        if any(read_bytes(order)[:1]):
            raise Unsupported(
                f"{codes.name} is stored in a tiled layout for one kind of GPU (weight_format)",
                hint="save it again with bitsandbytes 0.46 or newer, which stores rows",
            )

    def rows(first: int, count: int) -> Array:
        values = read_rows(codes, first, count).astype("<f4")
        values *= read_flat(scales, first, count)[:, None]
        values *= np.float32(1 / 127)  # a product, in this order, as the library has it
        return values

    def coded(first: int, count: int) -> CodedRows:
        steps = read_flat(scales, first, count)[:, None] * np.float32(1 / 127)
        return signed_bytes(read_rows(codes, first, count), steps, codes.shape[1])

    return Packed(
        name=codes.name,
        method=METHOD,
        format="LLM.int8",
        shape=codes.shape,
        parts=parts,
        rows=rows,
        unit=1,
        on_output=Scales((ScaleTensor(scales, 1),)),
        on_input=BY_ROW,
        coded=coded,
    )
