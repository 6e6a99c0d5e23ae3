"""GGUF files of other architectures than Llama's.

What the file says of its model is what the forward computes.

The files are written here as llama.cpp's converter writes them (``conversion/gemma.py``, ``granite.py``), by
the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.checkpoint.gguf_models import ARCHITECTURES, hugging_face_name
from tests.e2e.command import run
from tests.support.quantized import dense_model, logits, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

_COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _write(model: Any, arch: str, path: Path, extra: Mapping[str, Any], quantized: bool) -> Path:
    """`model` as the converter lays it out.

    Norms of Gemma plus one, projections in Q8_0 or float32, its numbers as metadata.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for key, value in extra.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{arch}.{key}", value)
    known = ARCHITECTURES[arch]
    names = [f"blk.{i}.{leaf}.weight" for i in range(config.num_hidden_layers) for leaf in _LEAVES]
    names += ["token_embd.weight", "output_norm.weight", "output.weight"]
    state = dict(model.state_dict())
    for name in names:
        tensor = state.pop(str(hugging_face_name(name, known)), None)
        if tensor is None or (name == "output.weight" and config.tie_word_embeddings):
            continue
        values = tensor.float().numpy()
        if known.shifted and name.endswith("norm.weight"):
            values = values + 1
        if known.permuted and name.endswith(("attn_q.weight", "attn_k.weight")):
            head = config.hidden_size // config.num_attention_heads
            values = values.reshape(-1, 2, head // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if quantized and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_LEAVES = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm", "ffn_norm",
    "post_attention_norm", "post_ffw_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip


def _gemma2() -> tuple[Any, Mapping[str, Any]]:
    config = transformers.Gemma2Config(
        **_COMMON,
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        sliding_window=4,
    )
    metadata = {
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "attention.sliding_window": 4,
        "rope.freq_base": 10000.0,
    }
    return transformers.Gemma2ForCausalLM(config), metadata


def _gemma() -> tuple[Any, Mapping[str, Any]]:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**_COMMON, head_dim=16)), {}


def _gemma3() -> tuple[Any, Mapping[str, Any]]:
    config = transformers.Gemma3TextConfig(
        **{**_COMMON, "num_hidden_layers": 6},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    metadata = {"attention.sliding_window": 4, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0}
    return transformers.Gemma3ForCausalLM(config), metadata


def _granite() -> tuple[Any, Mapping[str, Any]]:
    config = transformers.GraniteConfig(
        **_COMMON,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.1,
        logits_scaling=2.0,
    )
    metadata = {
        "embedding_scale": 3.0,
        "residual_scale": 0.5,
        "attention.scale": 0.1,
        "logit_scale": 2.0,
        "rope.freq_base": 10000.0,
    }
    return transformers.GraniteForCausalLM(config), metadata


MODELS: Mapping[str, Callable[[], tuple[Any, Mapping[str, Any]]]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "granite": _granite,
}


@pytest.fixture(params=[(arch, q) for arch in MODELS for q in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model whose norms are not what they are at first, and its file."""
    arch, quantized = request.param
    torch.manual_seed(0)
    model, metadata = MODELS[arch]()
    for name, parameter in model.named_parameters():
        parameter.data += (0.2 if "norm" in name else 0.1) * torch.randn_like(parameter)
    path = _write(model.eval(), arch, tmp_path / "model.gguf", metadata, quantized)
    if metadata.get("rope.scaling.factor"):
        path = _with_linear_scaling(model, arch, path, metadata, quantized)
    return model, path


def _with_linear_scaling(
    model: Any, arch: str, path: Path, metadata: Mapping[str, Any], quantized: bool
) -> Path:
    class Writer(gguf.GGUFWriter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.add_string(f"{arch}.rope.scaling.type", "linear")

    before, gguf.GGUFWriter = gguf.GGUFWriter, Writer
    try:
        return _write(model, arch, path, metadata, quantized)
    finally:
        gguf.GGUFWriter = before


def test_the_forward_is_that_of_the_model(written: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = written
    found, wanted = logits(dense_model(path)), logits(model.double())
    scale = np.linalg.norm(wanted)
    coded = read_checkpoint(path).config["quantization_config"]["types"]
    assert np.linalg.norm(found - wanted) < (0.05 if coded else 1e-5) * scale
    adapter = write_adapter(tmp_path / "adapter", dict(read_checkpoint(path).config or {}))
    out = tmp_path / "out"
    merging = ["merge", "--base", path, "--adapter", adapter, "--output", out]
    assert run(*merging).code == 0
    ran = run("verify", "--base", path, "--adapter", adapter, "--merged", out, "--device", "cpu")
    assert ran.code == 0, ran


def test_what_the_forward_leaves_out_is_said(tmp_path: Path) -> None:
    """Llama 3.1's factors of the rotary embedding lie in a tensor of the file."""
    torch.manual_seed(0)
    config = transformers.GraniteConfig(**_COMMON)
    model = transformers.GraniteForCausalLM(config)
    path = _write(model, "granite", tmp_path / "model.gguf", {"rope.freq_base": 1e4}, True)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "factors.gguf", "granite")
    for field in reader.fields.values():
        if field.name.startswith("granite."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor("rope_freqs.weight", np.ones(8, "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = write_adapter(tmp_path / "adapter", dict(read_checkpoint(path).config or {}))
    ran = run("verify", "--base", tmp_path / "factors.gguf", "--adapter", adapter, "--device", "cpu")
    assert ran.code == 0 and "rope_freqs.weight is not part of the forwards" in " ".join(
        (ran.stdout + ran.stderr).split()
    ), ran
