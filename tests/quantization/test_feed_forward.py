"""Moving the input vector of a projection onto the rows of the one that feeds it.

Lookups, conditions, real models.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ia3_export.quantization.feed_forward import (
    Feeder,
    Kind,
    activation_of,
    find_feeder,
    move_vector,
    read_table,
)
from ia3_export.quantization.feed_forward_check import self_check
from ia3_export.quantization.packed import CannotKeep
from tests.support import zoo
from tools import mlp_kinds

LLAMA = {"model_type": "llama", "hidden_act": "silu"}
UP = Feeder("m.layers.0.mlp.up_proj", 0, 6, "gated")


def linears(**sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of weights; ``_0_`` in a keyword stands for the layer and its dots."""
    return {name.replace("__", ".") + ".weight": shape for name, shape in sizes.items()}


MLP = linears(
    model__layers__3__mlp__up_proj=(48, 32),
    model__layers__3__mlp__gate_proj=(48, 32),
    model__layers__3__mlp__down_proj=(32, 48),
)
ATTENTION = linears(
    model__layers__3__self_attn__v_proj=(32, 32), model__layers__3__self_attn__o_proj=(32, 32)
)


def refusal(
    module: str, length: int, config: dict[str, Any] | None, shapes: dict[str, tuple[int, ...]]
) -> str:
    """Why no projection takes the input vector of `module`."""
    with pytest.raises(CannotKeep) as raised:
        find_feeder(module, length, config, shapes)
    return str(raised.value)


def test_a_gated_feed_forward_takes_the_vector_into_the_rows_of_up_proj() -> None:
    assert find_feeder("model.layers.3.mlp.down_proj", 48, LLAMA, MLP) == Feeder(
        "model.layers.3.mlp.up_proj", 0, 48, "gated"
    )


def test_an_expert_is_fed_by_the_same_expert_of_the_same_layer() -> None:
    name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    shapes = {
        name.format(i, w): (32, 48) if w == "w2" else (48, 32) for i in range(3) for w in ("w1", "w2", "w3")
    }
    found = find_feeder("model.layers.1.block_sparse_moe.experts.2.w2", 48, {"model_type": "mixtral"}, shapes)
    assert found.module == "model.layers.1.block_sparse_moe.experts.2.w3"


def test_the_second_half_of_a_fused_projection_is_up() -> None:
    shapes = linears(model__layers__0__mlp__gate_up_proj=(96, 32), model__layers__0__mlp__down_proj=(32, 48))
    assert find_feeder("model.layers.0.mlp.down_proj", 48, {"model_type": "phi3"}, shapes) == Feeder(
        "model.layers.0.mlp.gate_up_proj", 48, 96, "fused gate and up"
    )


@pytest.mark.parametrize(("first", "kind"), [("wi_1", "gated"), ("wi", "relu")])
def test_t5_has_two_feed_forwards_and_the_checkpoint_says_which(first: str, kind: str) -> None:
    stem = "encoder.block.1.layer.1.DenseReluDense"
    shapes = {f"{stem}.{first}.weight": (48, 32), f"{stem}.wo.weight": (32, 48)}
    config = {"model_type": "t5", "feed_forward_proj": "gated-gelu" if first == "wi_1" else "relu"}
    found = find_feeder(f"{stem}.wo", 48, config, shapes)
    assert (found.module, found.kind, found.only_positive) == (f"{stem}.{first}", kind, kind == "relu")


def test_relu_wants_positive_vectors_squared_relu_takes_their_root_gelu_refuses() -> None:
    shapes = linears(model__decoder__layers__0__fc1=(48, 32), model__decoder__layers__0__fc2=(32, 48))
    module = "model.decoder.layers.0.fc2"
    relu = find_feeder(module, 48, {"model_type": "opt"}, shapes)  # relu is the class's default
    squared = find_feeder(module, 48, {"model_type": "opt", "activation_function": "relu2"}, shapes)
    gelu = refusal(module, 48, {"model_type": "opt", "activation_function": "gelu"}, shapes)
    assert (relu.kind, relu.only_positive) == ("relu", True)
    assert (squared.kind, squared.only_positive) == ("squared relu", True)
    assert gelu == "a gelu lies between model.decoder.layers.0.fc1 and the vector, and there is no gate"
    assert activation_of(module, {"model_type": "opt", "activation_function": "gelu"}) == "gelu"


def test_an_up_proj_without_a_gate_is_no_gated_feed_forward() -> None:
    found = find_feeder(
        "model.layers.3.mlp.down_proj", 48, {"model_type": "nemotron", "hidden_act": "relu2"}, MLP
    )
    assert found.kind == "squared relu"


def test_bitnet_takes_the_vector_into_its_norm() -> None:
    shapes = MLP | linears(model__layers__3__mlp__ffn_sub_norm=(48,))
    found = find_feeder("model.layers.3.mlp.down_proj", 48, {"model_type": "bitnet"}, shapes)
    assert found == Feeder("model.layers.3.mlp.ffn_sub_norm", 0, 48, "norm")


