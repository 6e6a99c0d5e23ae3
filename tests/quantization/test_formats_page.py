"""docs/formats.md says of every fixture what the code does with it."""

from __future__ import annotations

import pytest

from tests.support.quantized import CASES, GGUF_CASES
from tools import make_formats

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def test_every_fixture_is_on_the_page() -> None:
    page = list(make_formats.shape_of(make_formats.PAGE.read_text()))
    assert [row[0].strip("`") for row in page] == [*CASES, *GGUF_CASES]


#: One of every kind; the whole table takes a minute.
SAMPLE = [
    "bnb-nf4-double",
    "ct-w4a16-g32-sym",
    "ct-fp8-tensor",
    "gptq-4bit-g32",
    "awq-act-scales",
    "hqq-4bit-axis0-g64",
]


@pytest.mark.parametrize("case", SAMPLE)
def test_a_row_is_what_the_code_does(case: str) -> None:
    page = {row[0].strip("`"): row for row in make_formats.shape_of(make_formats.PAGE.read_text())}
    (made,) = make_formats.shape_of(f"{make_formats.MARK}\n{make_formats.table([case])}")
    assert page[case] == made
