"""What a GGUF file says of its model: architecture of llama.cpp, names of tensors, ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.header import damaged
from ia3_export.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp's converter (``conversion/*.py``) makes of a Hugging Face model.

    `permuted`: rows of q and k lie in the order of consecutive rotary pairs (``LlamaModel.permute``). All
    other rows keep their order. `shifted`: norms are stored plus one. `leaves` replaces entries of `_LEAVES`,
    `settings` adds to `_CONFIG`.
    """

    model_type: str
    class_name: str
    _: KW_ONLY
    permuted: bool = False
    shifted: bool = False
    leaves: Mapping[str, str] | None = None
    settings: Mapping[str, str] | None = None


_GEMMA_NORMS = {"ffn_norm": "pre_feedforward_layernorm"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GRANITE = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
_LOGIT_SCALE = {"logit_scale": "logit_scale"}
#: Layers of the one size of a family whose attention is scaled by the width of a head's share of the model,
#: not by that of a head (llama.cpp's ``LLM_TYPE_27B``).
_WIDE_SCALE = {"gemma2": 46, "gemma3": 62}
#: Tensors that change the rotary embedding, and of which config.json has no word.
_ROTARY = re.compile(r"rope_(freqs|factors_(long|short))\.weight")
#: Architectures whose conversion has been read: which rows move there is not to be guessed.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),  # Mistral too
    "granite": Architecture("granite", "GraniteForCausalLM", permuted=True, settings=_GRANITE),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", permuted=True),
    "olmo": Architecture(
        "olmo", "OlmoForCausalLM", permuted=True, settings={"attention.clamp_kqv": "clip_qkv"}
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM"),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma": Architecture("gemma", "GemmaForCausalLM", shifted=True),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", shifted=True, leaves=_GEMMA_NORMS, settings=_WINDOW | _SOFTCAPS
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", shifted=True, leaves=_GEMMA_NORMS, settings=_WINDOW | _SOFTCAPS
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", leaves={"ffn_up": "mlp.gate_up_proj"}, settings=_WINDOW),
    "command-r": Architecture("cohere", "CohereForCausalLM", settings=_LOGIT_SCALE),
    "cohere2": Architecture("cohere2", "Cohere2ForCausalLM", settings=_LOGIT_SCALE | _WINDOW),
}

_LEAVES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z0-9_]+)\.(weight|bias)")


def find_architecture(path: Path, values: Mapping[str, Any]) -> Architecture:
    """The architecture that the metadata `values` name. Raises `DamagedFile` and `Unsupported`."""
    name = values.get("general.architecture")
    if not isinstance(name, str):
        raise damaged(path, "its metadata names no general.architecture")
    if values.get("general.type", "model") != "model":
        raise Unsupported(
            f"{path} is a GGUF {values['general.type']}, no model",
            hint="--base takes the model that was trained on",
        )
    parts = values.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise Unsupported(
            f"{path} is one of {values['split.count']} parts of a model",
            hint="join them first: llama-gguf-split --merge FIRST_PART OUTPUT.gguf",
        )
    if name not in ARCHITECTURES:
        raise Unsupported(
            f"{path} holds a model of llama.cpp's architecture {name!r}, whose conversion this version "
            "does not know",
            hint=f"known are {', '.join(ARCHITECTURES)}; or merge into the Hugging Face checkpoint and "
            "convert that",
        )
    return ARCHITECTURES[name]


def hugging_face_name(name: str, known: Architecture) -> str | None:
    """The Hugging Face name of a tensor of a GGUF file."""
    module, _, leaf = name.rpartition(".")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{leaf}"
    match = _BLOCK.fullmatch(name)
    part = (dict(_LEAVES) | dict(known.leaves or {})).get(match[2]) if match else None
    return f"model.layers.{match[1]}.{part}.{match[3]}" if match and part else None


