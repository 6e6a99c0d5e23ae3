"""``ia3-export merge`` of several adapters, against PEFT's answer and against single merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.command import contents, merge, run
from tests.e2e.conftest import Tiny
from tests.support.merged import (
    PEFT_WARNINGS,
    different,
    peft_merge,
    same_weights,
)
from tests.support.tensors import read_folder

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = PEFT_WARNINGS

# -----------------------------------------------------------------------------------------------
# several adapters


def merge_both(tiny: Tiny, output: Path, *more: str) -> dict[str, Tensor]:
    ran = run(
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        tiny.adapter,
        "--adapter",
        tiny.other,
        "--output",
        output,
        *more,
    )
    assert ran.code == 0, ran
    return read_folder(output)


def test_a_product_has_the_bits_of_pefts_sequential_merge(tiny: Tiny, tmp_path: Path) -> None:
    merged = merge_both(tiny, tmp_path / "merged")
    assert not different(merged, peft_merge(tiny.base, [tiny.adapter, tiny.other]))
    assert different(merged, peft_merge(tiny.base, [tiny.other, tiny.adapter])), (
        "else the order would not be tested"
    )


def test_a_product_is_two_merges_one_after_the_other(tiny: Tiny, tmp_path: Path) -> None:
    merge_both(tiny, tmp_path / "merged")
    merge(tiny.merged, tiny.other, tmp_path / "second")
    assert same_weights(tmp_path / "merged", tmp_path / "second")


def test_a_product_in_low_memory_casting_has_pefts_bits(tiny: Tiny, tmp_path: Path) -> None:
    merged = merge_both(tiny, tmp_path / "merged", "--cast", "peft-low-mem")
    assert not different(merged, peft_merge(tiny.base, [tiny.adapter, tiny.other], low_cpu_mem_usage=True))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (0.1, -2.5)], ids=str)
@pytest.mark.parametrize("base", ["single", "base"], ids=["float32", "bfloat16"])
def test_a_linear_combination_has_the_bits_of_add_weighted_adapter(
    tiny: Tiny, tmp_path: Path, base: str, weights: tuple[float, float]
) -> None:
    adapters, text = [tiny.adapter, tiny.other], ",".join(map(str, weights))
    args = ("--combine", "linear", "--weights", text, "--adapter", tiny.other)
    merge(getattr(tiny, base), tiny.adapter, tmp_path / "merged", *args)
    assert not different(
        read_folder(tmp_path / "merged"), peft_merge(getattr(tiny, base), adapters, weights=weights)
    )


def test_a_delta_combination_counts_a_missing_vector_as_ones(tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    merged = merge_both(tiny, tmp_path / "merged", "--combine", "delta", "--weights", "0.7,0.3")
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (tiny.adapter, tiny.other)]
    expected = {}
    for name, weight in read_folder(tiny.base).items():
        change = torch.zeros(1, dtype=torch.float64)
        for vectors, share in zip(adapters, (0.7, 0.3), strict=True):
            vector = vectors.get(f"base_model.model.{name.removesuffix('.weight')}.ia3_l", torch.ones(1))
            change = change + share * (vector.to(torch.float64) - 1)
        expected[name] = (weight.to(torch.float32) * (1 + change).to(torch.float32)).to(weight.dtype)
    assert not different(merged, expected)


def test_one_output_per_adapter_equals_single_merges(tiny: Tiny, tmp_path: Path) -> None:
    ran = run(
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        tiny.adapter,
        "--adapter",
        tiny.other,
        "--output-per-adapter",
        tmp_path / "each",
    )
    assert ran.code == 0, ran
    merge(tiny.base, tiny.other, tmp_path / "other")
    assert {path.name for path in (tmp_path / "each").iterdir()} == {"adapter", "other"}
    assert contents(tmp_path / "each" / "adapter") == contents(tiny.merged)
    assert contents(tmp_path / "each" / "other") == contents(tmp_path / "other")


def test_one_output_per_adapter_is_one_json_document(tiny: Tiny, tmp_path: Path) -> None:
    ran = run(
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        tiny.adapter,
        "--adapter",
        tiny.other,
        "--output-per-adapter",
        tmp_path / "each",
        "--json",
    )
    written = [
        json.loads((tmp_path / "each" / name / "ia3_export.json").read_text())
        for name in ("adapter", "other")
    ]
    assert json.loads(ran.stdout) == {"manifests": written}
