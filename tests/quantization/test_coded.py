"""Codes as the files hold them: decoded they are the weight, and they are the numbers that lie in the
file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.checkpoint.gguf import read_gguf
from ia3_export.fold import Array
from ia3_export.quantization.coded import CodedRows, NotCoded, in_groups, take_rows
from ia3_export.quantization.detection import find_quantization
from ia3_export.quantization.packed import Packed
from tests.support.quantized import CASES, FIXTURES, GGUF_CASES, source_of

#: Codes that are no evenly spaced numbers, by what the message says.
NOT_CODED = {
    "bnb-nf4": "NF4 are places in a table",
    "bnb-fp4": "FP4 are places in a table",
    "ct-fp8-channel": "FP8 are small floats",
    "ct-nvfp4": "NVFP4 are small floats",
    "ct-mxfp4": "MXFP4 are small floats",
    "mxfp4-gpt-oss": "MXFP4 are small floats",
    "fp8-block128": "FP8 are small floats",
    "quanto-qfloat8": "qfloat8 are small floats",
    "hqq-4bit-axis0-g64": "groups run down the rows",
}


def _packed(case: str) -> dict[str, Packed]:
    return dict(find_quantization(read_checkpoint(source_of(case))).packed)


def _decoded(coded: CodedRows) -> Array:
    """As the docstring of `CodedRows` says, in float32."""
    columns = coded.codes.shape[1]
    group = np.arange(columns) // coded.group
    values = (coded.codes.astype("f4") - coded.zeros[:, group]) * coded.scales[:, group]
    if coded.offsets is not None:
        values = values + coded.offsets[:, group]
    weight = np.empty_like(values)
    weight[:, np.arange(columns) if coded.order is None else coded.order] = values
    return weight


def _weight(packed: Packed) -> Array:
    """(out, in), as the reader of the format has it."""
    computed = packed.dense("F32").computed
    assert computed is not None
    weight = computed.read(0, int(np.prod(packed.shape))).reshape(packed.shape)
    return weight.T if packed.conv1d else weight


@pytest.mark.parametrize("case", [*CASES, *GGUF_CASES])
def test_codes_stand_for_the_weight_exactly(case: str) -> None:
    read = 0
    for packed in _packed(case).values():
        try:
            coded = packed.read_codes()
        except NotCoded:
            continue
        weight, read = _weight(packed), read + 1
        assert coded.codes.dtype == np.uint8 and coded.codes.shape == weight.shape
        assert coded.codes.max() < 2**coded.bits
        groups = (len(weight), -(-weight.shape[1] // coded.group))
        assert coded.scales.shape == coded.zeros.shape == groups
        if "bnb" in case:  # its library multiplies by 1 / 127 at the end
            np.testing.assert_allclose(_decoded(coded), weight, rtol=2e-7, atol=0)
        else:
            np.testing.assert_array_equal(_decoded(coded), weight)
    none = ("nf4", "fp4", "fp8", "float8", "mxfp", "axis0", "bnb-mixed")
    assert bool(read) != any(word in case for word in none)


@pytest.mark.parametrize("case", NOT_CODED)
def test_other_codes_say_what_they_are(case: str) -> None:
    packed = next(one for one in _packed(case).values() if one.coded)
    with pytest.raises(NotCoded, match=NOT_CODED[case]):
        packed.read_codes()


def test_rows_that_share_groups_and_scaled_activations_have_no_codes() -> None:
    reasons = {
        reason: name
        for case in ("hqq-4bit-axis1-g64", "awq-act-scales")
        for name, packed in _packed(case).items()
        if isinstance(reason := packed.coded, str)
    }
    assert {reason: name.split(".")[-2] for reason, name in reasons.items()} == {
        "rows of 96 elements share groups of 64": "down_proj",
        "each column is divided by a scale of its activation": "dense_4h_to_h",
    }


@pytest.mark.parametrize("case", ["gptq-asym", "ct-w4a16-g32-asym", "gguf-q4_k_m", "quanto-qint4-grouped"])
def test_reading_a_few_rows_gives_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wholes = {name: packed.read_codes() for name, packed in _packed(case).items()}
    monkeypatch.setattr("ia3_export.quantization.coded._STEP", 1)
    for name, packed in _packed(case).items():
        pieces, whole = packed.read_codes(), wholes[name]
        for part in ("codes", "scales", "zeros", "offsets"):
            np.testing.assert_array_equal(getattr(pieces, part), getattr(whole, part))


def test_the_codes_of_gptq_awq_and_packed_integers_are_those_in_the_file() -> None:
    for case, module in (
        ("gptq-4bit-g32", "qweight"),
        ("awq-gemm-g32", "qweight"),
        ("ct-w4a16-g32-asym", "weight_packed"),
    ):
        name = "model.layers.0.mlp.up_proj"
        words = load_file(FIXTURES / case / "model.safetensors")[f"{name}.{module}"].view("u4")
        if case.startswith("awq"):  # (in, out / 8), in the order of its kernel
            shifts = [4 * place for place in (0, 4, 1, 5, 2, 6, 3, 7)]
            wanted = np.stack([words >> shift & 15 for shift in shifts], -1).reshape(len(words), -1).T
        else:
            nibbles = np.stack([words >> 4 * place & 15 for place in range(8)])
            wanted = nibbles.transpose(2, 1, 0).reshape(words.shape[1], -1)  # GPTQ: (in / 8, out)
            if case.startswith("ct"):
                wanted = nibbles.transpose(1, 2, 0).reshape(len(words), -1)
        np.testing.assert_array_equal(_packed(case)[f"{name}.weight"].read_codes().codes, wanted)


@pytest.mark.parametrize(
    ("case", "at", "nbytes"), [("gguf-q8_0", 2, 34), ("gguf-q4_0", 2, 18), ("gguf-q4_1", 4, 20)]
)
def test_the_codes_of_gguf_are_those_in_the_file(case: str, at: int, nbytes: int) -> None:
    """Blocks of 32 (``block_q8_0``, ``block_q4_0``, ``block_q4_1``): of 4 bits the lower halves come
    first."""
    name = "model.layers.0.mlp.up_proj.weight"
    coded = _packed(case)[name].read_codes()
    tensor = next(t for t in read_gguf(source_of(case))[0].tensors if t.name == name)
    raw = np.fromfile(tensor.file, "u1", tensor.nbytes, offset=tensor.offset).reshape(-1, nbytes)[:, at:]
    wanted = raw ^ 128 if case == "gguf-q8_0" else np.concatenate((raw & 15, raw >> 4), axis=1)
    np.testing.assert_array_equal(coded.codes.reshape(-1, 32), wanted)


def test_scattered_groups_are_brought_together_and_uneven_ones_are_not() -> None:
    codes = np.arange(12, dtype="u1").reshape(2, 6)
    ones = np.ones((2, 3), "f4")
    scattered = in_groups(codes, 4, ones, ones, np.array([2, 0, 1, 0, 1, 2]))
    assert scattered.group == 2 and scattered.order is not None
    assert scattered.order.tolist() == [1, 3, 2, 4, 0, 5]
    assert scattered.codes[0].tolist() == [1, 3, 2, 4, 0, 5]
    assert in_groups(codes, 4, ones, ones, np.array([0, 0, 1, 1, 2, 2])).order is None
    with pytest.raises(NotCoded, match="different lengths"):
        in_groups(codes, 4, ones, ones, np.array([0, 0, 0, 1, 2, 2]))


def test_rows_are_taken_with_what_belongs_to_them() -> None:
    numbers = np.arange(3, dtype="f4")[:, None]
    coded = CodedRows(
        codes=np.arange(3, dtype="u1")[:, None],
        bits=4,
        scales=numbers,
        zeros=numbers,
        offsets=numbers,
        group=1,
    )
    turned = take_rows(coded, np.array([2, 0, 1]))
    for part in (turned.codes, turned.scales, turned.zeros, turned.offsets):
        assert part is not None and part[:, 0].tolist() == [2, 0, 1]
    assert take_rows(replace(coded, offsets=None), np.array([0])).offsets is None