def config_of_metadata(
    path: Path,
    values: Mapping[str, Any],
    known: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, str],
) -> dict[str, Any]:
    """What ``config.json`` would say, as far as the metadata `values` tell.

    `shapes` are those of all tensors by name, `types` the ggml types of the coded ones.
    """
    prefix = values["general.architecture"]
    mixtral = known.model_type == "llama" and values.get(f"{prefix}.expert_count")
    config: dict[str, Any] = {
        "model_type": "mixtral" if mixtral else known.model_type,
        "architectures": ["MixtralForCausalLM" if mixtral else known.class_name],
    }
    for key, entry in (_CONFIG | dict(known.settings or {})).items():
        value = values.get(f"{prefix}.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            config[entry] = value
    if "model.embed_tokens.weight" in shapes:
        config["vocab_size"] = shapes["model.embed_tokens.weight"][0]
    rotary = _rotary(values, prefix)
    if rotary:
        config["rope_parameters"] = rotary
    if prefix in _WIDE_SCALE:
        config.update(_gemma(config, values, prefix))
    if any(name.endswith("q_proj.bias") for name in shapes):
        config["attention_bias"] = True
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    rows = dict(_permuted(path, values, shapes)) if known.permuted else {}
    if types:
        config["dtype"] = "float16"
    shifted = [name for name in shapes if known.shifted and name.endswith("norm.weight")]
    if types or rows or shifted:
        config["quantization_config"] = {
            "quant_method": "gguf",
            "types": dict(types),
            "head_rows": rows,
            "shifted": shifted,
            "not_in_forward": list(_not_in_forward(values, prefix, shapes)),
        }
    return config


def _rotary(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``rope_parameters``, as far as the metadata state them."""
    theta = values.get(f"{prefix}.rope.freq_base")
    if not isinstance(theta, int | float):
        return {}
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind, factor = values.get(f"{prefix}.rope.scaling.type"), values.get(f"{prefix}.rope.scaling.factor")
    if kind in ("linear", "yarn") and isinstance(factor, int | float):
        found |= {"rope_type": kind, "factor": factor}
        before = values.get(f"{prefix}.rope.scaling.original_context_length")
        if kind == "yarn" and isinstance(before, int):
            found["original_max_position_embeddings"] = before
    return found


def _gemma(config: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """What llama.cpp knows of Gemma without being told: attention's scale, local layers' rotary embedding."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("num_hidden_layers") == _WIDE_SCALE[prefix] and heads and width:
        yield "query_pre_attn_scalar", width // heads
    elif "head_dim" in config:
        yield "query_pre_attn_scalar", config["head_dim"]
    if prefix == "gemma3" and "rope_parameters" in config:
        local = values.get("gemma3.rope.freq_base_swa", 10000.0)
        yield (
            "rope_parameters",
            {
                "full_attention": config["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        )


def _not_in_forward(
    values: Mapping[str, Any], prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """What the file says of its model and the config.json made here does not.

    A forward of transformers then leaves it out.
    """
    yield from sorted(name for name in shapes if _ROTARY.fullmatch(name))
    kind = values.get(f"{prefix}.rope.scaling.type")
    if kind is not None and kind not in ("none", "linear", "yarn"):
        yield f"{prefix}.rope.scaling.type {kind!r}"


_CONFIG = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "layer_norm_eps",
    "context_length": "max_position_embeddings", "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}  # fmt: skip


def _permuted(
    path: Path, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int]]:
    """The tensors whose rows are permuted head by head, with the rows of one head."""
    prefix = values["general.architecture"]
    for name, shape in shapes.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.([qk])_proj\.(weight|bias)", name)
        if match is None:
            continue
        heads = values.get(f"{prefix}.attention.head_count")
        if match[2] == "k":
            heads = values.get(f"{prefix}.attention.head_count_kv", heads)
        if isinstance(heads, list):
            heads = heads[int(match[1])] if int(match[1]) < len(heads) else None
        rows = shape[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise damaged(path, f"tensor {name} has {rows} rows for {heads!r} heads")
        yield name, rows // heads
