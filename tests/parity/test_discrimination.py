"""A wrong artifact is found by where it is off to, however much noise there is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ia3_export.parity.discrimination import BASE, Likeness, discrimination, likeness, likeness_gates
from ia3_export.parity.gates import FACTOR, MARGIN, RMS_FACTOR, at_most, rms_bound
from ia3_export.parity.runs.metrics import EPSILON
from ia3_export.parity.runs.wrong import HALF, layer_of, thinned


def _outputs(seed: int, rows: int = 40, width: int = 300) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(rows, width))


def _like(error: Any, direction: Any) -> Likeness:
    exact = _outputs(0, *direction.shape)
    found = likeness("wrong", [{"x": exact + error}], [{"x": exact}], [{"x": exact + direction}])
    assert found is not None
    return found


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_noise_as_large_as_the_effect_is_not_like_it_and_a_wrong_artifact_is(noise: float) -> None:
    direction = _outputs(1)
    right = _like(noise * _outputs(2), direction)
    wrong = _like(noise * _outputs(2) + direction, direction)
    half = _like(noise * _outputs(2) + direction / 2, direction)
    opposite = _like(noise * _outputs(2) - direction, direction)
    assert right.value < 0.5 * right.limit <= 0.5
    assert wrong.value == pytest.approx(1, abs=0.05) and wrong.value > 5 * wrong.limit
    assert half.value > 2.5 * half.limit and opposite.value > 5 * opposite.limit


def test_noise_that_hides_the_effect_says_so_by_its_limit() -> None:
    direction = 0.01 * _outputs(1)
    right = _like(_outputs(2), direction)
    assert right.limit > 1


def test_few_rows_and_no_direction_say_nothing() -> None:
    exact = [{"x": _outputs(0, 7)}]
    assert likeness("wrong", exact, exact, [{"x": _outputs(1, 7)}]) is None
    many = [{"x": _outputs(0)}]
    assert likeness("wrong", many, many, many) is None


def test_what_all_logits_have_in_common_does_not_count() -> None:
    exact, shift = _outputs(0), np.arange(40.0)[:, None]
    one, two = thinned([{"logits": exact}]), thinned([{"logits": exact + shift}])
    np.testing.assert_allclose(one[0]["logits"], two[0]["logits"], atol=1e-5)
    assert thinned([{"logits": _outputs(0, 3, 10_000)}])[0]["logits"].shape == (3, 2048)


def test_the_layer_that_it_is_likest_to_be_without_has_the_gate() -> None:
    found = [Likeness(BASE, 0.0, 0.1), Likeness(HALF, 0.2, 0.1), Likeness("layers.0 left out", 0.3, 0.4)]
    found.append(Likeness("layers.1 left out", 0.2, 0.1))
    gates = list(likeness_gates(found))
    assert [(gate.name, gate.passed) for gate in gates] == [
        ("likeness to the base", True),
        ("likeness to half strength", False),
        ("likeness to layers.1 left out", False),
    ]


def test_a_wrong_artifact_is_told_by_its_direction_or_by_its_size() -> None:
    found = [Likeness(BASE, 0, 0.1), Likeness(HALF, 0, 0.5), Likeness("a left out", 0, 4.0)]
    told = discrimination(found, {BASE: 50.0, HALF: 1.0, "a left out": 0.1, "b left out": 3.0})
    assert (told.base, told.half, told.nearest, told.nearest_name) == (50.0, 2.0, 0.25, "a left out")
    assert told.least == 0.25


def test_a_limit_that_is_infinite_is_none() -> None:
    assert not at_most("max error", 1.0, math.inf).passed
    assert not at_most("max error", math.nan, 1.0).passed
    assert at_most("max error", 1.0, 1.0).passed


def test_the_root_mean_square_of_many_outputs_is_held_nearer() -> None:
    margin = MARGIN * EPSILON["float32"] * 2.0
    few, many = (rms_bound(1.0, 2.0, n, "float32", 1, runtime=False) - margin for n in (999, 1000))
    assert (few, many) == (pytest.approx(FACTOR), pytest.approx(RMS_FACTOR))


def test_layers_are_what_has_a_number() -> None:
    assert layer_of("model.layers.3.self_attn.k_proj") == "model.layers.3"
    assert layer_of("encoder.block.0.layer.1.DenseReluDense.wo") == "encoder.block.0"
    assert layer_of("h.11.mlp.c_proj") == "h.11" and layer_of("classifier") == "classifier"
