"""Packed integers and small floats, against plain Python and torch's own 8-bit floats."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3_export.quantization.codes import E2M1, E4M3, E5M2, E8M0, unpack, unpack_padded, unpack_planes


def _pack(codes: list[int], bits: int) -> list[int]:
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    return [stream >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


@settings(deadline=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_a_stream_of_codes_is_read_back(bits: int, data: Any) -> None:
    count = data.draw(st.integers(1, 70))
    rows = data.draw(
        st.lists(
            st.lists(st.integers(0, (1 << bits) - 1), min_size=count, max_size=count), min_size=1, max_size=3
        )
    )
    words = np.array([_pack(row, bits) for row in rows], "<u4")
    np.testing.assert_array_equal(unpack(words, bits, count), rows)
    np.testing.assert_array_equal(unpack(words.view("<i4"), bits, count), rows)


@settings(deadline=None)
@given(bits=st.integers(2, 8), data=st.data())
def test_whole_codes_a_word_are_read_back(bits: int, data: Any) -> None:
    each = 32 // bits
    row = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=40))
    words = [_pack(row[i : i + each], bits)[0] for i in range(0, len(row), each)]
    np.testing.assert_array_equal(unpack_padded(np.array([words], "<u4"), bits, len(row)), [row])


@settings(deadline=None)
@given(bits=st.integers(2, 8), data=st.data())
def test_planes_are_read_back(bits: int, data: Any) -> None:
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=32, max_size=32))
    words: list[int] = []
    low = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            words += _pack([code >> low & ((1 << width) - 1) for code in codes], width)
            low += width
    np.testing.assert_array_equal(unpack_planes(np.array([words], "<u4"), bits, 32), [codes])


def test_small_floats_are_those_of_torch() -> None:
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    for table, dtype in (
        (E4M3, torch.float8_e4m3fn),
        (E5M2, torch.float8_e5m2),
        (E8M0, torch.float8_e8m0fnu),
    ):
        np.testing.assert_array_equal(table, codes.view(dtype).float().numpy())
    np.testing.assert_array_equal(E2M1[:8], [0, 0.5, 1, 1.5, 2, 3, 4, 6])
    np.testing.assert_array_equal(E2M1[8:], -E2M1[:8])
