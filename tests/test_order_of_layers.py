"""Layers are listed as people count them: 2 before 10."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import merge, run, vary_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    import transformers
    from peft import IA3Config, get_peft_model

    folder = tmp_path_factory.mktemp("deep")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    tuned = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data += 0.25
    tuned.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def _layers(names: list[str]) -> list[int]:
    return [int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))]


def test_inspect_and_the_manifest_list_layers_in_order(
    deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = deep
    monkeypatch.setenv("COLUMNS", "200")  # a row of the tables is a line
    content = json.loads(run("inspect", adapter, "--base", base, "--json").stdout)
    text = run("inspect", adapter, "--base", base, "--verbose").stdout.splitlines()
    merge(base, adapter, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/ia3_export.json").read_text())
    in_order = [layer for layer in range(12) for _ in range(3)]
    assert _layers([site["module"] for site in content["sites"]]) == in_order
    assert _layers([change["tensor"] for change in content["plan"]["changes"]]) == in_order
    assert _layers([line for line in text if "adapter: " not in line and "layers." in line]) == in_order
    assert _layers([line for line in text if "adapter: " in line and "fold" in line]) == in_order
    assert _layers([change["tensor"] for change in manifest["changes"]]) == in_order


def test_the_first_of_what_is_missing_or_unused_is_of_the_first_layer(
    deep: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = deep

    def lose(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if re.search(r"layers\.(2|10)\..*k_proj", name)]:
            del tensors[name]

    ran = run(
        "merge",
        "--base",
        base,
        "--adapter",
        vary_adapter(adapter, tmp_path / "few", lose),
        "--output",
        tmp_path / "out",
    )
    assert "first: model.layers.2.self_attn.k_proj" in ran.stderr

    def deepen(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if re.search(r"layers\.(2|10)\..*k_proj", name)]:
            tensors[re.sub(r"layers\.(\d+)", r"blocks.\1", name)] = tensors[name]

    ran = run(
        "merge",
        "--base",
        base,
        "--adapter",
        vary_adapter(adapter, tmp_path / "odd", deepen),
        "--output",
        tmp_path / "out",
    )
    assert "first: model.blocks.2.self_attn.k_proj" in ran.stderr


def test_a_comparison_of_equal_layers_counts_them(deep: tuple[Path, Path]) -> None:
    ran = run("inspect", "--compare", deep[1], deep[1], "--json")
    modules = [site["module"] for site in json.loads(ran.stdout)["sites"]]
    layers = [int(found.group(1)) for module in modules if (found := re.search(r"layers\.(\d+)\.", module))]
    assert layers == sorted(layers) and max(layers) == 11
