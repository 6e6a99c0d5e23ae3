"""The scale of colours: even steps in log2 on both sides of one, and rows of cells of them."""

from __future__ import annotations

import numpy as np
import pytest

from ia3_export.drawing.colours import NEGATIVE, NOT_FINITE, ColourScale, css_class, runs


@pytest.mark.parametrize("levels", [4, 6])
def test_the_colour_changes_at_the_edges(levels: int) -> None:
    scale = ColourScale(levels, 2.0)
    edges = np.array(scale.edges())
    assert len(edges) == levels and edges[0] == pytest.approx(1.01)
    assert np.ptp(np.diff(np.log2([*edges, 4.0]))) < 1e-12
    steps = list(range(1, levels + 1))
    assert list(scale.codes(edges * 1.0001)) == steps
    assert list(scale.codes(edges * 0.9999)) == [k - 1 for k in steps]
    assert list(scale.codes(1 / edges / 1.0001)) == [-k for k in steps]


def test_what_lies_beyond_the_scale_has_its_strongest_colour_or_one_of_its_own() -> None:
    values = np.array([0.0, 1e-300, 1e300, -0.0, -1.0, -1e9, np.nan, np.inf, -np.inf, 1.0])
    expected = [-4, -4, 4, -4, NEGATIVE, NEGATIVE, NOT_FINITE, NOT_FINITE, NOT_FINITE, 0]
    codes = ColourScale(4, 1.0).codes(values)
    assert list(codes) == expected
    assert [css_class(int(code)) for code in codes[[0, 2, 4, 6, 9]]] == ["i4", "a4", "neg", "nan", "zero"]


def test_a_row_is_one_path_per_colour_without_grey() -> None:
    row = runs(np.array([0, 2, 2, -1, 0, 2]), ".5")
    assert row == '<path class="a2" d="M1 .5h2M5 .5h1"/><path class="i1" d="M3 .5h1"/>'
    assert runs(np.zeros(3, int), "0") == runs(np.zeros(0, int), "0") == ""
