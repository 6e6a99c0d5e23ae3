"""Infinities in ``config.json``.

As transformers 5 writes them (``{"__float__": "Infinity"}``) and as files of the hub have them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import merge, run

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "Mamba2ForCausalLM": (
        {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1, "expand": 2,
         "head_dim": 16, "num_heads": 4,
         "n_groups": 1, "chunk_size": 8},
        ["in_proj", "out_proj", "lm_head"],
    ),
    "BambaForCausalLM": (
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4,
         "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16,
         "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8},
        ["k_proj", "v_proj", "down_proj", "lm_head"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers
    from peft import IA3Config, get_peft_model

    config, targets = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    cls = getattr(transformers, request.param)
    model = cls(cls.config_class(**config, time_step_limit=(0.0, float("inf")), tie_word_embeddings=False))
    model.save_pretrained(folder / "v5")
    shutil.copytree(folder / "v5", folder / "hub")
    plain = json.loads((folder / "v5/config.json").read_text())
    assert plain["time_step_limit"][1] == {"__float__": "Infinity"}
    (folder / "hub/config.json").write_text(json.dumps(plain | {"time_step_limit": [0.0, float("inf")]}))
    tuned = get_peft_model(
        model,
        IA3Config(
            target_modules=targets,
            feedforward_modules=[name for name in targets if name in ("down_proj", "out_proj")],
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("form", ["v5", "hub"])
def test_both_forms_are_read_and_the_bases_own_is_written(saved: Path, tmp_path: Path, form: str) -> None:
    def limit(folder: Path) -> Any:
        return json.loads((folder / "config.json").read_text())["time_step_limit"]

    base, adapter = saved / form, saved / "adapter"
    inspected = run("inspect", adapter, "--base", base, "--json")
    assert inspected.code == 0 and not json.loads(inspected.stdout)["plan"]["refusals"], inspected
    merge(base, adapter, tmp_path / "same")
    merge(base, adapter, tmp_path / "cast", "--dtype", "bfloat16")
    assert limit(tmp_path / "same") == limit(tmp_path / "cast") == limit(base)
    proof = run("verify", "--base", base, "--adapter", adapter, "--merged", tmp_path / "same")
    assert proof.code == 0, proof
