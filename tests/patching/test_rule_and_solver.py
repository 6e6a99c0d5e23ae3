"""The rule of a fold piece against plain arithmetic, and the vectors that are found from two tensors."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3_export.fold import Workspace, from_float, storage_dtype, to_float
from ia3_export.patching import solve as solving
from ia3_export.patching.format import FoldRule
from ia3_export.patching.regions import Region, dense
from ia3_export.patching.rule import chunks, fold_records
from ia3_export.patching.solve import Pair, Solution, failing, solve

DTYPES = ("F32", "BF16", "F16", "F64")
#: Bits of precision, and the exponent of the smallest number.
BITS = {"F32": (24, -149), "BF16": (8, -133), "F16": (11, -24), "F64": (53, -1074)}
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 3e38, 65504.0, 6e-8, 1.1754944e-38)
FLOATS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False))


def stored(values: Any, dtype: str) -> bytes:
    wide = np.array(values, "<f8" if dtype == "F64" else "<f4")
    with np.errstate(all="ignore"):
        return bytes(from_float(wide, dtype).tobytes())


def rounded(exact: Fraction, dtype: str, negative: bool) -> bytes:
    """`exact` to the nearest number of `dtype`, ties to even, by whole numbers alone."""
    bits, exponent = BITS[dtype]
    size = abs(exact)
    unit = exponent
    while size >= Fraction(2) ** (unit + bits):
        unit += 1
    count, rest = divmod(size / Fraction(2) ** unit, 1)
    count = int(count)
    count += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and count % 2 == 1)
    if count == 2**bits:
        count, unit = count // 2, unit + 1
    field: int = (unit - exponent) * 2 ** (bits - 1) + count
    width = 8 * SIZES[dtype]
    infinity = (2 ** (width - bits) - 1) << (bits - 1)
    field = min(field, infinity) | (int(negative) << (width - 1))
    return field.to_bytes(SIZES[dtype], "little")


def value(raw: bytes, dtype: str) -> float:
    kind = {"F32": "<f", "F16": "<e", "F64": "<d"}.get(dtype)
    if kind is None:
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack(kind, raw)[0])


def rule(dtype: str, length: int, **other: Any) -> FoldRule:
    values: dict[str, Any] = {
        "offset": 0, "length": length, "dtype": dtype, "rounded": dtype, "to": dtype,
        "stride": SIZES[dtype], "at": (0,), "vector": "v0", "inner": 1,
    }  # fmt: skip
    return FoldRule(**(values | other))


@given(
    st.sampled_from(DTYPES),
    st.lists(FLOATS, min_size=1, max_size=12),
    st.lists(FLOATS, min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_the_rule_is_an_exact_product_rounded_to_float32_and_then_to_the_dtype(
    dtype: str, values: list[float], factors: list[float], inner: int, first: int
) -> None:
    raw = stored(values, dtype)
    vector = np.array(factors, "<f4")
    block = bytearray(raw)
    fold_records(block, first, rule(dtype, len(raw), inner=inner), vector, Workspace())
    size = SIZES[dtype]
    for i in range(len(values)):
        w, factor = value(raw[i * size :][:size], dtype), float(vector[(first + i) // inner % len(vector)])
        if not np.isfinite(w):
            continue
        negative = np.signbit(w) != np.signbit(factor)
        expected = rounded(Fraction(w) * Fraction(factor), "F64" if dtype == "F64" else "F32", negative)
        between = value(expected, "F64" if dtype == "F64" else "F32")
        if np.isfinite(between):
            expected = rounded(Fraction(between), dtype, negative)
        else:
            expected = stored([between], dtype)
        assert bytes(block[i * size :][:size]) == expected, (w, factor)


@pytest.mark.parametrize(("dtype", "bits"), [("F32", 0x7FC00000), ("BF16", 0x7FC0), ("F16", 0x7E00)])
def test_what_is_no_number_is_the_quiet_one_without_a_payload(dtype: str, bits: int) -> None:
    infinite = stored([np.inf, -np.inf], dtype)
    payload = (bits | 1 | 1 << 8 * SIZES[dtype] - 1).to_bytes(SIZES[dtype], "little")
    block = bytearray(infinite + payload)
    fold_records(block, 0, rule(dtype, len(block)), np.zeros(1, "<f4"), Workspace())
    assert bytes(block) == bits.to_bytes(SIZES[dtype], "little") * 3


def test_values_rounded_to_bfloat16_in_float32_and_blocks_with_two_scales() -> None:
    raw = stored([1.0, 3.0, -2.0], "F32")
    block = bytearray(raw)
    fold_records(block, 0, rule("F32", 12, rounded="BF16"), np.array([1.2345678], "<f4"), Workspace())
    assert [value(bytes(block[i : i + 4]), "F32") for i in (0, 4, 8)] == [1.234375, 3.703125, -2.46875]
    codes = b"\x11\x22\x33"
    block = bytearray((stored([1.5], "F16") + codes[:1] + stored([2.5], "F16") + codes[1:]) * 2)
    fold_records(block, 0, rule("F16", 14, stride=7, at=(0, 3)), np.array([2.0, -1.0], "<f4"), Workspace())
    assert block == b"".join(
        stored([1.5 * f], "F16") + codes[:1] + stored([2.5 * f], "F16") + codes[1:] for f in (2, -1)
    )
    block = bytearray(stored([1.5, 3.0], "BF16"))
    fold_records(block, 0, rule("BF16", 4, rounded="F16", to="F16"), np.array([0.1], "<f4"), Workspace())
    products = [np.float32(1.5) * np.float32(0.1), np.float32(3) * np.float32(0.1)]
    assert bytes(block) == stored(products, "F16")
    block, wide = bytearray(stored([1.5, 3.0], "BF16")), rule("BF16", 8, rounded="F32", to="F32")
    assert (wide.records, wide.stride, wide.made_stride) == (2, 2, 4)
    assert fold_records(block, 0, wide, np.array([0.1], "<f4"), Workspace()) == stored(products, "F32")


@contextmanager
def pair_of(old: bytes, new: bytes, region: Region, to: Region | None = None) -> Iterator[Pair]:
    with TemporaryDirectory() as folder:
        files = []
        for name, data in (("old", old), ("new", new)):
            (Path(folder) / name).write_bytes(data)
            files.append(os.open(Path(folder) / name, os.O_RDONLY))
        yield Pair(region, to or region, *files)
        for file in files:
            os.close(file)


def folded(raw: bytes, region: Region, factors: Any, inner: int, narrow: str | None = None) -> bytes:
    block = bytearray(raw)
    made = rule(region.dtype, len(raw), rounded=narrow or region.dtype, inner=inner)
    fold_records(block, 0, made, np.array(factors, "<f4"), Workspace())
    return bytes(block)


@given(st.data(), st.sampled_from(("F32", "BF16", "F16")), st.sampled_from((0, 1)))
@settings(max_examples=150, deadline=None)
def test_a_vector_is_found_whatever_its_elements_are(data: st.DataObject, dtype: str, axis: int) -> None:
    shape = (data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6)))
    count = shape[0] * shape[1]
    weights = data.draw(st.lists(FLOATS, min_size=count, max_size=count))
    factors = data.draw(st.lists(FLOATS, min_size=shape[axis], max_size=shape[axis]))
    region = dense("w", dtype, shape, 0, count * SIZES[dtype])
    raw = stored(weights, dtype)
    inner = shape[1] if axis == 0 else 1
    new = folded(raw, region, factors, inner)
    with pair_of(raw, new, region) as pair:
        found = solve(pair)
    finite = np.isfinite(to_float(np.frombuffer(new, storage_dtype(dtype)), dtype))
    if found is None:
        # zeros of either sign, and what overflowed, say too little of a factor to be sure of finding it
        assert (
            not finite.all() or any(abs(f) < 1e-30 or abs(f) > 1e30 for f in factors) or small(weights, dtype)
        )
        return
    assert folded(raw, region, found.vector, found.inner, found.rounded) == new


def small(weights: list[float], dtype: str) -> bool:
    """Whether some weights are subnormal or nothing in `dtype`."""
    least = 2.0**-14 if dtype == "F16" else 2.0**-126
    return any(abs(weight) < least for weight in weights)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("records", [1 << 18, 96, 20])
def test_real_looking_vectors_are_always_found(
    dtype: str, axis: int, records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solving, "_RECORDS", records)
    random = np.random.default_rng(3)
    shape = (40, 24)
    weights = random.standard_normal(shape) * 0.02
    factors = 1 + 0.3 * random.standard_normal(shape[axis])
    factors[::5] *= -1
    factors[3], factors[7], weights[:, 5] = 0, 1, 0
    region = dense("w", dtype, shape, 0, weights.size * SIZES[dtype])
    raw = stored(weights.reshape(-1), dtype)
    new = folded(raw, region, factors, 24 if axis == 0 else 1)
    with pair_of(raw, new, region) as pair:
        found = solve(pair)
        assert found is not None
        assert found.inner == (24 if axis == 0 else 1)
        assert not failing(pair, found).any()
        wrong = found.vector.copy()
        wrong[4] *= np.float32(1.1)
        assert np.flatnonzero(failing(pair, Solution(wrong, found.inner, found.rounded))).tolist() == [4]
    assert folded(raw, region, found.vector, found.inner, found.rounded) == new


def test_nothing_is_found_where_no_vector_leads() -> None:
    random = np.random.default_rng(3)
    old, new = (stored(random.standard_normal(960), "F32") for _ in range(2))
    region = dense("w", "F32", (40, 24), 0, len(old))
    with pair_of(old, new, region) as pair:
        assert solve(pair) is None
    codes = dense("codes", "I8", (40, 24), 0, 960)
    with pair_of(old, new, codes) as pair:
        assert solve(pair) is None
    moved = bytearray(folded(old, region, 1 + random.random(40), 24))
    moved[500] ^= 1
    with pair_of(old, bytes(moved), region) as pair:
        assert solve(pair) is None


def test_values_of_bfloat16_in_a_float32_graph_round_as_in_bfloat16() -> None:
    random = np.random.default_rng(3)
    region = dense("w", "F32", (40, 24), 0, 3840)
    narrow = np.frombuffer(stored(random.standard_normal(960), "BF16"), "<u2")
    raw = to_float(narrow, "BF16").tobytes()
    new = folded(raw, region, 1 + random.random(40), 24, "BF16")
    with pair_of(raw, new, region) as pair:
        found = solve(pair)
    assert found is not None and found.rounded == "BF16"


def test_a_flat_tensor_of_scales_has_one_factor_a_row() -> None:
    random = np.random.default_rng(3)
    region = dense("absmax", "F32", (40 * 6,), 0, 960)
    raw = stored(random.random(240), "F32")
    new = folded(raw, region, 1 + random.random(40), 6)
    with pair_of(raw, new, region) as pair:
        found = solve(pair)
    assert found is not None and (len(found.vector), found.inner) == (40, 6)


@pytest.mark.parametrize(("old", "new"), [("F16", "F32"), ("BF16", "F16"), ("F32", "F16")])
def test_scales_that_become_another_dtype(old: str, new: str) -> None:
    random = np.random.default_rng(3)
    before, after = (dense("scales", dtype, (40, 6), 0, 240 * SIZES[dtype]) for dtype in (old, new))
    raw = stored(random.random(240), old)
    made = rule(old, len(raw) * SIZES[new] // SIZES[old], rounded=new, to=new, inner=6)
    vector = (1 + random.random(40)).astype("<f4")
    data = bytes(fold_records(bytearray(raw), 0, made, vector, Workspace()))
    with pair_of(raw, data, before, after) as pair:
        found = solve(pair)
        assert found is not None and (len(found.vector), found.inner) == (40, 6)
        assert not failing(pair, found).any()


def test_a_bias_shares_the_vector_of_its_weight() -> None:
    random = np.random.default_rng(3)
    vector = (1 + random.random(40)).astype("<f4")
    region = dense("bias", "BF16", (40,), 0, 80)
    raw = stored(random.standard_normal(40), "BF16")
    with pair_of(raw, folded(raw, region, vector, 1), region) as pair:
        found = solve(pair, [vector])
    assert found is not None and found.vector is vector


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_chunks_cover_every_record_once_under_its_channel(outer: int, n: int, inner: int, most: int) -> None:
    seen = []
    for chunk in chunks(outer * n * inner, n, inner, most):
        assert chunk.count <= most
        records = np.arange(chunk.first, chunk.first + chunk.count)
        shaped = records.reshape(-1, chunk.channels, min(inner, chunk.count))
        for channel in range(chunk.channels):
            assert (shaped[:, channel] // inner % n == chunk.channel + channel).all()
        seen += records.tolist()
    assert seen == list(range(outer * n * inner))
