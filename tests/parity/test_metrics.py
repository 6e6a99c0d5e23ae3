"""Metrics against numpy's and torch's own, and the gates' formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ia3_export.parity.gates import (
    FACTOR,
    MARGIN,
    RUNTIME,
    at_least,
    at_most,
    coarser,
    quantized_gates,
    rounding_bound,
)
from ia3_export.parity.runs.metrics import (
    beyond,
    distance_between,
    effect_present,
    error_histogram,
    largest_magnitude,
    last_place,
    perplexity,
)

LOGITS = arrays("<f8", (3, 7), elements=st.floats(-20, 20))


@settings(deadline=None)
@given(LOGITS, LOGITS)
def test_kl_and_top_1_are_torchs(a: np.ndarray, b: np.ndarray) -> None:
    import torch

    distance = distance_between([{"logits": a}], [{"logits": b}], "float32")
    p, q = (torch.log_softmax(torch.from_numpy(x), -1) for x in (b, a))
    rows = (a != 0).any(-1) | (b != 0).any(-1)
    if not rows.any():
        assert distance.kl is None
        return
    wanted = torch.nn.functional.kl_div(q[rows], p[rows], log_target=True, reduction="batchmean")
    assert distance.kl == pytest.approx(float(wanted), abs=1e-12)
    assert distance.top1 == pytest.approx((a[rows].argmax(-1) == b[rows].argmax(-1)).mean())
    assert distance.max_kl is not None and distance.max_kl >= distance.kl >= 0


@given(arrays("<f4", 20, elements=st.floats(-1e6, 1e6, width=32)))
def test_the_last_place_is_numpys_spacing(values: np.ndarray) -> None:
    normal = values[np.abs(values) >= np.finfo("<f4").tiny]
    np.testing.assert_array_equal(
        last_place(normal.astype("<f8"), "float32"), np.abs(np.spacing(normal)).astype("<f8")
    )


@given(LOGITS, st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_beyond_is_allclose(b: np.ndarray, shift: float, rtol: float) -> None:
    a = b + shift
    atol = beyond([{"y": a}], [{"y": b}], rtol)
    assert np.allclose(a, b, rtol=rtol, atol=max(0.0, atol) + 1e-9)
    if atol > 1e-6:
        assert not np.allclose(a, b, rtol=rtol, atol=atol * 0.99)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.0])
def test_the_share_of_the_effect_survives_noise_across_it(share: float) -> None:
    base, effect = np.zeros((1, 4)), np.array([[1.0, 1.0, 0.0, 0.0]])
    noise = np.array([[3.0, -3.0, 5.0, 0.0]])  # orthogonal to the effect
    found = effect_present([{"y": base + share * effect + noise}], [{"y": base + effect}], [{"y": base}])
    assert found == pytest.approx(share)
    assert effect_present([{"y": base}], [{"y": base}], [{"y": base}]) is None


def test_perplexity_is_torchs_cross_entropy_over_attended_tokens() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 11, (2, 6), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1), reduction="none"
    )
    counted = torch.cat([torch.ones(5), torch.tensor([0, 0, 1, 1, 1])]).bool()
    wanted = math.exp(float(losses[counted].mean()))
    assert perplexity([{"logits": logits.numpy()}], [ids.numpy()], [mask.numpy()]) == pytest.approx(wanted)
    assert perplexity([{"logits": logits.numpy()[:, :3]}], [ids.numpy()], [None]) is None


def test_nan_is_infinitely_far_and_never_passes() -> None:
    distance = distance_between(
        [{"logits": np.array([[np.nan, 1.0]])}], [{"logits": np.array([[2.0, 1.0]])}], "float32"
    )
    assert distance.max_error == math.inf
    assert not at_most("max error", distance.max_error, 1e300).passed
    assert not at_most("x", math.nan, 1.0).passed and not at_least("x", math.nan, 0.0).passed
    assert largest_magnitude([{"y": np.array([np.nan])}]) == math.inf


def test_shapes_and_missing_outputs_are_errors() -> None:
    with pytest.raises(ValueError, match="shape"):
        distance_between([{"y": np.zeros(2)}], [{"y": np.zeros(3)}], "float32")
    with pytest.raises(KeyError):
        distance_between([{}], [{"y": np.zeros(3)}], "float32")


@settings(max_examples=30)
@given(arrays("<f8", 50, elements=st.floats(-10, 10)))
def test_the_histogram_counts_every_element(errors: np.ndarray) -> None:
    reference = np.linspace(-1, 1, 50)
    rows = error_histogram([{"y": reference + errors}], [{"y": reference}])
    assert sum(count for _, count in rows) == 50
    exact = int((reference + errors == reference).sum())
    assert dict(rows).get(-99, 0) == exact


def test_the_bound_is_the_documented_formula() -> None:
    assert rounding_bound(1e-6, 3.0, "float32", 2) == FACTOR * 2 * 1e-6 + MARGIN * 2.0**-23 * 3.0
    assert rounding_bound(0, 1.0, "bfloat16", 1, runtime=True) == RUNTIME * MARGIN * 2.0**-7
    assert coarser("float32", "bfloat16", "float16") == "bfloat16"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_artifact_without_the_adapter_fails(precision: str) -> None:
    far = distance_between([{"logits": np.zeros((4, 3)) + 1e-9}], [{"logits": 3 * np.eye(4, 3)}], "float32")
    assert [gate.name for gate in quantized_gates(precision, far, 0.02) if not gate.passed] == [
        "KL divergence",
        "top-1 agreement",
        "effect present, least",
    ]
    near = distance_between([{"logits": 3 * np.eye(4, 3)}], [{"logits": 3 * np.eye(4, 3)}], "float32")
    assert all(gate.passed for gate in quantized_gates(precision, near, 1.0))


def test_the_cosine_of_tiny_numbers_does_not_divide_by_zero() -> None:
    """The product of the squared lengths underflows where neither of them does."""
    tiny = np.full((3, 7), 8.18969557e-137)
    assert distance_between([{"logits": tiny}], [{"logits": tiny}], "float32").cosine == pytest.approx(1.0)


def test_a_mean_is_not_rounded_above_the_largest() -> None:
    a = np.array([[0.0] + [1.625] * 6] * 3)
    distance = distance_between([{"logits": a}], [{"logits": np.zeros_like(a)}], "float32")
    assert distance.kl == distance.max_kl
