"""The arithmetic of folding.

torch's bits, whatever the blocks, and every layout against plain nested indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ia3_export.fold import (
    Array,
    Direction,
    Layout,
    Scale,
    check_block,
    fold_block,
    from_float,
    make_scale,
    round_vector,
    to_float,
    work_dtype,
)

UNSIGNED = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2"}
STORAGE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EXPONENT = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
DTYPES = tuple(TORCH)

quick = settings(max_examples=50, deadline=None)
dtypes = st.sampled_from(DTYPES)


def bits(dtype: str) -> st.SearchStrategy[int]:
    """Bit patterns of finite values: any, subnormal, the largest, and both zeros."""
    width, infinity = np.dtype(UNSIGNED[dtype]).itemsize * 8, EXPONENT[dtype]
    sign = 1 << (width - 1)
    hidden = infinity & -infinity  # the lowest bit of the exponent
    magnitude = (
        st.integers(0, infinity - 1)
        | st.integers(0, hidden)
        | st.integers(infinity - hidden, infinity - 1)
        | st.sampled_from([0, 1, hidden - 1, hidden, infinity - 1])
    )
    return st.tuples(magnitude, st.sampled_from([0, sign])).map(sum)


@st.composite
def raw_arrays(draw: st.DrawFn, dtype: str, count: int) -> Array:
    values = draw(st.lists(bits(dtype), min_size=count, max_size=count))
    return np.array(values, UNSIGNED[dtype]).view(STORAGE[dtype])


vectors = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.floats(-4, 4, width=32) | bits("F32").map(lambda b: float(np.uint32(b).view("f4"))),
        min_size=n,
        max_size=n,
    ).map(lambda values: np.array(values, "<f4"))
)


def as_torch(raw: Array, dtype: str) -> Any:
    import torch

    return torch.from_numpy(raw.copy().view(np.uint8)).view(getattr(torch, TORCH[dtype]))


def torch_fold(raw: Array, dtype: str, written: str, factors: Sequence[Array]) -> bytes:
    """``(W.to(float32) * l).to(dtype)`` in torch, once a factor array of W's size; float64 in float64."""
    import torch

    value = as_torch(raw, dtype)
    wide = torch.float64 if dtype == "F64" else torch.float32
    for i, factor in enumerate(factors):
        last = getattr(torch, TORCH[written if i == len(factors) - 1 else work_dtype(dtype, written)])
        value = (value.to(wide) * torch.from_numpy(factor.copy()).to(wide)).to(last)
    found: bytes = value.view(torch.uint8).numpy().tobytes()
    return found


