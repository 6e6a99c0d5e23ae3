"""Writes ia3_export/quantization/feed_forward_table.json.

Where the input vector of a projection can be moved.

Every model type of the installed transformers is built with tiny sizes and random weights, saved, and its
stored tensors are edited twice: once with a random vector on the columns of a projection, once with the same
vector on the rows (and bias) of a projection before it. Where the model loaded from both gives the same
outputs (float64), the second stands in for the first. So it is the whole model that is tried, its loading
from a file included, and not what its source code looks like. A second run with feeding rows 300 times as
large shows clamps.

python tools/mlp_kinds.py             tries all model types (12 minutes on two processes), writes the table
python tools/mlp_kinds.py llama opt   tries these and prints what it finds
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from safetensors.torch import load_file
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ia3_export.models.conversions import loading_rules, state_entry
from ia3_export.quantization.feed_forward import _fill, _match
from tests.support import zoo

TARGET = Path(__file__).parent.parent / "ia3_export" / "quantization" / "feed_forward_table.json"
EQUAL = 1e-5  # relative difference of outputs: norms compute in float32 inside a float64 model
EFFECT = 1e-3  # what a vector that matters changes at least
HOT = 300.0  # the factor on feeding rows that brings clamps to work
PROCESSES = 2
SECONDS = 90  # for one model type
LARGEST = 8_000_000  # parameters: a model that stays larger has sizes by other names

#: Model types in whose attention the value's rows may take the vector: the common ones, whose sources
#: (searched for norms, clamps and sharing of the values) have nothing more than the clip_qkv that the module
#: looks for.
_VALUES = """
    albert bart bert bert-generation big_bird biogpt blenderbot blenderbot-small camembert clip_text_model
    clip_vision_model cohere cohere2 data2vec-text deberta-v2 distilbert electra ernie esm eurobert gemma
    gemma2 gemma3_text glm glm4 gpt2 gpt_neo gptj granite helium layoutlm llama longformer m2m_100 marian
    mbart mistral ministral mixtral mpnet mt5 olmo olmo2 opt pegasus phi phi3 plbart qwen2 qwen2_moe qwen3
    qwen3_moe roberta roberta-prelayernorm siglip_vision_model siglip_text_model smollm3 stablelm starcoder2
    switch_transformers t5 umt5 vit whisper xglm xlm-roberta xlm-roberta-xl xmod
