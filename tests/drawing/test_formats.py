"""Numbers and names as reports and pictures show them: never rounded to what they are not, and short."""

from __future__ import annotations

import math

import pytest

from ia3_export.drawing import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (3.14159, "3.14"),
        (3.1e-06, "3.1e-06"),
        (12345.6, "12,300"),
        (0.999712, "0.999712"),
        (0.99, "0.99"),
        (1 - 2e-13, "1 - 2e-13"),
        (None, "—"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
    ],
)
def test_numbers_are_written_short(value: float | None, text: str) -> None:
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "100 %"), (0.9999, "99.99 %"), (0.5, "50 %"), (-0.02, "-2 %"), (2.0, "200 %"), (None, "—")],
)
def test_shares_are_percentages(value: float | None, text: str) -> None:
    assert formats.share(value) == text


def test_a_value_beyond_its_limit_never_looks_equal_to_it() -> None:
    assert formats.compared(0.12345, 0.12341) == ("0.1235", "0.1234")
    assert formats.compared(0.5, 0.5) == ("0.5", "0.5")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (90_868_376, "90.9 MB"),
        (2_200_119_864, "2.2 GB"),
        (999_999, "1 MB"),
    ],
)
def test_sizes_have_the_largest_unit_that_fits(nbytes: int, text: str) -> None:
    assert formats.size(nbytes) == text


@pytest.mark.parametrize(
    ("values", "text"), [([384], "384"), ([5, 5], "5"), ([1536, 384, 700], "384 to 1,536")]
)
def test_spans(values: list[int], text: str) -> None:
    assert formats.span(iter(values)) == text


def test_names_of_modules_are_as_short_as_tells_them_apart() -> None:
    ends = {
        "layer.*.attention.output.dense": "attention.output.dense",
        "layer.*.output.dense": "*.output.dense",
        "layer.*.key": "*.key",
        "key": "key",
        "a.fc": "a.fc",
        "b.fc": "b.fc",
    }
    found = formats.shortest_ends(path.split(".") for path in ends)
    assert {".".join(path): end for path, end in found.items()} == ends


def test_the_end_of_a_long_name_is_kept() -> None:
    assert formats.tail("model.layers.0.mlp", 18) == "model.layers.0.mlp"
    assert formats.tail("model.layers.0.mlp", 8) == "…s.0.mlp"
