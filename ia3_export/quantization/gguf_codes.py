"""The codes and scales inside ggml's blocks, found with the gguf package's own dequantizer.

A block is linear in its codes. With scales of 1 and minima of 0 it dequantizes to the codes; with codes that
all stand for 1, to the scales; with codes of 0, to the offsets. So the one place that knows how a block packs
its bits is ``gguf.quants``; which bytes hold what says ggml's ``ggml-common.h`` (``block_q4_K`` and so on).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ia3_export.fold import Array
from ia3_export.quantization.coded import CodedRows

_ONE, _ZERO = np.float16(1).tobytes(), np.float16(0).tobytes()
#: Six-bit scales of 1 and minima of 0 (``get_scale_min_k4``).
_K4_ONES = b"\1\1\1\1\0\0\0\0\1\1\1\1"


@dataclass(frozen=True, slots=True)
class _Block:
    """A type of block: the code that stands for 0, and how many share a scale. What is written at which
    offset to make scales 1 (`plain`), codes 1 (`ones`) and, where there are offsets, codes 0 (`zeros`)."""

    zero: int
    group: int
    plain: Mapping[int, bytes]
    ones: Mapping[int, bytes]
    zeros: Mapping[int, bytes] | None = None


_BLOCKS = {
    "Q4_0": _Block(8, 32, {0: _ONE}, {2: b"\x99" * 16}),
    "Q5_0": _Block(16, 32, {0: _ONE}, {2: b"\xff" * 4 + b"\x11" * 16}),
    "Q8_0": _Block(128, 32, {0: _ONE}, {2: b"\1" * 32}),
    "Q4_1": _Block(0, 32, {0: _ONE + _ZERO}, {2: _ZERO + b"\x11" * 16}, {4: bytes(16)}),
    "Q5_1": _Block(0, 32, {0: _ONE + _ZERO}, {2: _ZERO + bytes(4) + b"\x11" * 16}, {4: bytes(20)}),
    "Q2_K": _Block(0, 16, {0: b"\1" * 16, 80: _ONE + _ZERO}, {16: b"\x55" * 64, 82: _ZERO}, {16: bytes(64)}),
    "Q3_K": _Block(4, 16, {96: b"\x11" * 8 + b"\xaa" * 4 + _ONE}, {0: b"\xff" * 32 + b"\x55" * 64}),
    "Q4_K": _Block(0, 32, {0: _ONE + _ZERO + _K4_ONES}, {2: _ZERO, 16: b"\x11" * 128}, {16: bytes(128)}),
    "Q5_K": _Block(
        0, 32, {0: _ONE + _ZERO + _K4_ONES}, {2: _ZERO, 16: bytes(32) + b"\x11" * 128}, {16: bytes(160)}
    ),
    "Q6_K": _Block(32, 16, {192: b"\1" * 16 + _ONE}, {0: b"\x11" * 128 + b"\xaa" * 64}),
}  # fmt: skip

#: The types that are read.
CODED = frozenset(_BLOCKS)


def read_coded(raw: Array, kind: str, nbytes: int, decode: Callable[[Array], Array]) -> CodedRows:
    """The codes in rows of bytes `raw`, uint8 (rows, width) in blocks of `nbytes` of the type `kind`, which
    `decode` dequantizes to float32."""
    block = _BLOCKS[kind]

    def written(parts: Mapping[int, bytes]) -> Array:
        changed = raw.reshape(len(raw), -1, nbytes).copy()
        for at, data in parts.items():
            changed[:, :, at : at + len(data)] = np.frombuffer(data, "u1")
        return decode(changed.reshape(raw.shape))

    codes = (written(block.plain) + np.float32(block.zero)).astype("u1")
    scales = np.ascontiguousarray(written(block.ones)[:, :: block.group])
    offsets = None
    if block.zeros is not None:
        offsets = np.ascontiguousarray(written(block.zeros)[:, :: block.group])
    zeros = np.full_like(scales, block.zero)
    return CodedRows(
        codes=codes, bits=int(kind[1]), scales=scales, zeros=zeros, offsets=offsets, group=block.group
    )
