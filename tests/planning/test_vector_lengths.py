"""Vectors of the wrong length that fit a weight's other side, and models that hold Linear and Conv1D at once.

A sharded save leaves halves of vectors, and half of an output is often as long as the input. What is right is
PEFT's live forward.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import edit_json, merge, only_complaint, run, vary_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8,
}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
       "image_size": 16, "patch_size": 8}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}


def _write(model: Any, folder: Path, targets: list[str], inputs: list[str]) -> tuple[Path, Path]:
    """A base and an adapter with random vectors, by transformers and PEFT."""
    import torch
    from peft import IA3Config, get_peft_model

    model.save_pretrained(folder / "base")
    tuned = get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=inputs))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def _cut(part: int) -> Callable[[dict[str, Any]], None]:
    """What rank 0 of a sharded run saves: the first of `part` pieces of every tensor."""

    def edit(tensors: dict[str, Any]) -> None:
        for name, value in tensors.items():
            tensors[name] = value[: max(1, len(value) // part)].copy()

    return edit


def _qwen() -> Any:
    import transformers

    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA))


def _gpt2() -> Any:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


def _edit_config(base: Path, **changes: Any) -> None:
    edit_json(base / "config.json", **changes)


def _without_config(base: Path) -> None:
    (base / "config.json").unlink()


@pytest.mark.parametrize(
    "edit",
    [lambda _: None, lambda base: _edit_config(base, model_type="of_our_own"), _without_config],
    ids=["known type", "unknown type", "no configuration"],
)
def test_half_a_vector_that_fits_the_other_side_of_a_linear_is_refused(
    tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    base, whole = _write(_qwen(), tmp_path, ["q_proj"], [])
    edit(base)
    adapter = vary_adapter(whole, tmp_path / "half", _cut(2))
    for command in (("merge", "--output", tmp_path / "out"), ("verify", "--merged", base)):
        ran = run(command[0], "--base", base, "--adapter", adapter, *command[1:])
        only_complaint(ran, 3, "layers.0.self_attn.q_proj", "32 elements", "[64, 32]")
        assert "the vector was cut" in ran.stderr
    assert "refused: the vector of" in run("inspect", adapter, "--base", base).stdout


def test_a_third_of_a_vector_that_fits_the_other_side_of_a_conv1d_is_refused(tmp_path: Path) -> None:
    base, whole = _write(_gpt2(), tmp_path, ["c_attn"], [])
    adapter = vary_adapter(whole, tmp_path / "third", _cut(3))
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    only_complaint(ran, 3, "transformer.h.0.attn.c_attn", "32 elements", "[32, 96]")


def test_vectors_that_disagree_on_an_unknown_model_are_refused(tmp_path: Path) -> None:
    base, whole = _write(_qwen(), tmp_path, ["q_proj", "o_proj"], [])
    _without_config(base)

    def cut_one(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if "layers.1.self_attn.q_proj" in name)
        tensors[name] = tensors[name][:32].copy()

    adapter = vary_adapter(whole, tmp_path / "cut", cut_one, fan_in_fan_out=None)
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    only_complaint(ran, 3, "layers.1.self_attn.q_proj")


def test_conv1d_without_a_configuration_is_told_by_all_vectors_and_warned_of(tmp_path: Path) -> None:
    base, adapter = _write(_gpt2(), tmp_path, ["c_attn", "attn.c_proj", "mlp.c_proj"], ["mlp.c_proj"])
    merge(base, adapter, tmp_path / "known")
    _without_config(base)
    ran = merge(base, adapter, tmp_path / "unknown")
    assert "no config.json" in ran.stdout and "Conv1D" in ran.stdout
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("known", "unknown")]
    assert weights[0] == weights[1]


def _vision_encoder_decoder() -> tuple[Any, dict[str, Any], list[str], list[str]]:
    import torch
    import transformers

    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VIT),
        transformers.GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True),
    )
    config.tie_word_embeddings = False
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16), "decoder_input_ids": torch.arange(3, 9)[None]}
    targets = [
        "k_proj",
        "v_proj",
        "key",
        "value",
        "attn.c_proj",
        "c_attn",
        "mlp.c_proj",
        "fc2",
        "output.dense",
    ]
    return transformers.VisionEncoderDecoderModel(config), inputs, targets, ["mlp.c_proj", "fc2"]


def _clvp_like() -> tuple[Any, dict[str, Any], list[str], list[str]]:
    import torch
    import transformers

    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        ),
        transformers.GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True),
    )
    config.tie_word_embeddings = False
    inputs = {"input_ids": torch.arange(3, 12)[None], "decoder_input_ids": torch.arange(3, 9)[None]}
    targets = ["query", "key", "value", "attn.c_proj", "mlp.c_proj", "attention.output.dense"]
    return transformers.EncoderDecoderModel(config), inputs, targets, ["mlp.c_proj"]


@pytest.mark.parametrize("make", [_vision_encoder_decoder, _clvp_like], ids=["vit + gpt2", "bert + gpt2"])
def test_linear_and_conv1d_in_one_model_are_told_apart_by_its_class(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    import torch
    from peft import PeftModel

    torch.manual_seed(0)
    model, inputs, targets, feedforward = make()
    base, adapter = _write(model, tmp_path, targets, feedforward)
    merge(base, adapter, tmp_path / "out")
    cls = type(model)
    with torch.no_grad():
        plain = cls.from_pretrained(base).eval()(**inputs).logits
        live = PeftModel.from_pretrained(cls.from_pretrained(base), adapter).eval()(**inputs).logits
        merged = cls.from_pretrained(tmp_path / "out").eval()(**inputs).logits
    assert float((live - plain).abs().max()) > 1e-3
    torch.testing.assert_close(merged, live, rtol=1e-5, atol=1e-6)


def test_half_a_vector_that_makes_other_groups_of_a_convolution_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.MobileViTConfig(
        hidden_sizes=[8, 16, 24],
        neck_hidden_sizes=[4, 8, 8, 8, 8, 8, 8],
        num_attention_heads=2,
        image_size=32,
    )
    base, whole = _write(
        transformers.MobileViTModel(config), tmp_path, ["conv_3x3.convolution"], ["conv_3x3.convolution"]
    )
    merge(base, whole, tmp_path / "whole")

    def halve(tensors: dict[str, Any]) -> None:
        for name, value in tensors.items():
            tensors[name] = value[:, : value.shape[1] // 2].copy()

    adapter = vary_adapter(whole, tmp_path / "half", halve)
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    only_complaint(ran, 3, "conv_3x3.convolution")
