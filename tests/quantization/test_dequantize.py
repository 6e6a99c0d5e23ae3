"""Every format, as its writer left it (tools/fixtures/quantized), against that library's dequantizer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.quantization.detection import dense_view, find_quantization
from tests.support.quantized import CASES, FIXTURES, dequantized, expected_weights


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_format_s_own_library(case: str) -> None:
    base = read_checkpoint(FIXTURES / case)
    quantization = find_quantization(base)
    assert quantization.problems == ()
    recipe = json.loads((FIXTURES / case / "recipe.json").read_text())
    expected = expected_weights(case)
    assert expected
    for name, wanted in expected.items():
        found = dequantized(case, quantization, name)
        assert found.shape == wanted.shape
        assert found.dtype == np.dtype("<f4")
        if recipe["tolerance"] == 0:
            np.testing.assert_array_equal(found, wanted)
        else:
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert error <= recipe["tolerance"], f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
def test_reading_in_pieces_gives_the_same(case: str) -> None:
    base = read_checkpoint(FIXTURES / case)
    view = dense_view(base, find_quantization(base))
    for name in expected_weights(case):
        tensor = view.tensors[name]
        assert tensor.computed is not None
        whole, unit = tensor.computed.read(0, tensor.size), tensor.computed.unit
        for start in range(0, tensor.size, unit * 3):
            count = min(unit * 3, tensor.size - start)
            np.testing.assert_array_equal(
                tensor.computed.read(start, count), whole[start : start + count], strict=True
            )