"""
VALUES = frozenset(_VALUES.split())

#: Model types in which a norm stands right before the projection and takes the vector into its weight.
NORMS = frozenset({"bitnet"})

#: Projections that are neither a feed-forward's last nor an attention's: side paths, a recurrence, poolings.
UNWANTED = r"laurel|per_layer|ple_block|temporal_|downsample"

#: Parts read in the source, of composed types whose image tower needs packages that are not installed.
READ_PARTS = {"gemma3n": {"language_model": "text_config"}}

#: Config keys of clamps. A type without one by default is not tried with it.
CLAMPS = ("swiglu_limit", "swiglu_limits", "swiglu_limits_shared")

#: Why well-known model types cannot move the vector of their feed-forward.
REASONS = {
    "bloom": "a gelu lies between dense_h_to_4h and dense_4h_to_h, and there is no gate",
    "deepseek_v4": "deepseek_v4 clamps the up projection (swiglu_limit)",
    "esm": "a gelu lies between intermediate.dense and output.dense, and there is no gate",
    "flaubert": "a gelu or relu lies between lin1 and lin2, by a switch that has not been reviewed",
    "glm5_next": "glm5_next clamps the up projection (swiglu_limit)",
    "gpt_oss": "gpt_oss clamps the up projection and adds 1 to it",
    "ibert": "ibert computes with integers between its projections",
    "minimax_m3_vl": "minimax_m3_vl clamps the up projection and adds 1 to it",
    "glm5_next_text": "glm5_next clamps the up projection (swiglu_limit)",
    "minimax_m3_vl_text": "minimax_m3_vl clamps the up projection and adds 1 to it",
    "mpt": "a gelu lies between up_proj and down_proj, and there is no gate",
    "openai_privacy_filter": "openai_privacy_filter clamps the up projection and adds 1 to it",
    "step3p7": "step3p7 clamps the up projection in some layers (swiglu_limits)",
    "xlm": "a gelu or relu lies between lin1 and lin2, by a switch that has not been reviewed",
}

#: Projections that read the hidden state: an input vector there would move into a norm that others read too.
_FIRST = (
    "q_proj k_proj v_proj query key value q k v qkv qkv_proj query_key_value c_attn in_proj gate_proj "
    "up_proj gate_up_proj w1 w3 wi wi_0 wi_1 fc1 c_fc dense_h_to_4h gate router q_lin k_lin v_lin lin1"
)
FIRST = frozenset(_FIRST.split())

State = dict[str, torch.Tensor]
Edit = Callable[[State], None]

#: Sizes by the names that configs give them. All widths differ, so that shapes tell projections apart.
SIZES: dict[str, Any] = {
    32: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size word_embed_proj_dim",
    48: (
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size hidden_dim "
        "dim_feedforward d_inner inner_dim intermediate_size_mlp ffn_hidden_dim mlp_hidden_size"
    ),
    40: "moe_intermediate_size expert_ffn_hidden_size",
    56: "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size",
    2: (
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_key_value_heads num_kv_heads num_experts num_local_experts n_routed_experts moe_num_experts"
    ),
    8: (
        "head_dim d_kv attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim "
        "linear_value_head_dim global_head_dim mamba_d_head mamba_head_dim image_size_ "
        "relative_attention_num_buckets num_mel_bins_ mamba_d_state ssm_state_size"
    ),
    16: "q_lora_rank kv_lora_rank rank",
    128: "vocab_size max_position_embeddings_ vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions",
    1: (
        "n_group topk_group n_shared_experts first_k_dense_replace num_shared_experts expert_interval "
        "moe_layer_start_index"
    ),
}
FIXED: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": 2, "layer_types": None, "rope_scaling": None, "n_mels": 8,
    "hidden_size_per_layer_input": 8, "type_vocab_size": 2, "original_max_position_embeddings": 64,
    "image_size": 32, "out_hidden_size": 32, "patch_size": 8,
}  # fmt: skip
for _size, _names in list(SIZES.items()):
    FIXED |= dict.fromkeys(_names.split(), _size)

#: What single model types need besides.
SPECIAL: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 8,
        "n_groups": 1,
    },
    "falcon": {"new_decoder_architecture": False, "multi_query": False},
    "bamba": {"mamba_n_heads": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "fsmt": {"src_vocab_size": 128, "tgt_vocab_size": 128},
}


def tiny_config(model_type: str) -> Any:
    """The config of a model type with small sizes.

    That of the zoo, else the defaults with known names made small.
    """
    special = SPECIAL.get(model_type, {})
    return _shrink(CONFIG_MAPPING[model_type], special)


def _shrink(cls: Any, special: Mapping[str, Any]) -> Any:
    default = cls()
    values = dict(special)
    attributes = default.to_dict()
    mapped = set(cls.attribute_map)
    for key, value in FIXED.items():
        if (
            key in attributes
            and key not in mapped
            and key not in values
            and not isinstance(attributes[key], list | dict)
        ):
            values[key] = value
    if "rope_parameters" in attributes and re.search(
        "vl_text|vl_moe_text|glm4v|glm_ocr|glm_image|thinker_text", cls.model_type
    ):
        rope = {"rope_type": "default", "rope_theta": 10000.0} | (attributes["rope_parameters"] or {})
        half = int(FIXED["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        values["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if isinstance(attributes.get("layer_types"), list) and "layer_types" not in special:
        kinds = list(dict.fromkeys(attributes["layer_types"]))
        values["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        values["num_hidden_layers"] = len(values["layer_types"])
    for key in cls.sub_configs:
        part = getattr(default, key, None)
        if part is not None and key not in values:
            values[key] = _shrink(type(part), SPECIAL.get(part.model_type, {})).to_dict()
    return cls(**values)


def zoo_configs(model_type: str) -> Iterator[Any]:
    """The configs of the zoo of this model type, with unshared keys and values."""
    for kind in zoo.KINDS:
        cls = getattr(transformers, kind.config_class)
        if cls.model_type == model_type:
            values = dict(kind.config)
            if "num_key_value_heads" in values:
                values["num_key_value_heads"] = values["num_attention_heads"]
            yield cls(**values), getattr(transformers, kind.model_class)


def model_classes(config: Any) -> Iterator[Any]:
    """Model classes that take this config, those with a head for tokens first."""
    for auto in (
        "ForImageTextToText",
        "ForCausalLM",
        "ForSeq2SeqLM",
        "ForMaskedLM",
        "ForMultimodalLM",
        "ForImageClassification",
        "",
    ):
        mapping = getattr(transformers, f"AutoModel{auto}", None)
        if mapping is not None and type(config) in mapping._model_mapping:
            found = mapping._model_mapping[type(config)]
            yield from found if isinstance(found, list | tuple) else (found,)


class Subject:
    """A tiny model: its stored tensors, and its outputs when loaded from edited ones."""

    def __init__(self, cls: Any, config: Any) -> None:
        self.cls, self.config = cls, config
        for part in _configs(config):
            part._experts_implementation = "eager"
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{cls.__name__} is not tiny: {size} parameters")
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            model = cls(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model = model.double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
                    parameter.add_(torch.randn_like(parameter) * fan_in**-0.5)
        self.model = model
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.state: State = {}
            for file in sorted(Path(folder).glob("*.safetensors")):
                self.state |= load_file(file)
        self.inputs = _inputs(model)
        self.types = self._owners()
        self.base = self.run()

    def run(self, *edits: Edit) -> list[torch.Tensor]:
        """The outputs of the model loaded from the tensors after `edits`."""
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        for edit in edits:
            edit(state)
        loaded = self.cls.from_pretrained(
            None, config=self.config, state_dict=state, dtype=torch.float64, experts_implementation="eager"
        )
        return outputs(loaded.double().eval(), self.inputs)

    def _owners(self) -> dict[str, tuple[str, Any, Any]]:
        """(in-memory module path, module, config that rules it) for every stored 2-D weight."""
        rules = loading_rules(self.model)
        configs = {
            name: module.config
            for name, module in self.model.named_modules()
            if isinstance(module, transformers.PreTrainedModel)
        }
        modules = dict(self.model.named_modules())
        owners = {}
        for name, tensor in self.state.items():
            if name.endswith(".weight") and tensor.dim() == 2:
                entry, _ = state_entry(rules, name)
                path = entry.removesuffix(".weight")
                above = [p for p in configs if p == "" or path == p or path.startswith(p + ".")]
                owners[name.removesuffix(".weight")] = (path, modules.get(path), configs[max(above, key=len)])
        return owners


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None:
            yield from _configs(part)


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 120, (2, 7), generator=torch.Generator().manual_seed(1))
    tries: list[Callable[[], dict[str, Any]]] = [
        lambda: zoo.example_inputs(model),
        lambda: {"input_ids": ids},
        lambda: {"input_ids": ids, "decoder_input_ids": ids},
        lambda: {
            "pixel_values": torch.randn(2, 3, model.config.image_size, model.config.image_size).double()
        },
    ]
    problem: Exception | None = None
    for make in tries:
        try:
            inputs = make()
            if outputs(model, inputs):
                return inputs
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


def outputs(model: Any, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """All floating-point tensors of the model's output."""
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            made = model(**inputs, **cache)
    finally:
        torch.set_default_dtype(torch.float32)
    return [v for k, v in made.items() if torch.is_tensor(v) and v.is_floating_point() and k != "loss"]


