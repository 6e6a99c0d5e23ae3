"""The card of the base, whatever is in its front matter.

Its metadata are taken over or left out, and stop no merge.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.e2e.command import merge
from tests.e2e.conftest import Tiny


def _card(tiny: Tiny, folder: Path, text: str) -> str:
    base = Path(shutil.copytree(tiny.single, folder / "base"))
    (base / "README.md").write_text(text)
    merge(base, tiny.adapter, folder / "merged")
    assert (folder / "merged" / "README.base.md").read_text() == text
    return (folder / "merged" / "README.md").read_text()


@pytest.mark.parametrize(
    "front",
    [
        "- " * 50_000, "license: " + "[" * 10_000, "license: 2024-13-45", "license: !!timestamp now",
        "license: !!int ''", "license: 0x_", "license: !!python/object/apply:os.system [id]", "{[a]: b}",
        "license: *nowhere", "- mit", "7", "\x00",
    ],
    ids=lambda front: front[:20],
)  # fmt: skip
def test_metadata_that_are_none_are_left_out(tiny: Tiny, front: str, tmp_path: Path) -> None:
    assert "\nlicense:" not in _card(tiny, tmp_path, f"---\n{front}\n---\n# base\n")


@pytest.mark.parametrize(
    "text",
    ["---" + "\n" * 300_000, "---\n" + "--- x\n" * 100_000, "---", "", "---\nlicense: mit\n"],
    ids=lambda text: text[:8],
)
def test_a_front_matter_without_end_costs_no_time(tiny: Tiny, text: str, tmp_path: Path) -> None:
    start = time.monotonic()
    assert "\nlicense:" not in _card(tiny, tmp_path, text)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("fence", ["---", "--- ", "---\t"])
def test_metadata_are_taken_over(tiny: Tiny, fence: str, tmp_path: Path) -> None:
    card = _card(tiny, tmp_path, f"{fence}\nlicense: mit\nlanguage:\n- en\n{fence}\n# base\n---\n")
    assert "\nlicense: mit\nlanguage:\n- en\n" in card
