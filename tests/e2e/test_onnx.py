"""``onnx`` through the CLI: what ONNX Runtime computes equals the live adapter, and the files are clean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ia3_export.cli import cli
from tests.support import zoo

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

EXPORTED = [
    ("bert-seq-cls", None), ("roberta-seq-cls", None), ("distilbert", None), ("albert", None), ("electra", None),
    ("deberta-v2", None), ("modernbert", None), ("mpnet", "feature-extraction"), ("xlm-roberta", "sentence-similarity"),
]  # fmt: skip


def _run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    return result.exit_code, result.output


def _make(folder: Path, name: str) -> tuple[Path, Path]:
    kind = zoo.by_name(name)
    model = zoo.build(kind)
    model.save_pretrained(folder / "base")
    zoo.adapt(model, kind).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def _initializers(path: Path) -> set[str]:
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize(("name", "task"), EXPORTED, ids=[name for name, _ in EXPORTED])
def test_the_exported_graph_computes_the_live_adapter(tmp_path: Path, name: str, task: str | None) -> None:
    import onnxruntime
    import torch
    from peft import PeftModel

    base, adapter = _make(tmp_path, name)
    asked = [] if task in (None, "sentence-similarity") else ["--task", task]
    code, text = _run("onnx", "--base", base, "--adapter", adapter, "--output", tmp_path / "out", *asked)
    assert code == 0, text
    kind = zoo.by_name(name)
    import transformers

    live = PeftModel.from_pretrained(
        getattr(transformers, kind.model_class).from_pretrained(base), adapter
    ).eval()
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    wanted = {node.name for node in session.get_inputs()}
    inner = live.get_base_model().base_model if asked else live
    for batch, length in ((1, 3), (4, 13)):  # never traced
        inputs = {
            k: v
            for k, v in zoo.example_inputs(live.get_base_model(), batch=batch, length=length).items()
            if k in wanted
        }
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        feeds = {k: v.numpy() for k, v in inputs.items()}
        if "token_type_ids" in wanted:
            feeds.setdefault("token_type_ids", feeds["input_ids"] * 0)
        with torch.no_grad():
            expected = inner(**inputs)[0].numpy()
        got = session.run(None, feeds)[0]
        assert abs(got - expected).max() <= 2e-5 * abs(expected).max()


def test_files_are_clean_deterministic_and_named_as_in_optimum(tmp_path: Path) -> None:
    import onnx

    base, adapter = _make(tmp_path, "bert-seq-cls")
    (base / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    for out in ("one", "two"):
        code, text = _run("onnx", "--base", base, "--adapter", adapter, "--output", tmp_path / out)
        assert code == 0, text
    one, two = ((tmp_path / out / "onnx" / "model.onnx").read_bytes() for out in ("one", "two"))
    assert one == two
    assert str(tmp_path).encode() not in one and b"site-packages" not in one and b".py" not in one
    assert (tmp_path / "one" / "tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()
    model = onnx.load(tmp_path / "one" / "onnx" / "model.onnx")
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch_size",
        "sequence_length",
    ]
    assert model.opset_import[0].version == 20
    assert not any("ia3" in name for name in _initializers(tmp_path / "one" / "onnx" / "model.onnx"))


def test_the_graph_has_the_operators_of_the_bases_own_export(tmp_path: Path) -> None:
    import onnx

    base, adapter = _make(tmp_path, "bert-seq-cls")
    assert _run("onnx", "--model", base, "--output", tmp_path / "plain")[0] == 0
    assert _run("onnx", "--base", base, "--adapter", adapter, "--output", tmp_path / "folded")[0] == 0
    plain, folded = (
        [node.op_type for node in onnx.load(tmp_path / out / "onnx" / "model.onnx").graph.node]
        for out in ("plain", "folded")
    )
    assert plain == folded


def test_a_wrong_graph_is_found_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ia3_export import exporting

    base, adapter = _make(tmp_path, "bert-seq-cls")
    right = exporting.save

    def damage(proto: Any, path: Path) -> None:
        weight = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
        weight.raw_data = bytes(len(weight.raw_data))
        right(proto, path)

    monkeypatch.setattr(exporting, "save", damage)
    code, text = _run("onnx", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    assert code == 1, text
    assert "error:" in text and not (tmp_path / "out").exists()


def test_verify_reads_the_exported_folder_and_fails_on_the_bases_graph(tmp_path: Path) -> None:
    base, adapter = _make(tmp_path, "bert-seq-cls")
    assert _run("onnx", "--base", base, "--adapter", adapter, "--output", tmp_path / "good")[0] == 0
    assert _run("onnx", "--model", base, "--output", tmp_path / "plain")[0] == 0
    code, text = _run(
        "verify", "--base", base, "--adapter", adapter, "--onnx", tmp_path / "good", "--json", "-q"
    )
    assert code == 0, text
    assert json.loads(text)["steps"][0]["name"] == "onnx float32"
    code, text = _run("verify", "--base", base, "--adapter", adapter, "--onnx", tmp_path / "plain")
    assert code == 1, text


def test_an_architecture_without_a_task_is_named_with_the_tasks_there_are(tmp_path: Path) -> None:
    base, _ = _make(tmp_path, "gpt2")
    code, text = _run("onnx", "--model", base, "--output", tmp_path / "out")
    assert code == 3
    assert "GPT2LMHeadModel" in text and "feature-extraction" in text and not (tmp_path / "out").exists()


def test_wrong_usage_is_exit_2(tmp_path: Path) -> None:
    base, adapter = _make(tmp_path, "bert-seq-cls")
    assert _run("onnx", "--output", tmp_path / "out")[0] == 2
    assert (
        _run("onnx", "--model", base, "--base", base, "--adapter", adapter, "--output", tmp_path / "out")[0]
        == 2
    )
    assert _run("onnx", "--model", base, "--output", tmp_path / "out", "--task", "text-generation")[0] == 2