def difference(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    """The largest relative Frobenius difference; infinite for NaN."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        d = float((a - b).norm() / (a.norm() + 1e-30))
        worst = max(worst, d if d == d else float("inf"))
    return worst


def vector_of(module: str, length: int, *, signed: bool) -> torch.Tensor:
    """A random vector, the same for a module and length on every call."""
    generator = torch.Generator().manual_seed(sum(module.encode()) * 31 + length)
    vector = torch.rand(length, generator=generator, dtype=torch.float64) + 0.5
    return torch.where(torch.rand(length, generator=generator) < 0.3, -vector, vector) if signed else vector


def pattern_of(path: str) -> str | None:
    """What follows the first number of a path, with further numbers as ``*``.

    None where there is no number.
    """
    found = re.search(r"\.\d+\.(.+)", path)
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", found[1]) if found else None


class Trial:
    """All projections of one pattern below one config, and what may feed them."""

    def __init__(self, subject: Subject, downs: list[str]) -> None:
        self.subject, self.downs = subject, downs
        self.conv1d = {n: type(o[1]).__name__ == "Conv1D" for n, o in subject.types.items()}

    def shape(self, name: str) -> tuple[int, int]:
        a, b = self.subject.state[f"{name}.weight"].shape
        return (b, a) if self.conv1d.get(name) else (a, b)

    def live(self, signed: bool) -> Edit:
        """The vectors on the columns."""

        def edit(state: State) -> None:
            for down in self.downs:
                vector = vector_of(down, self.shape(down)[1], signed=signed)
                state[f"{down}.weight"] *= vector[:, None] if self.conv1d[down] else vector

        return edit

    def rows(self, feeders: list[str], start: int, factor: Callable[[str, int], Any]) -> Edit:
        """`factor` of (down, length) on the feeders' rows from ``start * length``, and on their biases."""

        def edit(state: State) -> None:
            for down, feeder in zip(self.downs, feeders, strict=True):
                n = self.shape(down)[1]
                part = slice(start * n, (start + 1) * n)
                values = factor(down, n)
                weight = state[f"{feeder}.weight"]
                if weight.dim() == 2:
                    target = weight[:, part] if self.conv1d.get(feeder) else weight[part]
                    target *= (
                        values if self.conv1d.get(feeder) or not torch.is_tensor(values) else values[:, None]
                    )
                else:
                    weight[part] *= values
                if f"{feeder}.bias" in state:
                    state[f"{feeder}.bias"][part] *= values

        return edit

    def holds(self, feeders: list[str], start: int, *, signed: bool, sqrt: bool = False) -> bool:
        """Whether vectors on the feeders' rows stand in for vectors on the columns, also with large rows."""

        def factor(down: str, n: int) -> torch.Tensor:
            vector = vector_of(down, n, signed=signed)
            return vector.sqrt() if sqrt else vector

        moved = self.rows(feeders, start, factor)
        for hot in (1.0, HOT):
            heat = self.rows(feeders, start, lambda _d, _n, hot=hot: hot)
            base = self.subject.run(heat) if hot > 1 else self.subject.base
            live = self.subject.run(heat, self.live(signed))
            if hot == 1 and not difference(base, live) > EFFECT:
                return False
            if not difference(live, self.subject.run(heat, moved)) < EQUAL:
                return False
        return True

    def candidates(self) -> Iterator[tuple[list[str], int, int]]:
        """(a feeder per projection, slice, slices).

        Those of the same parent first, then those one level up.
        """
        first = self.downs[0]
        seen = set()
        for level in (1, 2):
            above = first.split(".")[:-level]
            if not above or (level == 2 and first.split(".")[-2].isdigit()):
                return
            stem = ".".join(above) + "."
            for name in [
                k.removesuffix(".weight")
                for k in self.subject.state
                if k.startswith(stem) and k.endswith(".weight")
            ]:
                if name in seen or name == first:
                    continue
                seen.add(name)
                tail = name.removeprefix(stem)
                feeders = [".".join(d.split(".")[:-level]) + "." + tail for d in self.downs]
                if any(f"{f}.weight" not in self.subject.state for f in feeders):
                    continue
                numbers = _match(pattern_of(first) or "", first) or []
                if _fill(first, pattern_of(name) or name, numbers) != name:
                    continue  # numbers that the projection's own path does not have
                for parts in (1, 2, 3):
                    if all(
                        self.outputs(f) == parts * self.shape(d)[1]
                        for d, f in zip(self.downs, feeders, strict=True)
                    ):
                        for start in range(parts):
                            yield feeders, start, parts

    def outputs(self, name: str) -> int:
        """How many elements a projection or a norm puts out; 0 for other tensors."""
        weight = self.subject.state[f"{name}.weight"]
        return weight.shape[0] if weight.dim() == 1 else self.shape(name)[0] if weight.dim() == 2 else 0


def review(model_type: str) -> dict[str, Any]:
    """What is found for a model type.

    ``{owner: {pattern: [kind, feeder, activation key, default]}}``, parts and misses.
    """
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            return _review(model_type)
        except Exception as error:
            return {"problem": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError("took too long")


def _subject(model_type: str, activation: tuple[str, str] | None) -> Subject:
    def choices() -> Iterator[tuple[Any, Any]]:
        yield from zoo_configs(model_type)
        for cls in model_classes(config := tiny_config(model_type)):
            yield config, cls

    problem: Exception | None = None
    for config, cls in choices():
        if activation:
            for part in _configs(config):
                if hasattr(part, activation[0]):
                    values = part.to_dict() | {activation[0]: activation[1]}
                    if activation[0] == "feed_forward_proj":  # T5: these two follow from it
                        values = {
                            k: v for k, v in values.items() if k not in ("dense_act_fn", "is_gated_act")
                        }
                    part.__dict__.update(type(part)(**values).__dict__)
        try:
            return Subject(cls, config)
        except TimeoutError:
            raise
        except Exception as error:
            problem = problem or error
    raise problem or TypeError("no model class")


def _trials(subject: Subject) -> dict[tuple[str, str], Trial]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (_, module, config) in subject.types.items():
        pattern = pattern_of(name)
        if pattern and pattern.split(".")[-1] not in FIRST and not isinstance(module, torch.nn.Embedding):
            groups.setdefault((config.model_type, pattern), []).append(name)
    return {key: Trial(subject, names) for key, names in groups.items()}


def _review(model_type: str) -> dict[str, Any]:
    plain = _review_subject(model_type, subject := _subject(model_type, None))
    if hasattr(subject.config, "feed_forward_proj"):
        gated = _review_subject(model_type, _subject(model_type, ("feed_forward_proj", "gated-gelu")))
        plain["gated"] = gated["found"]
    return plain


def _review_subject(model_type: str, subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {}
    open_: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
    for (owner, pattern), trial in _trials(subject).items():
        options = list(trial.candidates())
        if not options:
            continue
        if not difference(subject.base, subject.run(trial.live(True))) > EFFECT:
            continue
        for feeders, start, parts in options:
            relative = pattern_of(feeders[0]) or feeders[0]
            one_d = subject.state[f"{feeders[0]}.weight"].dim() == 1
            if trial.holds(feeders, start, signed=True):
                kind = "norm" if one_d else _kind(relative, start, parts)
                found.setdefault(owner, {})[pattern] = [kind, relative]
                break
            if parts == 1 and not one_d:
                open_.setdefault((owner, pattern), []).append((relative, feeders))
    open_ = {key: value for key, value in open_.items() if key[1] not in found.get(key[0], {})}
    parts = _parts(subject)
    plain, unmoved = _plain(model_type, subject, open_)
    for owner, patterns in plain.items():
        found.setdefault(owner, {}).update(patterns)
    return {"found": found, "parts": parts, "unmoved": unmoved, "class": subject.cls.__name__}


def _kind(feeder: str, start: int, parts: int) -> str:
    value = (
        "attention" in feeder.lower()
        or "attn" in feeder.lower()
        or re.search(r"(^|[._])(v|value|to_v|v_lin|v_proj)$", feeder)
    )
    if parts == 1:
        return "value" if value else "gated"
    return f"{'value' if value else 'fused'} {start + 1}/{parts}"


def _parts(subject: Subject) -> dict[str, str]:
    """Path components at which another config rules, and the key of that config."""
    keys = {
        id(getattr(subject.config, key)): key
        for key in subject.config.sub_configs
        if getattr(subject.config, key, None) is not None
    }
    parts: dict[str, str] = {}
    outermost: list[str] = []
    for name, module in subject.model.named_modules():
        inside = any(name.startswith(f"{above}.") for above in outermost)
        last = name.split(".")[-1]
        if name and not inside and id(getattr(module, "config", None)) in keys:
            outermost.append(name)
            if not last.isdigit() and last not in ("model", "rotary_emb"):
                parts[last] = keys[id(module.config)]
    return parts


def _plain(
    model_type: str, subject: Subject, open_: Mapping[tuple[str, str], Any]
) -> tuple[dict[str, Any], list[str]]:
    """Projections without a gate: which activation key rules, and that relu and relu2 let the vector pass."""
    found: dict[str, Any] = {}
    unmoved = []
    cache: dict[tuple[str, str], Subject | None] = {}

    def trial_with(key: str, activation: str, owner: str, pattern: str) -> Trial | None:
        if (key, activation) not in cache:
            try:
                cache[key, activation] = _subject(model_type, (key, activation))
            except Exception:
                cache[key, activation] = None
        other = cache[key, activation]
        return None if other is None else _trials(other).get((owner, pattern))

    for (owner, pattern), options in open_.items():
        config = next(
            o[2] for n, o in subject.types.items() if o[2].model_type == owner and pattern_of(n) == pattern
        )
        values = config.to_dict()
        keys = [
            k for k, v in values.items() if isinstance(v, str) and (v in ACT2FN or k == "feed_forward_proj")
        ]
        keys.sort(key=lambda k: k != "feed_forward_proj")
        done = False
        for key in keys:
            for relative, feeders in options:
                relu = trial_with(key, "relu", owner, pattern)
                if relu is None or not relu.holds(feeders, 0, signed=False):
                    continue
                gelu = trial_with(key, "gelu", owner, pattern)
                squared = trial_with(key, "relu2", owner, pattern)
                if gelu is None or gelu.holds(feeders, 0, signed=False):
                    continue
                both = squared is not None and squared.holds(feeders, 0, signed=False, sqrt=True)
                default = (
                    CONFIG_MAPPING[model_type]()
                    if owner == config.model_type == model_type
                    else type(config)()
                )
                found.setdefault(owner, {})[pattern] = [
                    "plain" if both else "plain relu",
                    relative,
                    key,
                    getattr(default, key),
                ]
                done = True
                break
            if done:
                break
        if not done:
            own = _trials(subject)[owner, pattern]
            for relative, feeders in options:
                if own.holds(feeders, 0, signed=False):
                    found.setdefault(owner, {})[pattern] = ["relu", relative]
                    done = True
                elif own.holds(feeders, 0, signed=False, sqrt=True):
                    found.setdefault(owner, {})[pattern] = ["squared relu", relative]
                    done = True
                if done:
                    break
        if not done:
            unmoved.append(f"{owner} {pattern}")
    return found, unmoved


def _order(model_type: str) -> tuple[bool, str]:
    """Language models first: they are what an interrupted run should have seen."""
    autos = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
    )
    return not any(CONFIG_MAPPING[model_type] in auto._model_mapping for auto in autos), model_type


def make_table(results: Mapping[str, Any]) -> dict[str, Any]:
    """The table's entries by model type: what was found, less what is not wanted in the table."""
    table: dict[str, Any] = {}
    own = {name for name, result in results.items() if name in result.get("found", {})}
    for reviewed, result in sorted(results.items()):
        if "problem" in result:
            continue
        table.setdefault(reviewed, {})
        if result["parts"]:
            table[reviewed]["parts"] = result["parts"]
        for source in ("gated", "found"):
            for owner, patterns in result.get(source, {}).items():
                if owner not in own:
                    table.setdefault(owner, {}).setdefault("tried_in", reviewed)
                if owner == reviewed or owner not in own:
                    _add(table.setdefault(owner, {}), owner, patterns)
                if owner == f"{reviewed}_text" and "text_config" in result["parts"].values():
                    _add(table[reviewed], owner, patterns)  # its older files have one flat config
    for model_type, parts in READ_PARTS.items():
        table.setdefault(model_type, {})["parts"] = parts
    for model_type, reason in REASONS.items():
        table.setdefault(model_type, {})["reason"] = reason
    for model_type, entry in table.items():
        default = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None
        if "move" in entry and any(getattr(default, key, None) for key in CLAMPS):
            entry["clamps_elsewhere"] = True  # what is in the table was tried with the clamp at work
    return {name: dict(sorted(table[name].items())) for name in sorted(table)}


def _add(entry: dict[str, Any], owner: str, patterns: Mapping[str, Any]) -> None:
    for pattern, (kind, feeder, *activation) in sorted(patterns.items()):
        attention = re.search(r"att|mixer|conv|mamba|^out_lin$", pattern, re.IGNORECASE)
        kind, _, place = {"squared relu": "squared", "plain relu": "relu", "relu": "always_relu"}.get(
            kind, kind
        ).partition(" ")
        if kind in ("gated", "fused", "value"):
            kind = "value" if attention else "fused" if place else "gated"
        skip = {"value": owner not in VALUES, "norm": owner not in NORMS}
        if skip.get(kind) or re.match(UNWANTED, pattern):
            continue
        if activation and entry.setdefault("activation", activation) != activation:
            print(
                f"{owner} {pattern}: its activation key {activation} is not that of the others, left out",
                file=sys.stderr,
            )
            continue
        ways = entry.setdefault("move", {}).setdefault(pattern, [])
        way = f"{kind}{place and ':'}{place} {feeder}"
        if way not in ways:
            ways.append(way)


def render(table: Mapping[str, Any]) -> str:
    """The table as JSON, one model type a line."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items())
    return (
        f'{{\n  "transformers": {json.dumps(transformers.__version__)},\n  "model_types": {{\n'
        f"{lines}\n  }}\n}}\n"
    )


def main(chosen: list[str]) -> None:
    """Review the chosen model types, or all of them and write the table."""
    torch.set_num_threads(1)
    results = {}
    names = chosen or sorted(CONFIG_MAPPING, key=_order)
    with ProcessPoolExecutor(PROCESSES) as pool:
        waiting = {pool.submit(review, name): name for name in names}
        for done in as_completed(waiting):
            results[waiting[done]] = done.result()
            print(waiting[done], json.dumps(done.result()), flush=True)
    if not chosen:
        TARGET.write_text(render(make_table(results)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
