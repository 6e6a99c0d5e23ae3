"""``onnx --precision keep``: the codes of a quantized base go into the graph as they are, and nothing is
lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ia3_export import verify
from ia3_export.fold import Array
from ia3_export.onnx.genai import write_genai_config
from ia3_export.parity.settings import RunSettings
from ia3_export.quantization.base import read_base
from ia3_export.quantization.coded import NotCoded
from tests.e2e.command import run
from tests.support import zoo
from tests.support.quantized import (
    adapter_for,
    dense_model,
    graph_logits,
    logits,
    source_of,
    unmerged_logits,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def _apart(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _whole_numbers(graph: Path) -> dict[str, Array]:
    """The codes in the file, by the weight that they belong to: (rows, columns and what fills the last
    block)."""
    found = {}
    for tensor in onnx.load(graph).graph.initializer:
        name, _, kind = tensor.name.rpartition("_")
        if kind in ("Q4", "Q8"):
            packed = numpy_helper.to_array(tensor)
            whole = packed if kind == "Q8" else np.stack((packed & 15, packed >> 4), axis=-1)
            found[name] = whole.reshape(len(whole), -1)
    return found


def _same_codes(graph: Path, base: Path) -> int:
    """How many weights have codes, all of which are the base's but for where their zero lies."""
    packed = read_base(base).quantization.packed
    found = _whole_numbers(graph)
    for name, numbers in found.items():
        codes = packed[name].read_codes().codes
        shifted = numbers[:, : codes.shape[1]].astype(int) - codes
        assert (shifted == shifted[0, 0]).all(), name
    return len(found)


@pytest.mark.parametrize(
    ("case", "coded", "products", "without"),
    [
        ("gguf-q4_k_m", 9, 5, {}),
        ("gptq-act-order", 7, 7, {"lm_head": "F16", "embed_tokens": "F16"}),
        ("awq-gemm-g32", 7, 7, {"lm_head": "F16", "embed_tokens": "F16"}),
        (
            "hqq-4bit-axis1-g64",
            6,
            6,
            {"lm_head": "F32", "embed_tokens": "F16", "down_proj": "rows of 96 elements share groups of 64"},
        ),
        ("quanto-qint8", 7, 0, {"lm_head": "F16", "embed_tokens": "F16"}),
    ],
)
def test_the_codes_are_the_base_s_and_nothing_is_lost(
    case: str, coded: int, products: int, without: dict[str, str], tmp_path: Path
) -> None:
    adapter, graph = adapter_for(case, tmp_path / "adapter"), tmp_path / "out" / "onnx" / "model_keep.onnx"
    exporting = ["--base", source_of(case), "--adapter", adapter, "--output", tmp_path / "out"]
    ran = run("onnx", *exporting, "--precision", "keep", "--json")
    assert ran.code == 0, ran
    document = json.loads(ran.stdout)
    assert document["verdict"] == "in parity" and document["losses"] == []
    (file,) = document["files"]
    assert file["path"] == "onnx/model_keep.onnx" and set(file["left"]) == set(file["reasons"])
    assert {name.split(".")[-2] for name in file["reasons"]} == set(without)
    for name, reason in file["reasons"].items():
        assert without[name.split(".")[-2]] in reason and f"{name}: " in ran.stderr.replace(", ", ": ")
    assert _same_codes(graph, source_of(case)) == coded
    operators = [node.op_type for node in onnx.load(graph).graph.node]
    assert operators.count("MatMulNBits") == products
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and "dtype" not in config["transformers.js_config"]
    wanted = unmerged_logits(source_of(case), adapter)
    assert _apart(graph_logits(graph, config["vocab_size"]), wanted) < 2e-6
    # two thirds of the smallest gate of a quantized graph would be 500 times as much
    steps = {step["precision"]: step for step in document["report"]["steps"]}
    assert steps["keep"]["distance"]["kl"] < 1e-9
    verifying = ["verify", "--base", source_of(case), "--adapter", adapter, "--onnx", tmp_path / "out"]
    assert run(*verifying, "--weights-only").code == 0


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """What ``merge --quantized keep`` wrote, its export in ``fp32,keep``, and the adapter."""
    folder, case = tmp_path_factory.mktemp("kept"), "ct-w4a16-g32-sym"
    adapter = adapter_for(case, folder / "adapter")
    merging = ["--base", source_of(case), "--adapter", adapter, "--output", folder / "merged"]
    assert run("merge", *merging, "--quantized", "keep", "--no-reload-check").code == 0
    exporting = ["--model", folder / "merged", "--output", folder / "out", "--precision", "fp32,keep"]
    ran = run("onnx", *exporting, "--target", "genai")
    assert ran.code == 0, ran
    return folder / "merged", folder / "out", adapter


