"""A zoo of tiny, randomly initialised transformers models for parametrised tests.

Each :class:`Kind` is one row: a model class, a config so small that the model has some ten thousand
parameters, and the modules that an IA3 adapter scales.  Nothing is downloaded and nothing heavy is imported
until a model is built, so that collecting tests over :data:`KINDS` stays cheap.

Where PEFT's own default table knows the model type, ``targets`` is ``None`` and PEFT chooses.  Elsewhere the
targets follow the paper: the key and value projections (or the fused projection that holds them) are scaled
on the output, the second feed-forward projection on the input.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

__all__ = ["KINDS", "Kind", "adapt", "build", "by_name", "example_inputs"]


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
    targets: tuple[str, ...] | None = None
    """``target_modules``; ``None`` leaves the choice to PEFT's default table."""
    feedforward: tuple[str, ...] | None = None
    """``feedforward_modules``; ``None`` together with ``targets``."""
    task_type: str | None = None
    """``"CAUSAL_LM"``, ``"SEQ_CLS"``, ...; ``None`` gives IA3Config no task type."""
    peft_merge: str | None = None
    """Why PEFT cannot merge this kind, or merges it wrongly.  ``None``: ``merge_and_unload`` is right."""


def _without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_LLAMA: dict[str, Any] = {
    **_IDS,
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA: dict[str, Any] = {**_LLAMA, "head_dim": 8}
_MOE: dict[str, Any] = {**_LLAMA, "intermediate_size": 24, "num_experts_per_tok": 2}
_LLAMA4: dict[str, Any] = {
    **_MOE,
    "intermediate_size_mlp": 48,
    "head_dim": 8,
    "num_experts_per_tok": 1,
    "num_local_experts": 2,
    "moe_layers": [1],
}

_BERT: dict[str, Any] = {
    **_IDS,
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
_BERT_CLS: dict[str, Any] = {**_BERT, "num_labels": 3}
_DEBERTA: dict[str, Any] = {**_BERT_CLS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

_GPT2: dict[str, Any] = {
    **_IDS,
    "vocab_size": 128,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}

_FALCON: dict[str, Any] = {
    **_IDS,
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 64,
}

_T5: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}

_BART: dict[str, Any] = {
    **_IDS,
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

_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "num_labels": 3,
}
_DINO: dict[str, Any] = {**_without(_VIT, "intermediate_size"), "mlp_ratio": 2}
_VISION_TOWER: dict[str, Any] = _without(_VIT, "num_labels")
_CLIP_TEXT: dict[str, Any] = {**_without(_BERT, "type_vocab_size"), "projection_dim": 16}
_CLIP_VISION: dict[str, Any] = {**_VISION_TOWER, "projection_dim": 16}

_SPEECH: dict[str, Any] = {
    **_IDS,
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
_KV_DOWN: dict[str, Any] = {"targets": ("k_proj", "v_proj", "down_proj"), "feedforward": ("down_proj",)}
_KV_FC2: dict[str, Any] = {"targets": ("k_proj", "v_proj", "fc2"), "feedforward": ("fc2",)}
_KV_OUTPUT: dict[str, Any] = {"targets": ("key", "value", "output.dense"), "feedforward": ("output.dense",)}
_KV_SPEECH: dict[str, Any] = {
    "targets": ("k_proj", "v_proj", "output_dense"),
    "feedforward": ("output_dense",),
}
_KV_ONLY: dict[str, Any] = {"targets": ("k_proj", "v_proj"), "feedforward": ()}

_COMPOSITE_HEAD = (
    "merge_and_unload raises AttributeError: PEFT copies .weight from the head in modules_to_save, "
    "and this head is a module of several layers"
)

KINDS: tuple[Kind, ...] = (
    # ------------------------------------------------------------------ PEFT's default table
    Kind("t5", "T5ForConditionalGeneration", "T5Config", _T5, task_type="SEQ_2_SEQ_LM"),
    Kind(
        "t5-gated",
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        task_type="SEQ_2_SEQ_LM",
    ),
    Kind("t5-encoder", "T5EncoderModel", "T5Config", _T5, task_type="FEATURE_EXTRACTION"),
    Kind("mt5", "MT5ForConditionalGeneration", "MT5Config", _T5, task_type="SEQ_2_SEQ_LM"),
    Kind("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2, task_type="CAUSAL_LM"),
    Kind(
        "gpt2-token-cls",
        "GPT2ForTokenClassification",
        "GPT2Config",
        {**_GPT2, "num_labels": 3},
        task_type="TOKEN_CLS",
    ),
    Kind("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2, task_type="CAUSAL_LM"),
    Kind(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {**_IDS, "vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        task_type="CAUSAL_LM",
    ),
    Kind(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _without(_LLAMA, "num_key_value_heads"),
        task_type="CAUSAL_LM",
    ),
    Kind(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **_IDS,
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
        task_type="CAUSAL_LM",
    ),
    Kind("gptj", "GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}, task_type="CAUSAL_LM"),
    Kind(
        "falcon-multi-query",
        "FalconForCausalLM",
        "FalconConfig",
        {**_FALCON, "multi_query": True, "bias": True},
        task_type="CAUSAL_LM",
    ),
    Kind(
        "falcon-new-decoder",
        "FalconForCausalLM",
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        task_type="CAUSAL_LM",
    ),
    Kind("bert-seq-cls", "BertForSequenceClassification", "BertConfig", _BERT_CLS, task_type="SEQ_CLS"),
    Kind("bert-masked-lm", "BertForMaskedLM", "BertConfig", _BERT),
    Kind(
        "roberta-seq-cls",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT_CLS,
        task_type="SEQ_CLS",
        peft_merge=_COMPOSITE_HEAD,
    ),
    Kind("roberta-masked-lm", "RobertaForMaskedLM", "RobertaConfig", _BERT),
    Kind(
        "roberta-causal-lm",
        "RobertaForCausalLM",
        "RobertaConfig",
        {**_BERT, "is_decoder": True},
        task_type="CAUSAL_LM",
    ),
    Kind("deberta", "DebertaForSequenceClassification", "DebertaConfig", _DEBERTA, task_type="SEQ_CLS"),
    Kind(
        "deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", _DEBERTA, task_type="SEQ_CLS"
    ),
    Kind("bart", "BartForConditionalGeneration", "BartConfig", _BART, task_type="SEQ_2_SEQ_LM"),
    Kind(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {
            **_IDS,
            "vocab_size": 128,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
        task_type="CAUSAL_LM",
    ),
    Kind("phi", "PhiForCausalLM", "PhiConfig", _LLAMA, task_type="CAUSAL_LM"),
    Kind("llama", "LlamaForCausalLM", "LlamaConfig", _LLAMA, task_type="CAUSAL_LM"),
    Kind(
        "llama-seq-cls",
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_LLAMA, "num_labels": 3},
        task_type="SEQ_CLS",
    ),
    Kind(
        "llama-biased",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        task_type="CAUSAL_LM",
    ),
    Kind("mistral", "MistralForCausalLM", "MistralConfig", _LLAMA, task_type="CAUSAL_LM"),
    # PEFT's default names the experts' w2, which transformers 5 has fused into parameters: attention only.
    Kind(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_MOE, "num_local_experts": 4},
        task_type="CAUSAL_LM",
    ),
    Kind(
        "llama4",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "boi_token_index": 125,
            "eoi_token_index": 126,
            "image_token_index": 127,
            "text_config": _LLAMA4,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
    ),
    # PEFT's table knows the composed model's type only, not llama4_text.
    Kind(
        "llama4-text",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _LLAMA4,
        ("q_proj", "v_proj", "down_proj"),
        ("down_proj",),
        task_type="CAUSAL_LM",
    ),
    Kind("gemma", "GemmaForCausalLM", "GemmaConfig", _GEMMA, task_type="CAUSAL_LM"),
    Kind("gemma2", "Gemma2ForCausalLM", "Gemma2Config", _GEMMA, task_type="CAUSAL_LM"),
    Kind("gemma3-text", "Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA, task_type="CAUSAL_LM"),
    Kind("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _LLAMA, task_type="CAUSAL_LM"),
    Kind("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _GEMMA, task_type="CAUSAL_LM"),
    # ------------------------------------------------------------------ other decoders
    Kind(
        "phi3",
        "Phi3ForCausalLM",
        "Phi3Config",
        _LLAMA,
        targets=("qkv_proj", "down_proj"),
        feedforward=("down_proj",),
        task_type="CAUSAL_LM",
    ),
    Kind("olmo", "OlmoForCausalLM", "OlmoConfig", _LLAMA, task_type="CAUSAL_LM", **_KV_DOWN),
    Kind("olmo2", "Olmo2ForCausalLM", "Olmo2Config", _LLAMA, task_type="CAUSAL_LM", **_KV_DOWN),
    Kind("granite", "GraniteForCausalLM", "GraniteConfig", _LLAMA, task_type="CAUSAL_LM", **_KV_DOWN),
    Kind("cohere", "CohereForCausalLM", "CohereConfig", _LLAMA, task_type="CAUSAL_LM", **_KV_DOWN),
    Kind("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", _LLAMA, task_type="CAUSAL_LM", **_KV_DOWN),
    Kind(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        _LLAMA,
        targets=("k_proj", "v_proj", "c_proj"),
        feedforward=("c_proj",),
        task_type="CAUSAL_LM",
    ),
    Kind(
        "stablelm",
        "StableLmForCausalLM",
        "StableLmConfig",
        {**_LLAMA, "use_qkv_bias": True},
        task_type="CAUSAL_LM",
        **_KV_DOWN,
    ),
    Kind("nemotron", "NemotronForCausalLM", "NemotronConfig", _LLAMA, task_type="CAUSAL_LM", **_KV_DOWN),
    Kind("glm", "GlmForCausalLM", "GlmConfig", _GEMMA, task_type="CAUSAL_LM", **_KV_DOWN),
    Kind(
        "persimmon",
        "PersimmonForCausalLM",
        "PersimmonConfig",
        _without(_LLAMA, "num_key_value_heads"),
        targets=("query_key_value", "dense_4h_to_h"),
        feedforward=("dense_4h_to_h",),
        task_type="CAUSAL_LM",
    ),
    Kind(
        "codegen",
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**_GPT2, "n_ctx": 64, "rotary_dim": 4},
        targets=("qkv_proj", "fc_out"),
        feedforward=("fc_out",),
        task_type="CAUSAL_LM",
    ),
    Kind(
        "mpt",
        "MptForCausalLM",
        "MptConfig",
        {
            **_IDS,
            "vocab_size": 128,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "expansion_ratio": 2,
            "max_seq_len": 64,
        },
        targets=("Wqkv", "down_proj"),
        feedforward=("down_proj",),
        task_type="CAUSAL_LM",
    ),
    Kind(
        "xglm",
        "XGLMForCausalLM",
        "XGLMConfig",
        {
            **_IDS,
            "vocab_size": 128,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
        task_type="CAUSAL_LM",
        **_KV_FC2,
    ),
    Kind(
        "biogpt",
        "BioGptForCausalLM",
        "BioGptConfig",
        _without(_BERT, "type_vocab_size"),
        task_type="CAUSAL_LM",
        **_KV_FC2,
    ),
    Kind(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {
            **_IDS,
            "vocab_size": 128,
            "hidden_size": 32,
            "state_size": 4,
            "num_hidden_layers": 2,
            "use_bias": True,
        },
        targets=("in_proj", "out_proj"),
        feedforward=("out_proj",),
        task_type="CAUSAL_LM",
    ),
    Kind(
        "rwkv",
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "context_length": 64,
        },
        targets=("attention.key", "attention.value", "feed_forward.value"),
        feedforward=("feed_forward.value",),
        task_type="CAUSAL_LM",
    ),
    Kind(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
        targets=("k_proj", "v_proj", "shared_expert.down_proj"),
        feedforward=("shared_expert.down_proj",),
        task_type="CAUSAL_LM",
    ),
    # The experts of these three are fused parameters, out of IA3's reach.
    Kind(
        "olmoe",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {**_MOE, "num_experts": 4},
        task_type="CAUSAL_LM",
        **_KV_ONLY,
    ),
    Kind(
        "phimoe",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {**_MOE, "num_local_experts": 4},
        task_type="CAUSAL_LM",
        **_KV_ONLY,
    ),
    Kind(
        "granitemoe",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**_MOE, "num_local_experts": 4},
        task_type="CAUSAL_LM",
        **_KV_ONLY,
    ),
    # ------------------------------------------------------------------ encoders
    Kind(
        "modernbert",
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**_BERT_CLS, "cls_token_id": 1, "sep_token_id": 2},
        targets=("Wqkv", "mlp.Wo"),
        feedforward=("mlp.Wo",),
        task_type="SEQ_CLS",
    ),
    Kind(
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            **_IDS,
            "vocab_size": 128,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "num_labels": 3,
        },
        targets=("k_lin", "v_lin", "ffn.lin2"),
        feedforward=("ffn.lin2",),
        task_type="SEQ_CLS",
    ),
    Kind(
        "albert",
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**_BERT_CLS, "embedding_size": 16},
        targets=("key", "value", "ffn_output"),
        feedforward=("ffn_output",),
        task_type="SEQ_CLS",
    ),
    Kind(
        "electra",
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_BERT_CLS, "embedding_size": 16},
        task_type="SEQ_CLS",
        **_KV_OUTPUT,
        peft_merge=_COMPOSITE_HEAD,
    ),
    Kind(
        "mpnet",
        "MPNetForMaskedLM",
        "MPNetConfig",
        _BERT,
        targets=("attn.k", "attn.v", "output.dense"),
        feedforward=("output.dense",),
    ),
    Kind(
        "xlm-roberta",
        "XLMRobertaForSequenceClassification",
        "XLMRobertaConfig",
        _BERT_CLS,
        task_type="SEQ_CLS",
        **_KV_OUTPUT,
        peft_merge=_COMPOSITE_HEAD,
    ),
    Kind("camembert", "CamembertForMaskedLM", "CamembertConfig", _BERT, **_KV_OUTPUT),
    Kind(
        "ernie", "ErnieForSequenceClassification", "ErnieConfig", _BERT_CLS, task_type="SEQ_CLS", **_KV_OUTPUT
    ),
    Kind(
        "mobilebert",
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        {**_BERT_CLS, "embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
        task_type="SEQ_CLS",
        **_KV_OUTPUT,
    ),
    Kind(
        "convbert",
        "ConvBertForTokenClassification",
        "ConvBertConfig",
        {**_BERT_CLS, "embedding_size": 16},
        task_type="TOKEN_CLS",
        **_KV_OUTPUT,
    ),
    Kind(
        "nystromformer",
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        {**_BERT, "num_landmarks": 8, "segment_means_seq_len": 8, "conv_kernel_size": 3},
        **_KV_OUTPUT,
    ),
    Kind(
        "esm",
        "EsmForMaskedLM",
        "EsmConfig",
        {**_BERT, "vocab_size": 33, "mask_token_id": 32, "position_embedding_type": "rotary"},
        **_KV_OUTPUT,
    ),
    Kind(
        "funnel",
        "FunnelForSequenceClassification",
        "FunnelConfig",
        {
            "pad_token_id": 0,
            "vocab_size": 128,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "num_labels": 3,
        },
        targets=("k_head", "v_head", "linear_2"),
        feedforward=("linear_2",),
        task_type="SEQ_CLS",
        peft_merge=_COMPOSITE_HEAD,
    ),
    Kind(
        "longformer",
        "LongformerForTokenClassification",
        "LongformerConfig",
        {**_BERT_CLS, "attention_window": 4},
        task_type="TOKEN_CLS",
        **_KV_OUTPUT,
    ),
    # ------------------------------------------------------------------ encoder-decoders
    Kind("marian", "MarianMTModel", "MarianConfig", _BART, task_type="SEQ_2_SEQ_LM", **_KV_FC2),
    Kind(
        "m2m_100",
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        _BART,
        task_type="SEQ_2_SEQ_LM",
        **_KV_FC2,
    ),
    Kind(
        "mbart-seq-cls",
        "MBartForSequenceClassification",
        "MBartConfig",
        {**_BART, "num_labels": 3},
        task_type="SEQ_CLS",
        **_KV_FC2,
    ),
    Kind(
        "pegasus",
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        _BART,
        task_type="SEQ_2_SEQ_LM",
        **_KV_FC2,
    ),
    Kind(
        "led",
        "LEDForConditionalGeneration",
        "LEDConfig",
        {
            **_without(_BART, "max_position_embeddings"),
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
            "attention_window": 4,
        },
        targets=("key", "value", "k_proj", "v_proj", "fc2"),
        feedforward=("fc2",),
        task_type="SEQ_2_SEQ_LM",
    ),
    # ------------------------------------------------------------------ audio
    Kind(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_without(_BART, "max_position_embeddings"),
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "begin_suppress_tokens": [3, 2],
        },
        **_KV_FC2,
    ),
    Kind("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, **_KV_SPEECH),
    Kind(
        "hubert",
        "HubertForSequenceClassification",
        "HubertConfig",
        {**_SPEECH, "classifier_proj_size": 16, "num_labels": 3},
        **_KV_SPEECH,
    ),
    Kind(
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        "ASTConfig",
        {
            **_without(_VIT, "image_size", "num_channels"),
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": 16,
            "num_mel_bins": 16,
        },
        **_KV_FC2,
    ),
    # ------------------------------------------------------------------ vision
    Kind("vit", "ViTForImageClassification", "ViTConfig", _VIT, **_KV_FC2),
    Kind("deit", "DeiTForImageClassification", "DeiTConfig", _VIT, **_KV_FC2),
    Kind(
        "beit",
        "BeitForImageClassification",
        "BeitConfig",
        {**_VIT, "use_relative_position_bias": True},
        **_KV_FC2,
    ),
    Kind("dinov2", "Dinov2ForImageClassification", "Dinov2Config", _DINO, **_KV_FC2),
    Kind(
        "dinov2-swiglu",
        "Dinov2Model",
        "Dinov2Config",
        {**_DINO, "use_swiglu_ffn": True},
        targets=("k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
        feedforward=("down_proj",),
    ),
    Kind(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        _DINO,
        **_KV_FC2,
    ),
    Kind("siglip-vision", "SiglipVisionModel", "SiglipVisionConfig", _VISION_TOWER, **_KV_FC2),
    Kind(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION, "projection_dim": 16},
        **_KV_FC2,
    ),
    Kind("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", _CLIP_VISION, **_KV_FC2),
    Kind(
        "swin",
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "mlp_ratio": 2.0,
            "num_labels": 3,
        },
        **_KV_FC2,
    ),
    Kind(
        "resnet-basic",
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 24],
            "depths": [2, 2],
            "layer_type": "basic",
            "num_labels": 3,
        },
        targets=("layer.0.convolution", "layer.1.convolution"),
        feedforward=("layer.1.convolution",),
    ),
    Kind(
        "resnet-bottleneck",
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck"},
        targets=("shortcut.convolution", "layer.0.convolution", "layer.2.convolution"),
        feedforward=("layer.2.convolution",),
    ),
    Kind(
        "convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {
            "patch_size": 2,
            "num_stages": 2,
            "hidden_sizes": [16, 24],
            "depths": [1, 2],
            "image_size": 16,
            "num_labels": 3,
            "layer_scale_init_value": 0.5,
        },
        targets=("dwconv", "pwconv2"),
        feedforward=("pwconv2",),
    ),
    Kind(
        "convnext-depthwise-input",
        "ConvNextModel",
        "ConvNextConfig",
        {
            "patch_size": 2,
            "num_stages": 2,
            "hidden_sizes": [16, 24],
            "depths": [1, 2],
            "image_size": 16,
            "layer_scale_init_value": 0.5,
        },
        targets=("dwconv", "pwconv1"),
        feedforward=("dwconv",),
    ),
    Kind(
        "segformer",
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "num_labels": 3,
        },
        targets=("k_proj", "v_proj", "dwconv.dwconv", "mlp.fc2"),
        feedforward=("mlp.fc2",),
    ),
    Kind(
        "regnet",
        "RegNetForImageClassification",
        "RegNetConfig",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 24],
            "depths": [1, 2],
            "groups_width": 4,
            "layer_type": "y",
            "num_labels": 3,
        },
        targets=("shortcut.convolution", "layer.1.convolution", "layer.3.convolution"),
        feedforward=("layer.1.convolution", "layer.3.convolution"),
    ),
    # The key of the decoder's first self-attention cannot reach the output: all values are equal there.
    Kind(
        "detr",
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            "num_queries": 5,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_labels": 3,
        },
        **_KV_FC2,
    ),
    Kind(
        "yolos",
        "YolosForObjectDetection",
        "YolosConfig",
        {**_VIT, "image_size": [16, 16], "num_detection_tokens": 5},
        **_KV_OUTPUT,
    ),
    Kind(
        "timesformer",
        "TimesformerForVideoClassification",
        "TimesformerConfig",
        {**_VIT, "num_frames": 2},
        targets=("qkv", "output.dense"),
        feedforward=("output.dense",),
    ),
    Kind(
        "videomae",
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        {**_VIT, "num_frames": 4, "tubelet_size": 2},
        targets=("patch_embeddings.projection", "key", "value", "output.dense"),
        feedforward=("output.dense",),
    ),
    # ------------------------------------------------------------------ composed vision-language models
    Kind(
        "blip",
        "BlipForConditionalGeneration",
        "BlipConfig",
        {
            "text_config": {**_CLIP_TEXT, "encoder_hidden_size": 32, "sep_token_id": 2},
            "vision_config": _CLIP_VISION,
            "projection_dim": 16,
            "image_text_hidden_size": 16,
        },
        targets=("qkv", "fc2", "key", "value", "output.dense"),
        feedforward=("fc2", "output.dense"),
    ),
    Kind(
        "git",
        "GitForCausalLM",
        "GitConfig",
        {**_without(_BERT, "type_vocab_size"), "vision_config": _VISION_TOWER},
        targets=("k_proj", "v_proj", "fc2", "key", "value", "output.dense"),
        feedforward=("fc2", "output.dense"),
        task_type="CAUSAL_LM",
    ),
    Kind(
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **_CLIP_VISION},
            "image_token_index": 127,
            "image_seq_length": 4,
            "vision_feature_layer": -1,
        },
        targets=("k_proj", "v_proj", "fc2", "down_proj"),
        feedforward=("fc2", "down_proj"),
    ),
    Kind(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {"model_type": "gemma", **_GEMMA},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION_TOWER, "vision_use_head": False},
            "image_token_index": 127,
            "projection_dim": 32,
            "hidden_size": 32,
            **_IDS,
        },
        targets=("k_proj", "v_proj", "fc2", "down_proj"),
        feedforward=("fc2", "down_proj"),
    ),
)


