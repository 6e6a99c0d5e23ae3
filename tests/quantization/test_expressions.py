"""Expressions in the settings of a quantized base, which its library matches with every module.

Bounded before anything loads.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ia3_export.checkpoint.folder import read_checkpoint
from tests.e2e.command import edit_json, only_complaint, run
from tests.support.quantized import FIXTURES, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

ENDLESS = ".?" * 40 + "!"


def _varied(case: str, folder: Path, **settings: Any) -> tuple[Path, Path]:
    """A copy of a fixture with other quantization settings, and an adapter for it."""
    base = Path(shutil.copytree(FIXTURES / case, folder / "base"))
    config = json.loads((base / "config.json").read_text())
    edit_json(base / "config.json", quantization_config=config["quantization_config"] | settings)
    return base, write_adapter(folder / "adapter", dict(read_checkpoint(base).config or {}))


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("ct-w4a16-g32-sym", {"ignore": ["lm_head", f"re:{ENDLESS}"]}),
        ("ct-w4a16-g32-sym", {"config_groups": {"group_0": {"targets": [r"re:(\w+\.?)+!"]}}}),
        ("bnb-nf4", {"llm_int8_skip_modules": [ENDLESS]}),
        ("gptq-4bit-g32", {"dynamic": {f"-:{ENDLESS}": {}}}),
    ],
)
def test_an_expression_without_end_is_refused(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = _varied(case, tmp_path, **settings)
    start = time.monotonic()
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    assert time.monotonic() - start < 6
    only_complaint(ran, 3, "quantization settings", "2 seconds")


@pytest.mark.parametrize(
    "ignore", [["lm_head", r"re:.*\.layers\.(0|1)\.nothing.*(a|b)$"], ["lm_head", "re:["], ["(+"]]
)
def test_expressions_that_end_or_are_none_do_no_harm(ignore: list[str], tmp_path: Path) -> None:
    base, adapter = _varied("ct-w4a16-g32-sym", tmp_path, ignore=ignore)
    ran = run("inspect", adapter, "--base", base, "--quantized", "keep")
    assert ran.code == 0, ran
    assert "refused" not in ran.stdout
