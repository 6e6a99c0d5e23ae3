"""Bases that were saved while PEFT wrapped them.

Read under the model's own names, without the adapter in them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.e2e.command import merge, run
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = {"input_ids": torch.arange(5, 14)[None]}


def _write(folder: Path, kind: zoo.Kind, how: str) -> PeftModel:
    """``base`` as `how` says, ``adapter``, and the live model."""
    model = zoo.build(kind)
    model.save_pretrained(folder / "base")
    live = zoo.adapt(model, kind).eval()
    live.save_pretrained(folder / "adapter")
    if how == "state dict":
        state = {name: tensor.contiguous().clone() for name, tensor in live.state_dict().items()}
        save_file(state, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    else:
        live.get_base_model().save_pretrained(
            folder / "base", max_shard_size="20KB" if how == "shards" else "5GB"
        )
        if how == "shards":
            (folder / "base" / "model.safetensors").unlink()
    return live


@pytest.mark.parametrize("how", ["save_pretrained", "shards", "state dict"])
@pytest.mark.parametrize("name", ["llama", "bert-seq-cls"])
def test_a_wrapped_base_merges_to_the_live_model(name: str, how: str, tmp_path: Path) -> None:
    import transformers

    kind = zoo.by_name(name)
    live = _write(tmp_path, kind, how)
    ran = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert "was saved inside a wrapper" in ran.stdout + ran.stderr
    cls = getattr(transformers, kind.model_class)
    merged, report = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        wanted, got = live(**INPUTS).logits.numpy(), merged.eval()(**INPUTS).logits.numpy()
        with live.disable_adapter():
            effect = np.abs(live(**INPUTS).logits.numpy() - wanted).max()
    assert np.abs(got - wanted).max() < 1e-5 < 1e-2 * effect


def test_verify_loads_it_under_the_same_names(tmp_path: Path) -> None:
    kind = zoo.by_name("llama")
    _write(tmp_path, kind, "save_pretrained")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    sources = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    ran = run("verify", *sources, "--merged", tmp_path / "merged")
    assert ran.code == 0, ran.stdout + ran.stderr
    merged = tmp_path / "merged" / "model.safetensors"
    state = load_file(merged)
    state["model.layers.0.self_attn.k_proj.weight"] *= 1.5
    save_file(state, merged, metadata={"format": "pt"})
    assert run("verify", *sources, "--merged", tmp_path / "merged").code == 1


def test_a_base_under_another_method_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    kind = zoo.by_name("llama")
    _write(tmp_path, kind, "save_pretrained")
    other = get_peft_model(zoo.build(kind), LoraConfig(target_modules=["q_proj"]))
    other.get_base_model().save_pretrained(tmp_path / "base")
    ran = run(
        "merge", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"
    )
    assert ran.code == 3
    assert "saved while PEFT wrapped it" in ran.stderr and "lora_" in ran.stderr


def test_a_module_that_is_called_base_layer_is_no_wrapper(tmp_path: Path) -> None:
    """As the first convolutions of timm's DLA."""
    kind = zoo.by_name("llama")
    _write(tmp_path, kind, "plain")
    model = zoo.build(kind)
    model.save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["tower.base_layer.0.weight"] = torch.ones(3, 3)
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    ran = run("inspect", tmp_path / "adapter", "--base", tmp_path / "base", "--json")
    assert ran.code == 0
    assert "wrapped" not in json.dumps(json.loads(ran.stdout))