def test_an_attention_output_takes_it_from_values_that_are_not_shared() -> None:
    found = find_feeder("model.layers.3.self_attn.o_proj", 32, LLAMA, ATTENTION)
    assert found == Feeder("model.layers.3.self_attn.v_proj", 0, 32, "value")
    shared = ATTENTION | linears(model__layers__3__self_attn__v_proj=(16, 32))
    assert "heads share keys and values" in refusal("model.layers.3.self_attn.o_proj", 32, LLAMA, shared)
    olmo = {"model_type": "olmo", "clip_qkv": 8.0}
    assert "clipped" in refusal("model.layers.3.self_attn.o_proj", 32, olmo, ATTENTION)


def test_both_outputs_of_a_bert_layer_are_told_apart() -> None:
    stem = "bert.encoder.layer.0"
    shapes = {
        f"{stem}.attention.self.value.weight": (32, 32),
        f"{stem}.attention.output.dense.weight": (32, 32),
    }
    shapes |= {f"{stem}.intermediate.dense.weight": (48, 32), f"{stem}.output.dense.weight": (32, 48)}
    config = {"model_type": "bert", "hidden_act": "gelu"}
    value = find_feeder(f"{stem}.attention.output.dense", 32, config, shapes)
    assert value.module == f"{stem}.attention.self.value"
    assert "a gelu lies between" in refusal(f"{stem}.output.dense", 48, config, shapes)
    relu = find_feeder(f"{stem}.output.dense", 48, config | {"hidden_act": "relu"}, shapes)
    assert relu.module == f"{stem}.intermediate.dense"


def test_a_composed_model_is_read_by_the_config_of_the_part() -> None:
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "opt"},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    shapes = {f"language_model.{name}": shape for name, shape in MLP.items()}
    module = "language_model.model.layers.3.mlp.down_proj"
    found = find_feeder(module, 48, config | {"text_config": LLAMA}, shapes)
    assert found.module == "language_model.model.layers.3.mlp.up_proj"
    assert "model_type 'opt'" in refusal(module, 48, config, shapes)
    assert "no model_type for the part" in refusal(module, 48, config | {"text_config": {}}, shapes)
    tower = refusal("strange_tower.layers.3.mlp.down_proj", 48, config, shapes)
    assert "part of model_type 'llava' that has not been reviewed" in tower


def test_an_older_flat_config_of_a_composed_model_is_understood() -> None:
    flat = {"model_type": "qwen2_vl", "vision_config": {"model_type": "qwen2_vl"}}
    assert find_feeder("model.layers.3.mlp.down_proj", 48, flat, MLP).kind == "gated"
    tower = {name.replace("model.layers", "visual.blocks"): shape for name, shape in MLP.items()}
    assert "not been reviewed" in refusal("visual.blocks.3.mlp.down_proj", 48, flat, tower)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "config.json names no model_type"),
        ({"model_type": "deepseek_v9"}, "the feed-forward of model_type 'deepseek_v9' has not been reviewed"),
        ({"model_type": "gpt_oss"}, "gpt_oss clamps the up projection and adds 1 to it"),
        ({"model_type": "mpt"}, "a gelu lies between up_proj and down_proj, and there is no gate"),
        ({"model_type": "step3p7"}, "step3p7 clamps"),
        (LLAMA | {"swiglu_limit": 7.0}, "clamped (swiglu_limit)"),
    ],
)
def test_what_cannot_move_has_a_reason(config: dict[str, Any] | None, reason: str) -> None:
    assert reason in refusal("model.layers.3.mlp.down_proj", 48, config, MLP)


def test_shapes_that_do_not_fit_have_a_reason() -> None:
    down = "model.layers.3.mlp.down_proj"
    assert "no weight with 47 columns" in refusal(down, 47, LLAMA, MLP)
    assert "the checkpoint has no" in refusal(down, 48, LLAMA, {f"{down}.weight": (32, 48)})
    wide = MLP | linears(model__layers__3__mlp__up_proj=(96, 32))
    assert "does not fit" in refusal(down, 48, LLAMA, wide)
    assert "no projection that could take" in refusal("model.layers.3.mlp.up_proj", 32, LLAMA, MLP)


def test_the_factors_are_the_vector_or_its_root() -> None:
    vector = np.array([4, -0.25, 0], "<f4")
    moved = move_vector(UP, vector)
    assert moved.dtype == np.dtype("<f4") and moved.tolist() == [4, -0.25, 0]
    root = Feeder("up", 0, 3, "squared relu")
    with pytest.raises(CannotKeep, match="2 of the vector's 3 elements are not positive"):
        move_vector(root, vector)
    with pytest.raises(CannotKeep, match="1 of the vector's 1 elements"):
        move_vector(root, np.array([np.nan], "<f4"))
    moved = move_vector(root, np.array([4, 0.25, 9], "<f8"))
    assert moved.dtype == np.dtype("<f8") and moved.tolist() == [2, 0.5, 3]