def spread(scale: Scale, count: int) -> Array:
    """The factor of every element, from the definition of `Scale`."""
    return np.array(
        [scale.factors[i // scale.inner % len(scale.factors)] for i in range(count)], scale.factors.dtype
    )


@st.composite
def folds(draw: st.DrawFn, scales: int = 1) -> tuple[str, Array, list[Scale]]:
    """A dtype, the stored bits of a tensor, and scales that fit it."""
    dtype = draw(dtypes)
    outer, inner = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    made = []
    length = 1
    for _ in range(scales):
        vector = draw(vectors).astype("<f8" if dtype == "F64" else "<f4")
        made.append(Scale(vector, inner))
        length = np.lcm(length, made[-1].period)
    return dtype, draw(raw_arrays(dtype, int(length) * outer)), made


# ---------------------------------------------------------------------------------------------------
# torch's bits


@given(folds())
@settings(quick, max_examples=120)
def test_a_fold_has_torchs_bits(fold: tuple[str, Array, list[Scale]]) -> None:
    dtype, raw, scales = fold
    before = raw.tobytes()
    found = fold_block(raw, 0, dtype, dtype, scales)
    assert found.tobytes() == torch_fold(raw, dtype, dtype, [spread(scales[0], len(raw))])
    assert raw.tobytes() == before


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("factor", [0.7, -1.3, 1e-4, 3e38, 1 + 2.0**-23])
def test_every_finite_16_bit_value_has_torchs_bits(dtype: str, factor: float) -> None:
    raw = np.arange(1 << 16, dtype="<u2")
    raw = raw[(raw & 0x7FFF) < EXPONENT[dtype]].view(STORAGE[dtype])
    scale = Scale(np.array([factor], "<f4"), 1)
    found = fold_block(raw, 0, dtype, dtype, [scale])
    assert found.tobytes() == torch_fold(raw, dtype, dtype, [spread(scale, len(raw))])


@given(folds(scales=2))
@quick
def test_of_two_scales_each_is_rounded(fold: tuple[str, Array, list[Scale]]) -> None:
    dtype, raw, scales = fold
    factors = [spread(scale, len(raw)) for scale in scales]
    first = fold_block(raw, 0, dtype, dtype, scales[:1])
    assume(check_block(first, dtype).not_finite < 0)  # infinity * 0 is a NaN, of whatever bits
    found = fold_block(raw, 0, dtype, dtype, scales)
    assert found.tobytes() == torch_fold(raw, dtype, dtype, factors)
    assert found.tobytes() == fold_block(first, 0, dtype, dtype, scales[1:]).tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_two_scales_differ_from_their_product(dtype: str) -> None:
    """The test before would say nothing if one rounding and two came to the same."""
    raw = np.arange(0x2000, 0x2100, dtype="<u2").view(STORAGE[dtype])
    one, other = np.float32(0.7), np.float32(1.3)
    scales = [Scale(np.array([value], "<f4"), 1) for value in (one, other, one * other)]
    twice = fold_block(raw, 0, dtype, dtype, scales[:2])
    assert twice.tobytes() != fold_block(raw, 0, dtype, dtype, scales[2:]).tobytes()


@given(folds(), st.sampled_from(["F32", "F16", "BF16"]))
@quick
def test_another_dtype_is_rounded_once_as_torch_does(
    fold: tuple[str, Array, list[Scale]], written: str
) -> None:
    dtype, raw, scales = fold
    assume((dtype, written) not in (("F64", "F16"), ("F64", "BF16")))  # torch rounds these twice; see below
    found = fold_block(raw, 0, dtype, written, scales)
    assert found.tobytes() == torch_fold(raw, dtype, written, [spread(scales[0], len(raw))])


@pytest.mark.parametrize("shape", [(6,), (6, 4), (4, 6), (3, 5, 6), (6, 3, 2, 2)])
def test_a_scale_knows_the_axis_that_it_was_laid_along(shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        inner = int(np.prod(shape[axis + 1 :]))
        assert Scale(np.ones(shape[axis], "<f4"), inner).axis(shape) == axis
    assert Scale(np.ones(int(np.prod(shape)), "<f4"), 1).axis(shape) == (0 if len(shape) == 1 else None)
    assert Scale(np.ones(7, "<f4"), 1).axis(shape) is None


def nearest_even(value: float, dtype: str) -> int:
    """The bits of the finite value of `dtype` nearest to `value`, by exact arithmetic over all of them."""
    codes = np.arange(EXPONENT[dtype], dtype="<u2")
    exact = [Fraction(float(v)) for v in to_float(codes.view(STORAGE[dtype]), dtype)]
    wanted = abs(Fraction(value))
    above = next(i for i, candidate in enumerate(exact) if candidate >= wanted)
    if exact[above] == wanted:
        return above
    lower, upper = wanted - exact[above - 1], exact[above] - wanted
    if lower == upper:
        return above if above % 2 == 0 else above - 1
    return above if upper < lower else above - 1


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_float64_is_rounded_once_to_16_bits(dtype: str) -> None:
    """Just above the middle of two neighbours: rounding to float32 first would lose what decides."""
    half = {"F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
    values = np.array([1 + half + 2.0**-40, 1 + half, 1 + half - 2.0**-40, 1 + 3 * half - 2.0**-40], "<f8")
    found = fold_block(values, 0, "F64", dtype, [])
    assert [int(code) for code in found.view("<u2")] == [nearest_even(value, dtype) for value in values]


@given(st.lists(bits("F32"), min_size=1, max_size=6), dtypes)
@quick
def test_round_vector_is_torchs_cast_there_and_back(values: list[int], dtype: str) -> None:
    import torch

    vector = np.array(values, "<u4").view("<f4")
    wide = torch.float64 if dtype == "F64" else torch.float32
    expected = torch.from_numpy(vector.copy()).to(getattr(torch, TORCH[dtype])).to(wide)
    assert round_vector(vector, dtype).tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_and_rounding_again_changes_no_bit(dtype: str) -> None:
    generator = np.random.default_rng(0)
    raw = generator.integers(0, EXPONENT[dtype], 5000, dtype=UNSIGNED[dtype]).view(STORAGE[dtype])
    assert from_float(to_float(raw, dtype), dtype).tobytes() == raw.tobytes()


NANS = [
    0x7FC0_0000,
    0x7F80_0001,
    0x7FFF_8000,
    0x7FFF_FFFF,
    0xFFC0_0000,
    0xFF80_0001,
    0xFFFF_8000,
    0xFFFF_FFFF,
]


@pytest.mark.parametrize("pattern", NANS, ids=hex)
@pytest.mark.parametrize("written", ["F16", "BF16", "F32"])
def test_a_nan_stays_a_nan_in_every_dtype(pattern: int, written: str) -> None:
    """Else a damaged base would be merged in silence: what becomes a number passes `check_block`."""
    raw = np.array([pattern], "<u4").view("<f4")
    found = fold_block(raw, 0, "F32", written, [])
    assert check_block(found, written).not_finite == 0


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_nan_and_infinity_is_found_after_a_fold(dtype: str) -> None:
    codes = np.arange(1 << 16, dtype="<u2")
    codes = codes[(codes & 0x7FFF) >= EXPONENT[dtype]]
    for code in codes:
        found = fold_block(
            codes[codes == code].view(STORAGE[dtype]), 0, dtype, dtype, [Scale(np.array([0.5], "<f4"), 1)]
        )
        assert check_block(found, dtype).not_finite == 0, hex(code)


# -----------------------------------------------------------------------------------------------------
# any blocks


@given(folds(), st.data())
@quick
def test_any_split_into_blocks_gives_the_same_bits(
    fold: tuple[str, Array, list[Scale]], data: st.DataObject
) -> None:
    dtype, raw, scales = fold
    whole = fold_block(raw, 0, dtype, dtype, scales).tobytes()
    cuts = sorted({0, len(raw), *data.draw(st.lists(st.integers(0, len(raw)), max_size=5))})
    parts = [fold_block(raw[a:b], a, dtype, dtype, scales) for a, b in pairwise(cuts)]
    assert b"".join(part.tobytes() for part in parts) == whole


@given(folds(scales=2), st.integers(1, 9))
@quick
def test_any_block_size_gives_the_same_bits_for_two_scales(
    fold: tuple[str, Array, list[Scale]], size: int
) -> None:
    dtype, raw, scales = fold
    whole = fold_block(raw, 0, dtype, dtype, scales)
    assume(check_block(whole, dtype).not_finite < 0)
    parts = [fold_block(raw[i : i + size], i, dtype, dtype, scales) for i in range(0, len(raw), size)]
    assert b"".join(part.tobytes() for part in parts) == whole.tobytes()


def test_a_tensor_of_no_elements_is_folded() -> None:
    raw = np.empty(0, "<f4")
    assert len(fold_block(raw, 0, "F32", "F16", [Scale(np.array([2.0], "<f4"), 3)])) == 0
    assert check_block(raw, "F32").not_finite == -1


# --------------------------------------------------------------------------------------------------------
# layouts


def by_nested_indices(vector: Array, shape: tuple[int, ...], direction: Direction, layout: Layout) -> Array:
    """The factor of every element of a weight or bias, as section 2 of the design puts it."""
    factors = np.empty(shape, vector.dtype)
    for index in product(*map(range, shape)):
        if len(shape) == 1:
            channel = index[0]
        elif layout == "linear":
            channel = index[0] if direction == "out" else index[1]
        elif layout == "conv1d":
            channel = index[1] if direction == "out" else index[0]
        elif direction == "out":
            channel = index[0]
        else:
            groups = len(vector) // shape[1]
            group = index[0] // (shape[0] // groups)
            channel = group * shape[1] + index[1]
        factors[index] = vector[channel]
    return factors


def numbered(count: int) -> Array:
    return np.arange(1, count + 1, dtype="<f4")


def assert_laid(vector: Array, shape: tuple[int, ...], direction: Direction, layout: Layout) -> None:
    scale = make_scale(vector, shape, direction, layout)
    count = int(np.prod(shape))
    assert count % scale.period == 0
    expected = by_nested_indices(vector, shape, direction, layout).reshape(-1)
    assert spread(scale, count).tolist() == expected.tolist()
    assert fold_block(np.ones(count, "<f4"), 0, "F32", "F32", [scale]).tolist() == expected.tolist()


sizes = st.integers(1, 5)
directions: st.SearchStrategy[Direction] = st.sampled_from(["out", "in"])


@given(sizes, sizes, directions)
@quick
def test_a_linear_weight_is_scaled_by_row_or_column(out: int, into: int, direction: Direction) -> None:
    assert_laid(numbered(out if direction == "out" else into), (out, into), direction, "linear")


@given(sizes, sizes, directions)
@quick
def test_a_conv1d_weight_is_scaled_by_column_or_row(out: int, into: int, direction: Direction) -> None:
    assert_laid(numbered(out if direction == "out" else into), (into, out), direction, "conv1d")


@given(st.integers(1, 3), sizes, sizes, st.lists(st.integers(1, 3), min_size=2, max_size=3), directions)
@example(groups=3, out=1, into=1, kernel=[3, 3], direction="in")
@quick
def test_a_convolution_is_scaled_by_channel_in_every_group(
    groups: int, out: int, into: int, kernel: list[int], direction: Direction
) -> None:
    """`out` and `into` are channels of one group; the vector always covers all of them."""
    vector = numbered(groups * (out if direction == "out" else into))
    assert_laid(vector, (groups * out, into, *kernel), direction, "conv")


@given(sizes, st.sampled_from(["linear", "conv1d", "conv"]))
@quick
def test_a_bias_is_scaled_element_by_element(out: int, layout: Layout) -> None:
    assert_laid(numbered(out), (out,), "out", layout)


@pytest.mark.parametrize(
    ("channels", "groups", "direction"),
    [((4, 6), 2, "in"), ((6, 4), 2, "out"), ((4, 4), 4, "in"), ((5, 3), 1, "in")],
)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_scaled_convolution_equals_scaled_activations(
    channels: tuple[int, int], groups: int, direction: Direction, dimensions: int
) -> None:
    import torch

    out, into = channels
    torch.manual_seed(0)
    conv = (torch.nn.Conv2d, torch.nn.Conv3d)[dimensions - 2](into, out, 2, groups=groups).double()
    vector = torch.rand(out if direction == "out" else into, dtype=torch.float64) + 0.5
    along = vector.view(1, -1, *[1] * dimensions)
    x = torch.rand(1, into, *[4] * dimensions, dtype=torch.float64)
    expected = conv(x) * along if direction == "out" else conv(x * along)
    with torch.no_grad():
        for parameter in [conv.weight] + ([conv.bias] if direction == "out" else []):
            scale = make_scale(vector.numpy(), tuple(parameter.shape), direction, "conv")
            folded = fold_block(parameter.numpy().reshape(-1), 0, "F64", "F64", [scale])
            parameter.copy_(torch.from_numpy(folded).view(parameter.shape))
    torch.testing.assert_close(conv(x), expected)


# ----------------------------------------------------------------------------------------------------------
# checks


@given(dtypes, st.data())
@quick
def test_a_finite_block_has_no_finding(dtype: str, data: st.DataObject) -> None:
    raw = data.draw(raw_arrays(dtype, data.draw(st.integers(0, 12))))
    zeros = int(np.sum(to_float(raw, dtype) == 0))
    found = check_block(raw, dtype)
    assert (found.not_finite, found.zeros) == (-1, zeros)


@given(dtypes, st.data())
@quick
def test_the_first_value_that_is_not_finite_is_found(dtype: str, data: st.DataObject) -> None:
    raw = data.draw(raw_arrays(dtype, data.draw(st.integers(1, 12)))).view(UNSIGNED[dtype]).copy()
    sign = 1 << (raw.itemsize * 8 - 1)
    bad = st.tuples(st.integers(EXPONENT[dtype], sign - 1), st.sampled_from([0, sign])).map(sum)
    places = data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3))
    for place in places:
        raw[place] = data.draw(bad)
    assert check_block(raw.view(STORAGE[dtype]), dtype).not_finite == min(places)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_count_and_subnormals_do_not(dtype: str) -> None:
    sign = 1 << (np.dtype(UNSIGNED[dtype]).itemsize * 8 - 1)
    raw = np.array([0, sign, 1, sign + 1], UNSIGNED[dtype]).view(STORAGE[dtype])
    assert check_block(raw, dtype).zeros == 2
