"""What may be chosen of exports and benchmarks is checked when it is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from ia3_export import BenchSettings, GraphOptions
from ia3_export.errors import UsageError


def test_precisions_are_held_once_each_in_one_order() -> None:
    options = GraphOptions(precisions=["int4", "fp32", "int8", "int4"], targets=["genai"])
    assert options.precisions == ("fp32", "int8", "int4") and options.targets == ("genai",)
    assert options == GraphOptions(precisions=("fp32", "int8", "int4"), targets=("genai",))
    assert BenchSettings(precisions=["int8"]).precisions == ("fp32", "int8")
    assert BenchSettings(precisions=()).precisions == ("fp32",)


@pytest.mark.parametrize(
    ("wrong", "offered"),
    [
        ({"precisions": ("fp32", "int2")}, "fp32, keep, fp16, int8, q8, int4"),
        ({"precisions": ()}, "fp32, keep, fp16, int8, q8, int4"),
        ({"targets": ("phone",)}, "transformers.js, optimum, genai, mobile"),
        ({"opset": 17}, "18 to 23"),
        ({"opset": 24}, "18 to 23"),
    ],
)
def test_graphs_that_nobody_makes_are_wrong_usage(wrong: dict[str, Any], offered: str) -> None:
    with pytest.raises(UsageError) as caught:
        GraphOptions(**wrong)
    assert offered in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [{"threads": 0}, {"length": 0}, {"tokens": 0}, {"batch": 0}, {"rounds": 4}, {"precisions": ("int2",)}],
)
def test_benchmarks_of_nothing_are_wrong_usage(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BenchSettings(**wrong)
    assert BenchSettings(rounds=5, threads=1).used_threads == 1
    assert BenchSettings().used_threads >= 1