@pytest.mark.parametrize(
    ("start", "kind", "only_positive"),
    [
        (0, "gated", False),
        (0, "fused gate and up", False),
        (6, "fused gate and up", False),
        (0, "relu", True),
        (0, "squared relu", True),
        (0, "norm", False),
        (0, "value", False),
        (12, "value", False),
    ],
)
def test_the_self_check_agrees_for_every_kind(start: int, kind: Kind, only_positive: bool) -> None:
    feeder = Feeder("m", start, start + 6, kind)
    vector = np.array([0.5, 2, 1.5, 0.1, 1, 3], "<f4")
    assert self_check(feeder, vector) < 1e-7
    vector[2] = -1
    if only_positive:
        with pytest.raises(CannotKeep, match="1 of the vector's 6 elements"):
            self_check(feeder, vector)
    else:
        assert self_check(feeder, vector) < 1e-7


def test_the_self_check_sees_the_wrong_arithmetic() -> None:
    vector = np.array([0.5, 2, 1.5, 0.1, 1, 3], "<f4")
    relu = Feeder("m", 0, 6, "relu")
    assert self_check(relu, vector, "gelu") > 1e-2
    assert self_check(relu, vector, "relu2") > 1e-2
    with pytest.raises(CannotKeep, match="not positive"):
        self_check(relu, -vector)


#: Reviewed anew on every run: one of each kind, with experts, fused projections, an encoder, a
#: composed model.
SAMPLE = (
    "llama",
    "mixtral",
    "phi3",
    "opt",
    "nemotron",
    "bitnet",
    "gpt2",
    "bert",
    "t5",
    "qwen2_moe",
    "gemma3",
    "marian",
)


def check_review(reviewed: str) -> None:
    """Everything in the table that was tried in this model type holds on the installed transformers."""
    expected = {
        name: e for name, e in read_table().items() if name == reviewed or e.get("tried_in") == reviewed
    }
    result = mlp_kinds.review(reviewed)
    assert "problem" not in result, result
    table = mlp_kinds.make_table({reviewed: result})
    for name, entry in expected.items():
        if entry.get("tried_in", reviewed) == reviewed:
            held = table[name].get("move", {})
            assert not {
                way
                for way, kinds in entry.get("move", {}).items()
                if not set(kinds) <= set(held.get(way, ()))
            }


@pytest.mark.parametrize("reviewed", SAMPLE)
def test_a_sample_of_the_table_holds_on_real_models(reviewed: str) -> None:
    check_review(reviewed)


#: Every sixteenth; tools/mlp_kinds.py tries all of them in a quarter of an hour.
_OTHERS = sorted({e.get("tried_in", n) for n, e in read_table().items() if "move" in e} - set(SAMPLE))[::16]


@pytest.mark.slow
@pytest.mark.parametrize("reviewed", _OTHERS)
def test_more_of_the_table_holds_on_real_models(reviewed: str) -> None:
    check_review(reviewed)


@pytest.mark.parametrize("name", ["llama", "t5", "phi3", "opt"])
def test_a_live_adapter_of_peft_gives_the_same_as_the_moved_vectors(name: str, tmp_path: Path) -> None:
    import torch
    import transformers
    from peft import IA3Config, get_peft_model
    from safetensors.torch import load_file

    kind = next(k for k in zoo.KINDS if getattr(transformers, k.config_class).model_type == name)
    target = {"t5": "wo", "opt": "fc2"}.get(name, "down_proj")
    model = zoo.build(kind, dtype="float64")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(model, IA3Config(target_modules=[target], feedforward_modules=[target])).eval()
    generator = torch.Generator().manual_seed(3)
    moved = 0
    for path, module in live.base_model.model.named_modules():
        if not hasattr(module, "ia3_l"):
            continue
        vector = torch.rand(module.in_features, generator=generator, dtype=torch.float64) + 0.5
        module.ia3_l["default"].data = vector[None]
        feeder = find_feeder(path, len(vector), config, shapes)
        factors = move_vector(feeder, vector.numpy())
        for suffix in ("weight", "bias"):
            if f"{feeder.module}.{suffix}" in state:
                rows = state[f"{feeder.module}.{suffix}"][feeder.start : feeder.stop]
                rows *= torch.from_numpy(factors).reshape(-1, *[1] * (rows.dim() - 1))
        moved += 1
    assert moved >= 2
    inputs = zoo.example_inputs(live)
    merged = (
        type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=torch.float64).eval()
    )
    plain = zoo.build(kind, dtype="float64")
    with torch.no_grad():
        want, got, without = live(**inputs).logits, merged(**inputs).logits, plain(**inputs).logits
    assert torch.allclose(want, got, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(want, without, rtol=1e-2, atol=1e-2)
