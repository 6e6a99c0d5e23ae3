"""``onnx`` of what stays quantized: the dense model that it stands for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.command import run
from tests.support import zoo
from tests.support.exported import KINDS
from tests.support.quantized import adapter_for, dense_model, graph_logits, logits, source_of, unmerged_logits

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """A Llama whose matrices are larger than the nodes around them, and an adapter that changes what it
    says."""
    folder = tmp_path_factory.mktemp("sources")
    kind = zoo.by_name("llama")
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    kind = replace(kind, config={**kind.config, **sizes, "tie_word_embeddings": True})
    model = zoo.build(kind)
    model.save_pretrained(folder / "base")
    zoo.adapt(model, kind).save_pretrained(folder / "adapter")
    return ["--base", folder / "base", "--adapter", folder / "adapter"]


def _bits(sources: list[str | Path], output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Bytes of the int4 file and what ``--json`` says of its bits."""
    ran = run("onnx", *sources, "--output", output, "--precision", "int4", "--no-verify", "--json", *options)
    assert ran.code == 0, ran
    assert [file.name for file in (output / "onnx").iterdir()] == ["model_q4.onnx"]
    return (output / "onnx" / "model_q4.onnx").stat().st_size, json.loads(ran.stdout)["bits"]


def test_int4_is_as_small_or_as_near_as_asked(sources: list[str | Path], tmp_path: Path) -> None:
    _, bits = _bits(sources, tmp_path / "plain")
    assert bits["loss"] <= 0.05
    assert {row["bits"] for row in bits["weights"]} <= {4, 8}
    # the order in which weights become narrow is that of what they lose for a byte
    rates = [row["loss"] / row["saved"] for row in bits["weights"]]
    assert rates == sorted(rates)
    assert [row["bits"] for row in bits["weights"]] == sorted(row["bits"] for row in bits["weights"])

    near, near_bits = _bits(sources, tmp_path / "near", "--keep-effect", "0.999")
    rough, rough_bits = _bits(sources, tmp_path / "rough", "--keep-effect", "0.2")
    assert near > rough and near_bits["loss"] < rough_bits["loss"]
    budget = (near + rough) // 2
    asked, _ = _bits(sources, tmp_path / "asked", "--budget", f"{budget / 1000}KB")
    assert rough <= asked <= budget


def test_a_loss_is_said_and_fails_where_it_is_more_than_allowed(
    sources: list[str | Path], tmp_path: Path
) -> None:
    output = tmp_path / "exported"
    graphs = [*sources, "--output", output, "--precision", "fp32,int8", "--json"]
    ran = run("onnx", *graphs)
    assert ran.code == 0, ran
    document = json.loads(ran.stdout)
    steps = {step["precision"]: step for step in document["report"]["steps"]}
    lost = steps["int8"]["distance"]["kl"]
    assert document["verdict"] == ("in parity" if steps["int8"]["passed"] else "written with a loss")
    assert bool(document["losses"]) != steps["int8"]["passed"]
    assert f"\n{document['verdict']}\n" in ran.stderr and "NOT in parity" not in ran.stderr

    assert run("onnx", *graphs, "--overwrite", "--max-loss", str(2 * lost)).code == 0
    less = tmp_path / "less"
    graphs[graphs.index(output)] = less
    ran = run("onnx", *graphs, "--max-loss", str(lost / 2))
    assert ran.code == 1 and "--max-loss" in ran.stderr and "model_int8.onnx" in ran.stderr
    assert not less.exists() and (tmp_path / "less.failed" / "report.json").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "1MB"], "--budget is about the bits of --precision int4"),
        (["--precision", "int4", "--budget", "1MB", "--keep-effect", "0.9"], "both decide"),
        (["--precision", "int4", "--keep-effect", "1.5"], "is no share"),
    ],
)
def test_options_of_bits_that_mean_nothing_are_wrong_usage(
    sources: list[str | Path], tmp_path: Path, options: list[str], said: str
) -> None:
    ran = run("onnx", *sources, "--output", tmp_path / "out", *options)
    assert ran.code == 2 and said in ran.stderr


def test_an_effect_can_only_be_kept_of_an_adapter(sources: list[str | Path], tmp_path: Path) -> None:
    base = ["--model", sources[1], "--output", tmp_path / "out"]
    ran = run("onnx", *base, "--precision", "int4", "--keep-effect", "0.9", "--no-verify")
    assert ran.code == 3 and "no effect to keep" in ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["gguf-q4_k_m"])
def test_a_gguf_base_is_exported_with_its_adapter(case: str, tmp_path: Path) -> None:
    adapter = adapter_for(case, tmp_path / "adapter")
    ran = run("onnx", "--base", source_of(case), "--adapter", adapter, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran
    report = json.loads(ran.stdout)["report"]
    assert report["base"]["id"] == "model.gguf"
    assert report["weights"][0]["passed"] and report["weights"][0]["changed"] == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "llama"
    wanted = unmerged_logits(source_of(case), adapter)
    found = graph_logits(tmp_path / "out" / "onnx" / "model.onnx", config["vocab_size"])
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
    proof = ["verify", "--base", source_of(case), "--adapter", adapter, "--onnx", tmp_path / "out"]
    assert run(*proof, "--device", "cpu").code == 0


@pytest.mark.parametrize(
    "case",
    ["bnb-nf4", "gptq-4bit-g32", "ct-fp8-static-kv-cache"],  # the readers of all are tested on their own
)
def test_a_kept_merge_is_exported_dense(case: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    adapter = adapter_for(case, tmp_path / "adapter")
    merging = ["merge", "--base", source_of(case), "--adapter", adapter, "--output", kept]
    assert run(*merging, "--quantized", "keep", "--no-reload-check").code == 0
    ran = run("onnx", "--model", kept, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    wanted = logits(dense_model(kept))
    found = graph_logits(tmp_path / "out" / "onnx" / "model.onnx", config["vocab_size"])
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_codes_of_an_encoder_decoder_stand_an_empty_encoder(tmp_path: Path) -> None:
    """Once keys and values of the encoder are in the cache, its states are empty, and ONNX Runtime's sums of
    nothing have the wrong shape."""
    kind = KINDS["t5"]
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(tmp_path / "adapter")
    sources = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    ran = run("onnx", *sources, "--output", tmp_path / "out", "--precision", "fp32,int4", "--json")
    assert ran.code == 0, ran.stderr
    steps = {step["name"]: step for step in json.loads(ran.stdout)["report"]["steps"]}
    assert steps["onnx int4"]["effect_present"] > 0.5


def test_codes_of_convolutions_with_a_normalization_are_compared_with_what_they_were_made_of(
    tmp_path: Path,
) -> None:
    kind = KINDS["resnet"]
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(tmp_path / "adapter")
    sources = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    ran = run("onnx", *sources, "--output", tmp_path / "out", "--precision", "fp32,int8", "--json")
    assert ran.code == 0, ran.stderr
    coded = json.loads(ran.stdout)["report"]["weights"][1]
    assert coded["passed"] and "convolution" not in " ".join(coded["notes"])