def by_name(name: str) -> Kind:
    """Return the kind of that name."""
    return next(kind for kind in KINDS if kind.name == name)


def build(kind: Kind, *, dtype: str = "float32", seed: int = 0) -> PreTrainedModel:
    """Return the base model of a kind, seeded and in eval mode.

    Fresh models have zero biases, unit norms and weights so small that a wrong fold hides below the
    tolerance, so noise goes onto every parameter and onto the running statistics of batch norms.  Another
    ``dtype`` holds the rounded values of float32.
    """
    import torch

    model = _fresh(kind, "float32", seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # else a sinusoidal table, which loading computes anew
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
                parameter.add_(noise(parameter) * fan_in**-0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.2 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(0.25 + 0.5 * torch.rand(buffer.shape, generator=generator))
            elif name.endswith(("normalization.weight", "normalization.bias")):  # frozen batch norm
                buffer.add_(0.2 * noise(buffer))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                # as trained models have it; loading a Funnel zeroes this row whatever the file says
                module.weight[module.padding_idx] = 0
    if dtype != "float32":
        # Not Module.to: it would cast what from_pretrained keeps, such as rotary frequencies.
        rounded = _fresh(kind, dtype, seed)
        rounded.load_state_dict(model.state_dict())
        model = rounded
    model.eval()
    built: PreTrainedModel = model
    return built


def _fresh(kind: Kind, dtype: str, seed: int) -> Any:
    """Construct the model as from_pretrained does, with ``dtype`` as torch's default."""
    import torch
    import transformers

    config = getattr(transformers, kind.config_class)(**copy.deepcopy(dict(kind.config)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(transformers, kind.model_class)(config)
    finally:
        torch.set_default_dtype(before)


def adapt(model: PreTrainedModel, kind: Kind, *, seed: int = 1) -> PeftModel:
    """Put a seeded IA3 adapter on the model (in place, as PEFT does), as if it had been trained.

    The vectors are normal around 1 with standard deviation 0.3, a tenth of the values negated.  A head that
    PEFT keeps in ``modules_to_save`` moves away from the base's head too.
    """
    import torch
    from peft import IA3Config, get_peft_model

    config = IA3Config(
        task_type=kind.task_type,
        target_modules=None if kind.targets is None else list(kind.targets),
        feedforward_modules=None if kind.feedforward is None else list(kind.feedforward),
        init_ia3_weights=True,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT corrects it itself
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".ia3_l." in name:
                values = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
                negated = torch.rand(parameter.shape, generator=generator) < 0.1
                parameter.copy_(torch.where(negated, -values, values))
            elif ".modules_to_save." in name:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    adapted.eval()
    return adapted


def example_inputs(model: Module, *, batch: int = 2, length: int = 7, seed: int = 2) -> dict[str, Tensor]:
    """Return seeded forward inputs for a model of the zoo, bare or wrapped by PEFT.

    What to feed is told by the config and by the signature of ``forward``; one model can take several
    modalities.  An image in a text takes places of its own before the ``length`` text tokens.
    """
    import torch

    outer: Any = model
    base = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    config = base.config
    accepted = inspect.signature(base.forward).parameters
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(base.dtype)

    def tokens(count: int) -> Tensor:
        text_config = config.get_text_config()
        # both ends of the vocabulary hold special tokens
        ids = torch.randint(5, text_config.vocab_size - 3, (batch, count), generator=generator)
        eos = getattr(text_config, "eos_token_id", None)
        if eos is not None:  # CLIP and BART's classifier pool at this token
            ids[:, -1] = eos
        return ids

    if "input_features" in accepted:  # whisper
        inputs = {"input_features": floats(batch, config.num_mel_bins, 2 * config.max_source_positions)}
    elif "input_values" in accepted and hasattr(config, "num_mel_bins"):  # spectrograms
        inputs = {"input_values": floats(batch, config.max_length, config.num_mel_bins)}
    elif "input_values" in accepted:  # raw speech
        inputs = {"input_values": floats(batch, 60 * length)}
    else:
        inputs = {}
    if "pixel_values" in accepted:
        vision = getattr(config, "vision_config", None) or config
        height, width = _image_size(vision)
        frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
        inputs["pixel_values"] = floats(batch, *frames, vision.num_channels, height, width)
    if "input_ids" in accepted:
        inputs["input_ids"] = tokens(length)
        image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        if image_token is not None:
            places = torch.full((batch, _image_tokens(config.vision_config)), image_token)
            inputs["input_ids"] = torch.cat([places, inputs["input_ids"]], dim=1)
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "decoder_input_ids" in accepted and not type(base).__name__.endswith("ForSequenceClassification"):
        inputs["decoder_input_ids"] = tokens(length)
    return inputs


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", 32)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _image_tokens(config: Any) -> int:
    """How many places of the text one image takes."""
    height, width = _image_size(config)
    patches = (height // config.patch_size) * (width // config.patch_size)
    return int(patches * getattr(config, "pixel_shuffle_ratio", 1) ** 2)
