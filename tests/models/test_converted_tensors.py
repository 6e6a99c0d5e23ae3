"""Bases whose tensors transformers splits and renames while loading.

Merged through its own operations, or refused by name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ia3_export import Recipe
from ia3_export.adapters import read_adapter
from ia3_export.planning.plan import make_plan
from ia3_export.quantization.base import read_base
from tests.e2e.command import edit_json, merge, only_complaint, run

pytestmark = pytest.mark.filterwarnings("ignore")

_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 48}
MOLMO2 = {
    "text_config": _SMALL | {"num_key_value_heads": 2, "vocab_size": 128, "additional_vocab_size": 8,
        "num_hidden_layers": 2,
                             "rope_scaling_layers": [0, 1]},
    "vision_config": _SMALL | {"num_key_value_heads": 4, "num_hidden_layers": 1, "image_size": [16, 16],
        "patch_size": 8,
                               "num_position_embeddings": 4},
    "adapter_config": _SMALL | {"num_key_value_heads": 4, "vision_feature_layer": [0, -1],
        "text_hidden_size": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def molmo2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """Molmo2 stores queries, keys and values in one tensor (unequal parts), gate and up in another."""
    import torch
    import transformers
    from peft import IA3Config, get_peft_model

    folder = tmp_path_factory.mktemp("molmo2")
    torch.manual_seed(0)
    cls = transformers.Molmo2ForConditionalGeneration
    model = cls(cls.config_class(**MOLMO2))
    model.save_pretrained(folder / "base")
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=["down_proj"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder / "adapter")
    return cls, folder / "base", folder / "adapter"


def test_unequal_parts_of_one_tensor_get_their_own_vectors(
    molmo2: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel

    cls, base, adapter = molmo2
    merge(base, adapter, tmp_path / "out")
    ids = {"input_ids": torch.arange(3, 20)[None]}
    with torch.no_grad():
        live = PeftModel.from_pretrained(cls.from_pretrained(base), adapter).eval()(**ids).logits
        merged = cls.from_pretrained(tmp_path / "out").eval()(**ids).logits
    torch.testing.assert_close(merged, live, rtol=1e-5, atol=1e-6)
    assert run("inspect", adapter, "--base", base).code == 0
    proof = run("verify", "--base", base, "--adapter", adapter, "--merged", tmp_path / "out")
    assert proof.code == 0, proof


def test_multipliers_of_split_tensors_are_no_larger_than_their_rows(
    molmo2: tuple[Any, Path, Path],
) -> None:
    _, base, adapter = molmo2
    plan = make_plan(read_base(base), [read_adapter(adapter)], Recipe())
    fused = [change for change in plan.changes.values() if change.name.endswith("att_proj.weight")]
    assert len(fused) == 2 and all(len(change.scales) == 3 for change in fused)
    assert all(
        scale.axis(change.shape) is not None for change in plan.changes.values() for scale in change.scales
    )


def test_tensors_that_transformers_cannot_convert_are_refused_by_name(
    molmo2: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    _, base, adapter = molmo2
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    fused = next(name for name in tensors if name.endswith("blocks.1.self_attn.att_proj.weight"))
    tensors[fused] = tensors[fused][:-2].clone()
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    ran = run("merge", "--base", tmp_path / "base", "--adapter", adapter, "--output", tmp_path / "out")
    only_complaint(ran, 3, "layers.1.self_attn.q_proj.weight", "split_with_sizes")
    ran = run("inspect", adapter, "--base", tmp_path / "base")
    assert ran.code == 0 and "refused: transformers cannot make" in ran.stdout, ran


def test_a_configuration_of_another_size_is_refused_by_name(
    molmo2: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    _, base, adapter = molmo2
    shutil.copytree(base, tmp_path / "base")
    edit_json(
        tmp_path / "base/config.json",
        text_config=MOLMO2["text_config"] | {"num_key_value_heads": 4, "model_type": "molmo2_text"},
    )
    ran = run("merge", "--base", tmp_path / "base", "--adapter", adapter, "--output", tmp_path / "out")
    assert ran.code == 3 and "Traceback" not in ran.stderr, ran
