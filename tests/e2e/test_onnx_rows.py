"""Graphs of codes: a vector on the input of a weight lies on the rows that feed it, so that the codes are the
base's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
from onnx import numpy_helper

from tests.e2e.command import run
from tests.support import zoo
from tests.support.exported import Exports

pytestmark = pytest.mark.filterwarnings("ignore")

GRAPH = Path("onnx/model_int8.onnx")


@pytest.fixture(scope="module")
def sources(exports: Exports) -> list[str | Path]:
    base, adapter = exports.written("llama-biased")
    return ["--base", base, "--adapter", adapter]


@pytest.fixture(scope="module")
def exported(exports: Exports) -> dict[str, Path]:
    """The int8 folders of the base alone, of base and adapter, and of the merged model."""
    base, adapter = exports.written("llama-biased")
    merged, of_merged = exports.folder / "rows-merged", exports.folder / "rows-of-merged"
    assert run("merge", "--base", base, "--adapter", adapter, "--output", merged).code == 0
    graphs = ["--output", of_merged, "--precision", "int8", "--no-verify"]
    assert run("onnx", "--model", merged, *graphs).code == 0
    return {
        "base": exports("llama-biased", "--precision", "int8", adapted=False).folder,
        "adapted": exports("llama-biased", "--precision", "int8").folder,
        "merged": of_merged,
    }


def _tensors(folder: Path, of: str) -> dict[str, np.ndarray[Any, Any]]:
    graph = onnx.load(folder / GRAPH).graph
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer if of in t.name}


def _verify(sources: list[str | Path], folder: Path) -> dict[str, Any]:
    ran = run("verify", *sources, "--onnx", folder / GRAPH, "--device", "cpu", "--json")
    return dict(json.loads(ran.stdout))


def test_the_codes_are_the_base_s_and_the_scales_and_biases_that_feed_them_hold_the_vector(
    exported: dict[str, Path],
) -> None:
    plain, adapted, merged = (exported[name] for name in ("base", "adapted", "merged"))
    before = _tensors(plain, "down_proj")
    assert any(value.dtype == np.uint8 for value in before.values())
    for name, value in _tensors(adapted, "down_proj").items():
        assert np.array_equal(value, before[name]), name
    changed = {n for n, v in _tensors(merged, "down_proj").items() if not np.array_equal(v, before[n])}
    assert {name.rpartition("_")[2] for name in changed} == {"Q8", "scales"}  # not of a graph of the merged
    fed = _tensors(plain, "up_proj")
    moved = {n for n, v in _tensors(adapted, "up_proj").items() if not np.array_equal(v, fed[n])}
    assert {name.rpartition(".")[2].rpartition("_")[2] for name in moved} >= {"scales", "bias"}


def test_verify_takes_either_place_of_a_vector(exported: dict[str, Path], sources: list[str | Path]) -> None:
    for name in ("adapted", "merged"):
        (proof,) = _verify(sources, exported[name])["weights"]
        assert proof["passed"] and proof["unproven"] == 0, proof


@pytest.mark.parametrize(
    ("into", "source"), [("adapted", "merged"), ("merged", "adapted")], ids=["twice", "never"]
)
def test_a_vector_in_both_places_or_in_neither_is_found(
    exported: dict[str, Path], sources: list[str | Path], tmp_path: Path, into: str, source: str
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(exported[into], folder)
    model = onnx.load(folder / GRAPH)
    others = _tensors(exported[source], "layers.1.mlp.down_proj")
    for tensor in model.graph.initializer:
        if tensor.name in others:
            tensor.CopyFrom(numpy_helper.from_array(others[tensor.name], tensor.name))
    onnx.save(model, folder / GRAPH)
    (proof,) = _verify(sources, folder)["weights"]
    assert not proof["passed"]
    assert [finding["tensor"] for finding in proof["findings"]] == ["model.layers.1.mlp.down_proj.weight_Q8"]


def _exported(folder: Path, model: Any, vectors: dict[str, Any]) -> dict[str, Any]:
    """What `verify` says of the int8 file of `model` with an adapter of `vectors` on down_proj, by layer."""
    model.save_pretrained(folder / "base")
    targets = {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
    live = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM", **targets))
    for name, parameter in live.named_parameters():
        if "ia3_l" in name:
            parameter.data = vectors[name.partition("layers.")[2][:1]].reshape(parameter.shape)
    live.save_pretrained(folder / "adapter")
    sources: list[str | Path] = ["--base", folder / "base", "--adapter", folder / "adapter"]
    ran = run("onnx", *sources, "--output", folder / "out", "--precision", "int8", "--no-verify")
    assert ran.code == 0, ran
    return _verify(sources, folder / "out")


def test_layers_whose_equal_biases_are_kept_once_are_not_moved_apart(tmp_path: Path) -> None:
    """The graph has one bias for two equal layers, and they get different vectors."""
    torch.manual_seed(0)
    model = zoo.build(zoo.by_name("llama-biased"))
    first, second = model.model.layers
    second.load_state_dict(first.state_dict())
    width = first.mlp.down_proj.in_features
    report = _exported(tmp_path, model, {"0": 3 + torch.rand(width), "1": torch.ones(width)})
    assert report["weights"][0]["passed"]
    (bias,) = _tensors(tmp_path / "out", "mlp.up_proj.bias").values()
    assert np.array_equal(bias, first.mlp.up_proj.bias.detach())


def test_a_bias_of_zeros_stays_what_the_plan_says(tmp_path: Path) -> None:
    """Negative elements of a vector make negative zeros of them."""
    kind = zoo.by_name("llama-biased")
    torch.manual_seed(0)
    model = zoo.build(
        replace(kind, config={**kind.config, "intermediate_size": 1100, "num_hidden_layers": 1})
    )
    for module in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj):
        module.bias.data.zero_()
    vector = 1 + 0.1 * torch.randn(1100)
    vector[::9] *= -1
    report = _exported(tmp_path, model, {"0": vector})
    assert report["weights"][0]["passed"], report["weights"]
