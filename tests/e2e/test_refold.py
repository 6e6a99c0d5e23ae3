"""Adapters folded into ONNX folders that exist: ours, optimum's, quantized by ONNX Runtime, without names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

from ia3_export.fold import Scale
from ia3_export.onnx.decoded import values_of
from ia3_export.onnx.places import read_graph_file
from tests.e2e.command import edit_json, run
from tests.support import zoo
from tests.support.exported import KINDS
from tests.support.quantized import adapter_for, source_of

pytestmark = pytest.mark.filterwarnings("ignore")

#: GPT-2's Conv1D and BERT's head and input vectors that no rows take, beside a Llama.
FAMILIES = ("llama", "gpt2", "bert-seq-cls", "t5", "resnet", "whisper")
PRECISIONS = "fp32,fp16,int8,q8"


def folders(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """A base, an adapter, and the base's export without names that are ours: an untouched ONNX folder."""
    kind = KINDS[name]
    zoo.build(kind).save_pretrained(folder / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(folder / "adapter")
    precision = PRECISIONS if name in ("llama", "gpt2", "bert-seq-cls") else "fp32,int8"
    ran = run(
        "onnx", "--model", folder / "base", "--output", folder / "exported", "--precision", precision,
        "--no-verify",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    return folder / "base", folder / "adapter", folder / "exported"


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, Path]:
    return (request.param, *folders(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return folders("llama", tmp_path_factory.mktemp("llama"))


def refold(base: Path, adapter: Path, output: Path, *more: str | Path) -> dict[str, Any]:
    ran = run("onnx", "--onnx-base", base, "--adapter", adapter, "--output", output, "--json", *more)
    assert ran.code == 0, ran.stderr
    return dict(json.loads(ran.stdout))


def test_a_refolded_float32_graph_is_byte_for_byte_the_fresh_export_of_the_merged_model(
    family: tuple[str, Path, Path, Path], tmp_path: Path
) -> None:
    name, base, adapter, exported = family
    document = refold(exported, adapter, tmp_path / "out")
    assert document["verdict"] == "in parity"
    assert all(proof["passed"] and proof["changed"] for proof in document["report"]["weights"])
    assert all(step["effect_present"] > 0.9 for step in document["report"]["steps"])
    assert run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "merged").code == 0
    fresh = ("--output", tmp_path / "fresh", "--no-verify")
    assert run("onnx", "--model", tmp_path / "merged", *fresh).code == 0
    files = sorted((tmp_path / "fresh" / "onnx").glob("*.onnx"))
    assert files
    for file in files:
        ours = tmp_path / "out" / "onnx" / file.name
        if (
            name == "resnet"
        ):  # the exporter multiplies with a normalization's numbers, before or after a vector
            one, other = (onnx.load(path).graph.initializer for path in (file, ours))
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(*map(onnx.numpy_helper.to_array, (a, b)), rtol=3e-7)
        else:
            assert file.read_bytes() == ours.read_bytes(), name
    # other tools' eyes: the live adapter in PEFT, through the ordinary verify
    ran = run("verify", "--base", base, "--adapter", adapter, "--onnx", tmp_path / "out", "--json")
    steps = {step["file"]: step for step in json.loads(ran.stdout)["steps"]}
    assert all(step["passed"] for file, step in steps.items() if "int8" not in step["precision"]), ran.stderr


def test_sixteen_bit_weights_round_as_a_merge_rounds_them(tmp_path: Path) -> None:
    import torch

    kind = KINDS["llama"]
    zoo.build(kind).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(tmp_path / "adapter")
    sources = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    plain = ("--precision", "fp32,fp16", "--no-verify")
    assert run("onnx", "--model", tmp_path / "base", "--output", tmp_path / "exported", *plain).code == 0
    assert run("onnx", *sources, "--output", tmp_path / "fresh", *plain).code == 0
    refold(tmp_path / "exported", tmp_path / "adapter", tmp_path / "out")
    for name in ("model.onnx", "model_fp16.onnx"):
        fresh, ours = (onnx.load(tmp_path / folder / "onnx" / name) for folder in ("fresh", "out"))
        theirs = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in fresh.graph.initializer}
        for tensor in ours.graph.initializer:
            np.testing.assert_array_equal(
                onnx.numpy_helper.to_array(tensor), theirs[tensor.name], tensor.name
            )


def test_neither_torch_nor_transformers_is_imported(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, adapter, exported = llama
    code = (
        "import sys; from ia3_export import errors; from ia3_export.commands.refolding import refold;"
        f"refold({str(tmp_path / 'out')!r}, {str(exported)!r}, [{str(adapter)!r}]);"
        "print(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


class _Readings(CalibrationDataReader):
    """One batch of tokens."""

    def __init__(self, path: Path) -> None:
        kinds = {"tensor(int64)": "<i8", "tensor(float)": "<f4"}
        sizes = {"batch_size": 2, "sequence_length": 5, "past_sequence_length + sequence_length": 5}
        ports = onnxruntime.InferenceSession(path).get_inputs()
        shapes = {p.name: [a if isinstance(a, int) else sizes.get(a, 0) for a in p.shape] for p in ports}
        self.batches: Iterator[Any] = iter([{p.name: np.ones(shapes[p.name], kinds[p.type]) for p in ports}])

    def get_next(self) -> Any:
        return next(self.batches, None)


def _optimum(source: Path, target: Path) -> None:
    """The graph with names as PyTorch's older exporter writes them: weights by numbers, nodes by modules."""
    model = onnx.load(source)
    renamed: dict[str, str] = {}
    for number, tensor in enumerate(model.graph.initializer):
        if tensor.name.endswith("_proj.weight") or ".dense.weight" in tensor.name:
            renamed[tensor.name] = f"onnx::MatMul_{number}"
    for node in model.graph.node:
        for name in node.input:
            if node.op_type == "MatMul" and name in renamed:
                node.name = "/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul"
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    onnx.save(model, target)


def _bare(source: Path, target: Path) -> None:
    """The graph without any name that tells a module."""
    model = onnx.load(source)
    names = {tensor.name: f"w{number}" for number, tensor in enumerate(model.graph.initializer)}
    for node in model.graph.node:
        node.name = ""
        node.input[:] = [names.get(name, name) for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    onnx.save(model, target)


def _nbits(source: Path, target: Path) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


FOREIGN: dict[str, Callable[[Path, Path], None]] = {
    "optimum": lambda source, target: _optimum(source, target),
    "without names": lambda source, target: _bare(source, target),
    "float16": lambda source, target: onnx.save(
        convert_float_to_float16(onnx.load(source), keep_io_types=True), target
    ),
    "dynamic, a scale a tensor": lambda source, target: quantize_dynamic(str(source), str(target)),
    "dynamic, a scale an output": lambda source, target: quantize_dynamic(
        str(source), str(target), per_channel=True
    ),
    "4 bits in blocks": _nbits,
}


@pytest.mark.parametrize("form", FOREIGN)
@pytest.mark.parametrize("by", ["name", "content"])
def test_folders_of_other_tools_take_an_adapter(
    llama: tuple[Path, Path, Path], tmp_path: Path, form: str, by: str
) -> None:
    base, adapter, exported = llama
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copyfile(exported / "config.json", plain / "config.json")
    named = tmp_path / "named.onnx"
    _optimum(exported / "onnx" / "model.onnx", named)
    if by == "content":
        _bare(exported / "onnx" / "model.onnx", named)
    FOREIGN[form](
        named if form not in ("optimum", "without names") else exported / "onnx" / "model.onnx",
        plain / "model.onnx",
    )
    more = ("--base", base) if by == "content" or form == "without names" else ()
    document = refold(plain, adapter, tmp_path / "out", *more)
    step = document["report"]["steps"][0]
    assert step["effect_present"] == pytest.approx(1, abs=0.02)
    assert step["distance"]["max_error"] < 0.02 * document["report"]["reference"]["effect"]
    before, after = (read_graph_file(folder / "model.onnx") for folder in (plain, tmp_path / "out"))
    for own, codes in before.coded.items():  # no code is rounded again
        assert after.coded[own] == codes
        np.testing.assert_array_equal(values_of(before, codes), values_of(after, codes))


def test_convolutions_are_found_by_their_values(tmp_path: Path) -> None:
    base, adapter, exported = folders("convnext", tmp_path)
    (tmp_path / "bare").mkdir()
    shutil.copyfile(exported / "config.json", tmp_path / "bare" / "config.json")
    _bare(exported / "onnx" / "model.onnx", tmp_path / "bare" / "model.onnx")
    document = refold(tmp_path / "bare", adapter, tmp_path / "out", "--base", base)
    assert document["report"]["steps"][0]["effect_present"] == pytest.approx(1, abs=1e-3)


def test_a_decoder_alone_under_optimum_s_older_name(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, adapter, exported = llama
    (tmp_path / "old").mkdir()
    shutil.copyfile(exported / "config.json", tmp_path / "old" / "config.json")
    _optimum(exported / "onnx" / "model.onnx", tmp_path / "old" / "decoder_model_merged.onnx")
    refold(tmp_path / "old", adapter, tmp_path / "out")
    assert (tmp_path / "out" / "decoder_model_merged.onnx").exists()


def test_without_names_the_refusal_says_to_give_the_base(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, adapter, exported = llama
    (tmp_path / "bare").mkdir()
    _bare(exported / "onnx" / "model.onnx", tmp_path / "bare" / "model.onnx")
    shutil.copyfile(exported / "config.json", tmp_path / "bare" / "config.json")
    ran = run("onnx", "--onnx-base", tmp_path / "bare", "--adapter", adapter, "--output", tmp_path / "out")
    assert ran.code == 3 and "--base" in ran.stderr and not (tmp_path / "out").exists()


def test_activations_with_fixed_scales_are_refused_by_name(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, adapter, exported = llama
    (tmp_path / "qdq").mkdir()
    source = exported / "onnx" / "model.onnx"
    quantize_static(
        str(source), str(tmp_path / "qdq" / "model.onnx"), _Readings(source), quant_format=QuantFormat.QDQ
    )
    shutil.copyfile(exported / "config.json", tmp_path / "qdq" / "config.json")
    ran = run("onnx", "--onnx-base", tmp_path / "qdq", "--adapter", adapter, "--output", tmp_path / "out")
    assert ran.code == 3 and "measured on the base" in ran.stderr and "self_attn.k_proj" in ran.stderr


def test_weights_alone_behind_dequantizelinear_take_vectors_in_their_scales(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, adapter, exported = llama
    (tmp_path / "weights").mkdir()
    shutil.copyfile(exported / "config.json", tmp_path / "weights" / "config.json")
    model = onnx.load(exported / "onnx" / "model.onnx")
    for tensor in [t for t in model.graph.initializer if t.name.endswith("_proj.weight")]:
        values = onnx.numpy_helper.to_array(tensor)
        scale = np.float32(np.abs(values).max() / 127)
        name, codes = tensor.name, np.rint(values / scale).astype(np.int8)
        tensor.CopyFrom(onnx.numpy_helper.from_array(codes, f"{name}_quantized"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
        for node in model.graph.node:
            node.input[:] = [f"{name}_wide" if value == name else value for value in node.input]
        inputs = [f"{name}_quantized", f"{name}_scale"]
        model.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}_wide"]))
    onnx.save(model, tmp_path / "weights" / "model.onnx")
    document = refold(tmp_path / "weights", adapter, tmp_path / "out")
    assert document["report"]["steps"][0]["effect_present"] == pytest.approx(1, abs=1e-4)


@pytest.mark.versions
def test_external_data_stay_external(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, adapter, exported = llama
    shutil.copytree(exported, tmp_path / "base")
    for name in ("model.onnx", "model_int8.onnx"):
        path = tmp_path / "base" / "onnx" / name
        model = onnx.load(path)
        path.unlink()
        onnx.save(
            model, path, save_as_external_data=True, location=f"{name}_data", size_threshold=64,
            convert_attribute=False,
        )  # fmt: skip
    document = refold(tmp_path / "base", adapter, tmp_path / "out")
    assert document["verdict"] == "in parity"
    plain = refold(exported, adapter, tmp_path / "plain")
    assert plain["verdict"] == "in parity"
    for name in ("model.onnx", "model_int8.onnx"):
        assert (tmp_path / "out" / "onnx" / f"{name}_data").exists()
        models = [onnx.load(tmp_path / folder / "onnx" / name) for folder in ("out", "plain")]
        one, other = ({t.name: t.raw_data for t in model.graph.initializer if t.raw_data} for model in models)
        assert one == other


@pytest.mark.versions
def test_several_adapters_fold_one_after_the_other(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, exported = llama
    zoo.adapt(zoo.build(KINDS["llama"]), KINDS["llama"], seed=2).save_pretrained(tmp_path / "second")
    both = ("--adapter", adapter, "--adapter", tmp_path / "second")
    assert run("onnx", "--onnx-base", exported, *both, "--output", tmp_path / "out").code == 0
    fresh = ("--output", tmp_path / "fresh", "--no-verify", "--precision", "fp32")
    assert run("onnx", "--base", base, *both, *fresh).code == 0
    one, other = (tmp_path / folder / "onnx" / "model.onnx" for folder in ("out", "fresh"))
    assert one.read_bytes() == other.read_bytes()


def test_an_adapter_that_is_in_already_is_refused(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, exported = llama
    refold(exported, adapter, tmp_path / "out", "--no-verify")
    fresh = ("--output", tmp_path / "fresh", "--no-verify")
    assert run("onnx", "--base", base, "--adapter", adapter, *fresh).code == 0
    for folder in ("out", "fresh"):
        again = ("--onnx-base", tmp_path / folder, "--adapter", adapter, "--output", tmp_path / "again")
        ran = run("onnx", *again)
        assert ran.code == 3 and "already holds the vectors" in ran.stderr


def test_other_options_of_graphs_are_refused(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, adapter, exported = llama
    given = ("--onnx-base", exported, "--adapter", adapter, "--output", tmp_path / "out")
    for more in (("--precision", "int8"), ("--swappable",), ("--task", "fill-mask"), ("--model", exported)):
        ran = run("onnx", *given, *more)
        assert ran.code == 2 and "--onnx-base" in ran.stderr, more


def test_an_adapter_for_another_width_is_refused_by_name(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, adapter, exported = llama
    from safetensors.numpy import load_file, save_file

    shutil.copytree(adapter, tmp_path / "wide")
    file = tmp_path / "wide" / "adapter_model.safetensors"
    tensors = {name: np.concatenate([values, values]) for name, values in load_file(file).items()}
    save_file(tensors, file)
    ran = run("onnx", "--onnx-base", exported, "--adapter", tmp_path / "wide", "--output", tmp_path / "out")
    assert ran.code == 3 and "layers.0" in ran.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["weight", "place"])
def test_the_proof_finds_a_wrong_fold(
    llama: tuple[Path, Path, Path], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector on the wrong weight, and one that is written wrongly: exit 1, with the files aside."""
    from ia3_export.onnx import refold as module

    _, adapter, exported = llama
    base = tmp_path / "base"
    shutil.copytree(exported, base)
    if what == "place":  # names of two weights of one shape are exchanged in the manifest
        key, value = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv")

        provenance = json.loads((base / "ia3_export.json").read_text())["provenance"]
        rows = provenance["model"]
        rows[key], rows[value] = rows[value], rows[key]
        edit_json(base / "ia3_export.json", provenance=provenance)
        ran = run("onnx", "--onnx-base", base, "--adapter", adapter, "--output", tmp_path / "out")
        assert ran.code == 0  # nothing in the folder contradicts its manifest: the base does
        ran = run("verify", "--base", llama[0], "--adapter", adapter, "--onnx", tmp_path / "out")
        assert ran.code == 1
        return
    folded = module._folded

    def wrong(span: Any, scales: Any, rounded: str) -> Any:
        return folded(
            span,
            scales if "layers.1" not in span.name else (Scale(scales[0].factors + 0.1, scales[0].inner),),
            rounded,
        )

    monkeypatch.setattr(module, "_folded", wrong)
    ran = run("onnx", "--onnx-base", base, "--adapter", adapter, "--output", tmp_path / "out")
    assert ran.code == 1 and "layers.1" in ran.stderr
    assert (tmp_path / "out.failed" / "report.json").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["gguf-q4_k_m", "ct-w4a16-g32-sym", "bnb-int8"])
def test_the_codes_of_a_quantized_base_stay_and_verify_agrees(case: str, tmp_path: Path) -> None:
    base, adapter = source_of(case), adapter_for(case, tmp_path / "adapter")
    plain = ("--output", tmp_path / "exported", "--precision", "fp32,keep", "--no-verify")
    assert run("onnx", "--model", base, *plain).code == 0
    document = refold(tmp_path / "exported", adapter, tmp_path / "out")
    assert [step["precision"] for step in document["report"]["steps"]] == ["float32", "keep"]
    refold(tmp_path / "exported", adapter, tmp_path / "again", "--base", base)
    before, after = (
        read_graph_file(tmp_path / folder / "onnx" / "model_keep.onnx") for folder in ("exported", "out")
    )
    assert before.coded
    for codes in before.coded.values():
        np.testing.assert_array_equal(values_of(before, codes), values_of(after, codes))
    ran = run("verify", "--base", base, "--adapter", adapter, "--onnx", tmp_path / "out")
    assert ran.code == 0, ran.stdout + ran.stderr
