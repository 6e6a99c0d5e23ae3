"""docs/formats.md says of every fixture what the code does with it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.support.quantized import CASES, FIXTURES, GGUF_CASES

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ROOT = FIXTURES.parents[2]


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_formats", ROOT / "tools" / "make_formats.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_fixture_is_on_the_page(maker: Any) -> None:
    page = list(maker.shape_of(maker.PAGE.read_text()))
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
def test_a_row_is_what_the_code_does(case: str, maker: Any) -> None:
    page = {row[0].strip("`"): row for row in maker.shape_of(maker.PAGE.read_text())}
    (made,) = maker.shape_of(f"{maker.MARK}\n{maker.table([case])}")
    assert page[case] == made
