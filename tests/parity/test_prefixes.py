"""Forwards that differ from one layer on give what whole forwards give."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest

from ia3_export.parity.runs.inputs import make_cases
from ia3_export.parity.runs.live import LiveModel
from ia3_export.parity.runs.run_torch import Wanted, run_torch
from ia3_export.parity.runs.wrong import _left_out, _Prefixes, _replaced, layer_of

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 96}  # fmt: skip
BERT = {key: value for key, value in SIZE.items() if key != "num_key_value_heads"}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 5, "n_head": 2, "n_positions": 96}
VIT = {key: BERT[key] for key in BERT if key not in ("vocab_size", "max_position_embeddings")}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3N = SIZE | {"num_kv_shared_layers": 2, "head_dim": 8, "hidden_size_per_layer_input": 4,
                  "vocab_size_per_layer_input": 64, "laurel_rank": 2,
                  "activation_sparsity_pattern": [0.0] * 5,
                  "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]}  # fmt: skip

#: Class and configuration, the modules with vectors, and whether layers can be given again.
FAMILIES: Mapping[str, tuple[str, dict[str, Any], list[str], bool]] = {
    "llama": ("LlamaForCausalLM", SIZE, ["k_proj", "v_proj", "down_proj"], True),
    "gpt2": ("GPT2LMHeadModel", GPT2, ["c_attn", "mlp.c_proj"], True),
    "mixtral": ("MixtralForCausalLM", SIZE | {"num_local_experts": 2}, ["k_proj", "v_proj"], True),
    "gemma3n": ("Gemma3nForCausalLM", GEMMA3N, ["q_proj", "down_proj"], False),
    "bert": ("BertForSequenceClassification", BERT, ["key", "value", "output.dense"], True),
    "albert": ("AlbertForSequenceClassification", BERT | {"embedding_size": 8}, ["key", "value"], False),
    "t5": ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}, ["k", "v", "wo"], True),
    "vit": (
        "ViTForImageClassification",
        VIT | {"image_size": 16, "patch_size": 8},
        ["key", "value", "fc2"],
        True,
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[LiveModel, bool]:
    import torch
    import transformers
    from peft import IA3Config, get_peft_model

    name, config, targets, again = FAMILIES[request.param]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = get_peft_model(
        cls(cls.config_class(**config)), IA3Config(target_modules=targets, feedforward_modules=[])
    )
    vectors = []
    for path, parameter in model.named_parameters():
        if ".ia3_l." in path:
            parameter.data += 0.5 * torch.randn(parameter.shape)
            module = path.removeprefix("base_model.model.").partition(".ia3_l.")[0]
            vectors.append((module, parameter))
    return LiveModel(model=model.eval(), class_name=name, by="peft", vectors=tuple(vectors)), again


def test_a_layer_left_out_gives_what_a_whole_forward_gives(family: tuple[LiveModel, bool]) -> None:
    live, again = family
    cases = [case for case in make_cases(live.inner) if not case.past]
    layers = list(dict.fromkeys(layer_of(module) for module, _ in live.vectors))
    called: list[str] = []
    for layer in layers:
        # what is given again calls nothing that lies in the layer
        inside = next(m for m in live.inner.get_submodule(layer).modules() if not list(m.children()))
        inside.register_forward_hook(lambda _m, _i, _o, layer=layer: called.append(layer))
    right = run_torch(live.model, cases[:2], Wanted()).outputs
    for case, before in zip(cases[:2], right, strict=True):
        prefixes = _Prefixes(live, case, layers, Wanted())
        assert bool(prefixes._given) == again
        for i, layer in enumerate(layers):
            called.clear()
            with live.with_vectors(partial(_left_out, layer=layer)):
                found = prefixes.outputs(layer)
                if again:
                    assert not set(layers[:i]) & set(called)
                whole = run_torch(live.model, [case], Wanted()).outputs[0]
            for name, values in whole.items():
                np.testing.assert_array_equal(found[name], values)
                assert not np.array_equal(values, before[name]) or layer == layers[-1]
        after = prefixes.outputs()
        assert all(np.array_equal(after[name], values) for name, values in before.items())


def test_a_forward_that_another_library_wrapped_stays_wrapped() -> None:
    import torch

    module = torch.nn.Linear(2, 2)
    wrapped = module.forward = partial(torch.nn.Linear.forward, module)
    with _replaced(module, torch.ones(1)):
        assert module(torch.zeros(1, 2)).tolist() == [1.0]
    assert module.forward is wrapped
