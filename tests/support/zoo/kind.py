"""What a row of the zoo is, and the sizes and targets that many rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One tiny model and the IA3 adapter that goes with it."""

    name: str
    """The pytest id."""
    model_class: str
    """A model class of transformers, by name."""
    config_class: str
    """A config class of transformers, by name."""
    config: Mapping[str, Any] = field(hash=False)
    """Keyword arguments of the config class: tiny sizes."""
    _: KW_ONLY
    targets: tuple[str, ...] | None = None
    """``target_modules``; ``None`` leaves the choice to PEFT's default table."""
    feedforward: tuple[str, ...] | None = None
    """``feedforward_modules``; ``None`` together with ``targets``."""
    task_type: str | None = None
    """``"CAUSAL_LM"``, ``"SEQ_CLS"``, ...; ``None`` gives IA3Config no task type."""
    peft_merge: str | None = None
    """Why PEFT cannot merge this kind, or merges it wrongly.  ``None``: ``merge_and_unload`` is right."""


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LLAMA: dict[str, Any] = {
    **IDS,
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA: dict[str, Any] = {**LLAMA, "head_dim": 8}
MOE: dict[str, Any] = {**LLAMA, "intermediate_size": 24, "num_experts_per_tok": 2}
LLAMA4: dict[str, Any] = {
    **MOE,
    "intermediate_size_mlp": 48,
    "head_dim": 8,
    "num_experts_per_tok": 1,
    "num_local_experts": 2,
    "moe_layers": [1],
}

BERT: dict[str, Any] = {
    **IDS,
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
BERT_CLS: dict[str, Any] = {**BERT, "num_labels": 3}
DEBERTA: dict[str, Any] = {**BERT_CLS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

GPT2: dict[str, Any] = {
    **IDS,
    "vocab_size": 128,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}

FALCON: dict[str, Any] = {
    **IDS,
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 64,
}

T5: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}

BART: dict[str, Any] = {
    **IDS,
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "num_labels": 3,
}
DINO: dict[str, Any] = {**without(VIT, "intermediate_size"), "mlp_ratio": 2}
VISION_TOWER: dict[str, Any] = without(VIT, "num_labels")
CLIP_TEXT: dict[str, Any] = {**without(BERT, "type_vocab_size"), "projection_dim": 16}
CLIP_VISION: dict[str, Any] = {**VISION_TOWER, "projection_dim": 16}

SPEECH: dict[str, Any] = {
    **IDS,
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}

# Targets that many kinds share.
KV_DOWN: dict[str, Any] = {"targets": ("k_proj", "v_proj", "down_proj"), "feedforward": ("down_proj",)}
KV_FC2: dict[str, Any] = {"targets": ("k_proj", "v_proj", "fc2"), "feedforward": ("fc2",)}
KV_OUTPUT: dict[str, Any] = {"targets": ("key", "value", "output.dense"), "feedforward": ("output.dense",)}
KV_SPEECH: dict[str, Any] = {
    "targets": ("k_proj", "v_proj", "output_dense"),
    "feedforward": ("output_dense",),
}
KV_ONLY: dict[str, Any] = {"targets": ("k_proj", "v_proj"), "feedforward": ()}

COMPOSITE_HEAD = (
    "merge_and_unload raises AttributeError: PEFT copies .weight from the head in modules_to_save, "
    "and this head is a module of several layers"
)
