"""onnxruntime-genai generates from exported folders what the unmerged PyTorch model generates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ia3_export.onnx.genai import write_genai_config
from tests.e2e.command import edit_json, run
from tests.runtimes.models import NEW_TOKENS, Exported
from tests.support import zoo

og = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai runs these")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

#: What the configurations differ in: no position_ids, ALiBi without a longest sequence, one cached head,
#: head_dim of its own. And how the number of layers is called: one is enough where llama and gpt2 show how
#: several come together.
KINDS = {
    "opt": "num_hidden_layers",
    "bloom": "n_layer",
    "falcon-multi-query": "num_hidden_layers",
    "qwen3": "num_hidden_layers",
}


def _generate(folder: Path, rows: Any, new_tokens: int, **search: Any) -> list[list[int]]:
    """What is generated after each row of equally long prompts, as documented by onnxruntime-genai."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    length = len(rows[0])
    parameters.set_search_options(batch_size=len(rows), max_length=length + new_tokens, **search)
    generator = og.Generator(model, parameters)
    generator.append_tokens(rows)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(i)[length:]] for i in range(len(rows))]


def _rows(*rows: Sequence[int]) -> Any:
    import numpy as np

    return np.array(rows, dtype=np.int32)


@pytest.fixture
def copied(tmp_path: Path, exported: Callable[[str], Exported]) -> Callable[[str], tuple[Exported, Path]]:
    """An exported model, and a copy of its folder to write into."""

    def get(name: str) -> tuple[Exported, Path]:
        found = exported(name)
        shutil.copytree(found.folder, tmp_path / name)
        return found, tmp_path / name

    return get


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.versions), "gpt2"])
def test_text_in_gives_the_tokens_of_the_live_adapter(
    copied: Callable[[str], tuple[Exported, Path]], name: str
) -> None:
    model, folder = copied(name)
    write_genai_config(folder)
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    for text, ids, expected in zip(model.inputs, model.input_ids, model.expected, strict=True):
        assert [int(token) for token in tokenizer.encode(text)] == list(ids)
        assert _generate(folder, _rows(ids), NEW_TOKENS) == [expected]
    # prompts of different lengths in one batch
    batch = tokenizer.encode_batch(list(model.inputs)).as_numpy()
    assert _generate(folder, batch, NEW_TOKENS) == list(model.expected)


@pytest.mark.parametrize("suffix", ["_int8", "_q4"])
def test_any_precision_runs(copied: Callable[[str], tuple[Exported, Path]], suffix: str) -> None:
    """Quantized weights may choose other tokens than the model.

    The same file in ONNX Runtime chooses the same.
    """
    model, folder = copied("llama")
    graph = f"onnx/model{suffix}.onnx"
    write_genai_config(folder, graph)
    for ids in model.input_ids:
        assert _generate(folder, _rows(ids), NEW_TOKENS) == [_greedy(folder / graph, ids)]


def _greedy(graph: Path, ids: Sequence[int]) -> list[int]:
    """Greedy tokens from ONNX Runtime: the prompt with an empty cache, then a token at a time."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph))
    outputs = [node.name for node in session.get_outputs()]
    past: dict[str, Any] = {
        node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past_key_values")
    }
    tokens, new = list(ids), len(ids)
    for _ in range(NEW_TOKENS):
        feeds = {
            "input_ids": np.array([tokens[-new:]]),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens) - new, len(tokens))[None],
        }
        logits, *present = session.run(outputs, feeds | past)
        past = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(outputs[1:], present, strict=True)
        }
        tokens.append(int(logits[0, -1].argmax()))
        new = 1
    return tokens[len(ids) :]


def test_generation_stops_at_any_of_the_end_tokens(
    copied: Callable[[str], tuple[Exported, Path]],
) -> None:
    model, folder = copied("llama")
    expected = model.expected[0]
    end = expected[4]
    edit_json(folder / "generation_config.json", eos_token_id=[0, end])
    write_genai_config(folder)
    stopped = _generate(folder, _rows(model.input_ids[0]), NEW_TOKENS)[0]
    assert stopped == expected[: expected.index(end)]


@pytest.mark.parametrize(
    "setting", [{"num_beams": 3}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}], ids=str
)
def test_the_search_is_that_of_generation_config(
    copied: Callable[[str], tuple[Exported, Path]], setting: dict[str, Any]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, folder = copied("llama")
    edit_json(folder / "generation_config.json", **setting)
    write_genai_config(folder)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model.base), model.adapter).eval()
    differs = False
    for ids, greedy in zip(model.input_ids, model.expected, strict=True):
        prompt = torch.tensor([ids])
        found = live.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            **setting,
        )
        expected = found[0, len(ids) :].tolist()
        assert _generate(folder, _rows(ids), NEW_TOKENS) == [expected]
        differs |= expected != greedy
    assert differs


@pytest.mark.parametrize("name", KINDS)
def test_decoders_of_every_make_generate(tmp_path: Path, name: str) -> None:
    import torch
    from peft import PeftModel

    kind = zoo.by_name(name)
    kind = replace(kind, config={**kind.config, KINDS[name]: 1})
    model = zoo.build(kind)
    model.save_pretrained(tmp_path / "base")
    adapted = zoo.adapt(model, kind)
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(tmp_path / "adapter")
    ran = run(
        "onnx",
        "--base",
        tmp_path / "base",
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "out",
        "--task",
        "text-generation",
        "--target",
        "genai",
        "--no-verify",
    )
    assert ran.code == 0, ran
    prompt = torch.tensor([[5, 17, 40, 8, 99]])
    expected = adapted.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )[0, 5:].tolist()
    assert _generate(tmp_path / "out", prompt.numpy().astype("int32"), NEW_TOKENS)[0] == expected
    written = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert str(tmp_path) not in json.dumps(written)