def test_a_merge_that_stayed_quantized_is_exported_with_its_codes(kept: tuple[Path, Path, Path]) -> None:
    merged, out, _ = kept
    graph = out / "onnx" / "model_keep.onnx"
    assert _same_codes(graph, merged) == _same_codes(graph, source_of("ct-w4a16-g32-sym")) == 7
    vocabulary = json.loads((out / "config.json").read_text())["vocab_size"]
    assert _apart(graph_logits(graph, vocabulary), logits(dense_model(merged))) < 2e-6
    assert json.loads((out / "config.json").read_text())["transformers.js_config"]["dtype"] == "fp32"
    assert (
        json.loads((out / "genai_config.json").read_text())["model"]["decoder"]["filename"]
        == "onnx/model.onnx"
    )


def test_verify_knows_the_folder_with_both_files_and_with_one(kept: tuple[Path, Path, Path]) -> None:
    merged, out, _ = kept
    report = verify(merged, (), onnx=[out], settings=RunSettings(device="cpu"))
    assert report.in_parity and [step.name for step in report.steps] == ["onnx float32", "onnx keep"]
    assert report.base.id == "merged" and "base/config.json" in report.digests
    for name in ("model.onnx", "model_keep.onnx"):
        assert verify(merged, (), onnx=[out / "onnx" / name], settings=None).in_parity


def test_onnxruntime_genai_generates_with_the_codes(kept: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import torch

    og = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai runs this")
    merged, out, _ = kept
    shutil.copytree(out, tmp_path / "out")
    write_genai_config(tmp_path / "out", "onnx/model_keep.onnx")
    model = og.Model(str(tmp_path / "out"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=20, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([[1, 5, 7, 9]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    wanted = dense_model(merged).generate(torch.tensor([[1, 5, 7, 9]]), max_length=20, do_sample=False)
    assert [int(token) for token in generator.get_sequence(0)] == wanted[0].tolist()


@pytest.mark.parametrize("part", ["code", "scale", "16 bits"])
def test_a_damaged_file_is_found(kept: tuple[Path, Path, Path], part: str, tmp_path: Path) -> None:
    merged, out, _ = kept
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / "onnx" / "model_keep.onnx"
    model = onnx.load(path)
    ending = {"code": "up_proj.weight_Q4", "scale": "up_proj.weight_scales", "16 bits": "embed_tokens.weight"}
    tensor = next(t for t in model.graph.initializer if t.name.endswith(ending[part]))
    raw = bytearray(tensor.raw_data)
    # one bit of a code; a scale by one part in a thousand; the lowest bit of a weight
    raw[{"code": 777, "scale": 41, "16 bits": 0}[part]] ^= {"code": 16, "scale": 32, "16 bits": 1}[part]
    tensor.raw_data = bytes(raw)
    onnx.save(model, path)
    report = verify(merged, (), onnx=[tmp_path / "out"], settings=None)
    (proof,) = [proof for proof in report.weights if not proof.passed]
    assert not report.in_parity and proof.name == "onnx keep"
    assert proof.findings[0].tensor.endswith(ending[part].replace("_scales", "_Q4"))


def test_vectors_that_cannot_move_leave_their_weights_without_codes(tmp_path: Path) -> None:
    """GPT-2 has a GELU before the projection whose input the vector is on, and weights stored as (in,
    out)."""
    case = "gpt2-bnb-int8"
    adapter = adapter_for(case, tmp_path / "adapter")
    exporting = ["--base", source_of(case), "--adapter", adapter, "--output", tmp_path / "out"]
    ran = run("onnx", *exporting, "--precision", "keep", "--json")
    assert ran.code == 0, ran
    (file,) = json.loads(ran.stdout)["files"]
    reasons = {
        name.removesuffix(".weight").split(".")[-1]: reason for name, reason in file["reasons"].items()
    }
    assert "there is no gate" in reasons["c_proj"] and "a vector lies on its input" in reasons["c_proj"]
    graph = tmp_path / "out" / "onnx" / "model_keep.onnx"
    assert _same_codes(graph, source_of(case)) == 3
    wanted = unmerged_logits(source_of(case), adapter)
    assert _apart(graph_logits(graph, wanted.shape[-1]), wanted) < 2e-6


def test_what_has_no_codes_is_refused(tmp_path: Path) -> None:
    zoo.build(zoo.by_name("llama")).save_pretrained(tmp_path / "dense")
    out = ["--output", tmp_path / "out", "--precision", "keep"]
    ran = run("onnx", "--model", tmp_path / "dense", *out)
    assert ran.code == 3 and "is not quantized, so there are no codes to keep" in ran.stderr
    assert "int8 or int4" in ran.stderr
    ran = run("onnx", "--model", source_of("bnb-nf4"), *out, "--no-verify")
    assert ran.code == 3 and "NF4 are places in a table" in ran.stderr
    ran = run("onnx", "--model", tmp_path / "dense", *out, "--target", "mobile")
    assert ran.code == 2 and "no .ort file of --precision keep" in ran.stderr
    ran = run("bench", "--base", tmp_path / "dense", "--adapter", tmp_path / "dense", "--precision", "keep")
    assert ran.code == 2 and "not measured" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_every_packed_weight_says_what_it_is() -> None:
    packed = read_base(source_of("ct-mixed")).quantization.packed
    for weight in packed.values():
        if isinstance(weight.coded, str):
            with pytest.raises(NotCoded, match="small floats"):
                weight.read_codes()
