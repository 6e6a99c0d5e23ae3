"""Vectors that training never moved.

Where a vector could not be folded, one of exactly ones changes nothing and blocks nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import merge, only_complaint, run

pytestmark = pytest.mark.filterwarnings("ignore")

SIGLIP = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 16,
          "patch_size": 8}  # fmt: skip


def _trained(
    model: Any, inputs: dict[str, Any], folder: Path, targets: str | list[str]
) -> tuple[Path, Path, Any]:
    """A base, an adapter that was really trained for a few steps, and its output."""
    import torch
    from peft import IA3Config, get_peft_model

    model.save_pretrained(folder / "base")
    tuned = get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=r".*fc2")).train()
    optimizer = torch.optim.AdamW(
        [p for p in tuned.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0
    )
    for _ in range(3):
        optimizer.zero_grad()
        tuned(**inputs)[0].float().square().mean().backward()
        optimizer.step()
    tuned.eval().save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder / "base", folder / "adapter", tuned(**inputs)[0]


def _siglip() -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def test_all_linear_on_an_attention_that_never_calls_its_projection(tmp_path: Path) -> None:
    import torch

    model, inputs = _siglip()
    base, adapter, live = _trained(model, inputs, tmp_path, "all-linear")
    ran = merge(base, adapter, tmp_path / "out")
    assert "head.attention.out_proj is all ones and changes nothing" in ran.stdout
    merged = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs)[0], live, rtol=1e-4, atol=1e-5)
    proof = run("verify", "--base", base, "--adapter", adapter, "--merged", tmp_path / "out")
    assert proof.code == 0, proof


def test_a_vector_that_is_no_one_is_still_refused_there(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, inputs = _siglip()
    base, adapter, _ = _trained(model, inputs, tmp_path, "all-linear")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "head.attention.out_proj" in name)
    tensors[name][3] += 2**-20
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    only_complaint(ran, 3, "head.attention.out_proj", "MultiheadAttention")


@pytest.mark.parametrize("value", [1.0, 1.5])
def test_a_parametrized_weight(tmp_path: Path, value: float) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_feat_extract_layers=2,
    )
    model = transformers.Wav2Vec2Model(config)
    base, adapter, _ = _trained(model, {"input_values": torch.randn(2, 400)}, tmp_path, ["k_proj", "v_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.encoder.pos_conv_embed.conv.ia3_l"] = torch.full((32, 1), value)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    if value == 1.0:
        assert ran.code == 0 and "pos_conv_embed.conv is all ones" in ran.stdout, ran
    else:
        only_complaint(ran, 3, "pos_conv_embed.conv is parametrized")
