"""``verify`` through the CLI.

Right artifacts pass in every dtype and runtime, inputs and options do what they say.

Damaged artifacts are in test_mutations.py.
"""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.e2e.command import Ran, contents, only_complaint, run
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "bert-seq-cls": "float32",
    "llama-biased": "bfloat16",
    "gpt2": "float16",
    "t5": "float32",
    "whisper": "float32",
    "resnet-basic": "float32",
    "llava": "float32",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with ``base``, ``adapter`` and ``merged`` for each kind."""
    folders = {}
    for name, dtype in KINDS.items():
        kind = zoo.by_name(name)
        folder = tmp_path_factory.mktemp(name)
        model = zoo.build(kind, dtype=dtype)
        model.save_pretrained(folder / "base")
        zoo.adapt(model, kind).save_pretrained(folder / "adapter")
        ran = run("merge", *inputs(folder), "--output", folder / "merged")
        assert ran.code == 0, ran
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def exported(made: dict[str, Path]) -> Path:
    """The ONNX export of bert-seq-cls in float32, float16, int8 and int4, written by ONNX Runtime's tools."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    folder = made["bert-seq-cls"]
    assert run("onnx", "--model", folder / "merged", "--output", folder / "onnx").code == 0
    files = folder / "onnx" / "onnx"
    graph = onnx.load(files / "model.onnx")
    onnx.save(convert_float_to_float16(graph, keep_io_types=True), files / "model_fp16.onnx")
    quantize_dynamic(
        files / "model.onnx", files / "model_int8.onnx", per_channel=True, weight_type=QuantType.QInt8
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(files / "model.onnx"), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(files / "model_q4.onnx"))
    return files


def inputs(folder: Path) -> list[str | Path]:
    return ["--base", folder / "base", "--adapter", folder / "adapter"]


def report_of(ran: Ran) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


@pytest.mark.parametrize("name", KINDS)
def test_a_right_merge_is_in_parity(made: dict[str, Path], name: str) -> None:
    ran = run("verify", *inputs(made[name]), "--merged", made[name] / "merged", "--json")
    assert ran.code == 0, ran
    report = report_of(ran)
    assert report["verdict"] == "in parity"
    (proof,) = report["weights"]
    assert proof["passed"] and proof["changed"] > 0 and proof["unchanged"] > 0
    (step,) = report["steps"]
    assert step["passed"] and 0.99 < step["effect_present"] < 1.01
    assert step["distance"]["max_error"] < report["reference"]["effect"]
    assert len(step["layers"]) > 5 and step["location"] is None
    assert sum(count for _, count in step["error_histogram"]) > 0
    assert (step["generation"] is not None) == (name in ("llama-biased", "gpt2", "t5", "whisper", "llava"))
    texts = " ".join(report["reference"]["inputs"])
    if name in ("llama-biased", "gpt2"):
        assert all(words in texts for words in ("on the right", "on the left", "past tokens"))
        assert step["distance"]["perplexity_change"] is not None


def test_the_report_names_no_path_of_the_machine(made: dict[str, Path]) -> None:
    ran = run("verify", *inputs(made["t5"]), "--merged", made["t5"] / "merged", "--json")
    assert str(made["t5"].parent) not in ran.stdout


def test_the_chain_shows_every_precision(made: dict[str, Path], exported: Path) -> None:
    folder = made["bert-seq-cls"]
    ran = run("verify", *inputs(folder), "--merged", folder / "merged", "--onnx", exported, "--json")
    steps = {step["name"]: step for step in report_of(ran)["steps"]}
    assert list(steps) == ["merged", "onnx float32", "onnx float16", "onnx int8", "onnx int4"]
    assert all(steps[name]["passed"] for name in ("merged", "onnx float32", "onnx float16", "onnx int8"))
    errors = [step["distance"]["max_error"] for step in steps.values()]
    assert errors[1] < errors[2] < errors[3] < errors[4], "each precision costs more"
    assert all(step["loss"] is not None for step in steps.values())
    assert {gate["name"] for gate in steps["onnx int8"]["gates"]} >= {"KL divergence", "top-1 agreement"}
    proofs = {proof["name"]: proof for proof in report_of(ran)["weights"]}
    assert (
        proofs["onnx float32"]["changed"] == proofs["onnx float16"]["changed"] == proofs["merged"]["changed"]
    )


def test_a_float32_graph_of_16_bit_weights_is_held_to_float32(tmp_path: Path) -> None:
    kind = zoo.by_name("bert-seq-cls")
    model = zoo.build(kind, dtype="bfloat16")
    model.save_pretrained(tmp_path / "base")
    zoo.adapt(model, kind).save_pretrained(tmp_path / "adapter")
    assert run("onnx", *inputs(tmp_path), "--output", tmp_path / "onnx").code == 0
    ran = run("verify", *inputs(tmp_path), "--onnx", tmp_path / "onnx", "--json")
    assert ran.code == 0, ran
    (step,) = report_of(ran)["steps"]
    limits = {gate["name"]: gate["limit"] for gate in step["gates"]}
    assert limits["max error to the merged weights"] < 1e-3 * limits["max error"]


def test_weights_only_needs_no_torch_and_proves_graph_and_folder(
    made: dict[str, Path], exported: Path
) -> None:
    folder = made["bert-seq-cls"]
    ran = run(
        "verify",
        *inputs(folder),
        "--merged",
        folder / "merged",
        "--onnx",
        exported / "model.onnx",
        "--onnx",
        exported / "model_fp16.onnx",
        "--weights-only",
        "--json",
    )
    assert ran.code == 0, ran
    report = report_of(ran)
    assert [proof["passed"] for proof in report["weights"]] == [True, True, True]
    assert report["reference"] is None and report["steps"] == []
    only_complaint(run("verify", *inputs(folder), "--weights-only"), 2, "--weights-only")


def test_the_operators_are_compared_with_the_bases_export(
    made: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    import onnx

    folder = made["bert-seq-cls"]
    assert run("onnx", "--model", folder / "base", "--output", folder / "base-onnx").code == 0
    both = [
        "--onnx",
        exported / "model.onnx",
        "--base-onnx",
        folder / "base-onnx",
        "--weights-only",
        "--json",
    ]
    ran = run("verify", *inputs(folder), *both)
    assert ran.code == 0, ran
    assert "differ from the base's" in report_of(ran)["weights"][0]["notes"][0]
    graph = onnx.load(exported / "model.onnx")
    name = graph.graph.output[0].name
    graph.graph.node[-1].output[0] = "before"
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    graph.graph.initializer.append(one)
    graph.graph.node.append(onnx.helper.make_node("Mul", ["before", "one"], [name]))
    onnx.save(graph, tmp_path / "model.onnx")
    both[1] = tmp_path / "model.onnx"
    ran = run("verify", *inputs(folder), *both)
    assert ran.code == 1
    assert {f["what"] for f in report_of(ran)["weights"][0]["findings"]} == {"other operators"}


def test_weights_only_does_not_pass_what_bits_cannot_prove(
    made: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    folder = made["bert-seq-cls"]
    (tmp_path / "empty.onnx").write_bytes(b"")
    for file in (exported / "model_int8.onnx", tmp_path / "empty.onnx"):
        ran = run("verify", *inputs(folder), "--onnx", file, "--weights-only", "--json")
        assert ran.code == 1, ran
        assert {f["what"] for f in report_of(ran)["weights"][0]["findings"]} == {"not found"}


def test_dead_tensors_do_not_choose_the_gate(made: dict[str, Path], exported: Path, tmp_path: Path) -> None:
    import onnx

    graph = onnx.load(exported / "model.onnx")
    graph.graph.initializer.append(onnx.helper.make_tensor("codes", onnx.TensorProto.INT8, [9], [1] * 9))
    scale = onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [1.0])
    graph.graph.initializer.append(scale)
    graph.graph.node.append(onnx.helper.make_node("DequantizeLinear", ["codes", "scale"], ["nowhere"]))
    half = np.zeros(10**6, "<f2")
    graph.graph.initializer.append(onnx.numpy_helper.from_array(half, "padding"))
    onnx.save(graph, tmp_path / "model.onnx")
    ran = run("verify", *inputs(made["bert-seq-cls"]), "--onnx", tmp_path / "model.onnx", "--json")
    assert report_of(ran)["steps"][0]["precision"] == "float32"


def test_external_data_that_is_missing_or_short_is_named(
    made: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    import onnx

    graph = onnx.load(exported / "model.onnx")
    onnx.save_model(
        graph,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    data = tmp_path / "model.onnx_data"
    given = [*inputs(made["bert-seq-cls"]), "--onnx", tmp_path / "model.onnx", "--weights-only"]
    assert run("verify", *given).code == 0
    data.write_bytes(data.read_bytes()[:-100])
    only_complaint(run("verify", *given), 3, "too short")
    data.unlink()
    only_complaint(run("verify", *given), 3, "missing")


def test_a_classifiers_logits_are_not_masked_like_tokens(tmp_path: Path) -> None:
    """Five labels and texts of five tokens: a padded token must not hide a label."""
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    kind = zoo.by_name("bert-seq-cls")
    kind = replace(kind, config={**kind.config, "num_labels": 5})
    model = zoo.build(kind)
    model.save_pretrained(tmp_path / "base")
    zoo.adapt(model, kind).save_pretrained(tmp_path / "adapter")
    assert run("merge", *inputs(tmp_path), "--output", tmp_path / "merged").code == 0
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"][4] += 1000
    save_torch(tensors, file, metadata={"format": "pt"})
    line = {"input_ids": [[5, 6, 7, 8, 9]], "attention_mask": [[1, 1, 1, 1, 0]]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    ran = run(
        "verify",
        *inputs(tmp_path),
        "--merged",
        tmp_path / "merged",
        "--inputs",
        tmp_path / "in.jsonl",
        "--json",
    )
    assert report_of(ran)["steps"][0]["distance"]["max_error"] > 900


def test_a_manifest_cannot_excuse_the_base(made: dict[str, Path], tmp_path: Path) -> None:
    folder = made["t5"]
    options = ["--combine", "delta", "--weights", "0"]
    assert run("merge", *inputs(folder), "--output", tmp_path / "merged", *options).code == 0
    given = [*inputs(folder), "--merged", tmp_path / "merged", "--weights-only"]
    only_complaint(run("verify", *given), 3, "manifest", "delta")
    assert run("verify", *given, *options).code == 0, "who says so gets it"


def test_an_adapter_left_in_the_merged_folder_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["t5"] / "merged", tmp_path / "merged")
    shutil.copy(made["t5"] / "adapter" / "adapter_config.json", tmp_path / "merged")
    ran = run("verify", *inputs(made["t5"]), "--merged", tmp_path / "merged", "--weights-only")
    assert ran.code == 1 and "adapter_config.json" in ran.stdout


def test_a_report_keeps_links_and_devices(made: dict[str, Path], tmp_path: Path) -> None:
    folder = made["t5"]
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    os.mkfifo(tmp_path / "pipe")
    given = [*inputs(folder), "--merged", folder / "merged", "--weights-only", "-q"]
    assert run("verify", *given, "--report", tmp_path / "link.json").code == 0
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").is_file()
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        assert run("verify", *given, "--markdown", tmp_path / "pipe").code == 0
        assert "in parity" in read.result(timeout=30)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("suffix", ["jsonl", "npz", "safetensors"])
def test_own_inputs_are_used(made: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"inputs.{suffix}"
    ids, more = np.array([[5, 9, 2, 7]]), np.array([[4, 4, 8], [6, 1, 3]])
    if suffix == "jsonl":
        lines = [
            {"input_ids": ids.tolist()},
            {"input_ids": more.tolist(), "attention_mask": [[1, 1, 1], [1, 1, 0]]},
        ]
        file.write_text("\n".join(map(json.dumps, lines)))
    elif suffix == "npz":
        np.savez(file, **{"0.input_ids": ids, "1.input_ids": more})
    else:
        save_file({"0.input_ids": ids, "1.input_ids": more}, file)
    folder = made["llama-biased"]
    ran = run("verify", *inputs(folder), "--merged", folder / "merged", "--inputs", file, "--json")
    assert ran.code == 0, ran
    used = report_of(ran)["reference"]["inputs"]
    assert len(used) == 2 and "input_ids [1, 4]" in used[0] and "input_ids [2, 3]" in used[1]


@pytest.mark.parametrize(
    ("name", "content", "mention"),
    [
        ("x.jsonl", b'{"input_ids": [[1, 2], [3]]}', "x.jsonl"),
        ("x.jsonl", b"[1, 2]", "line 1"),
        ("x.jsonl", b"", "no inputs"),
        ("x.jsonl", b'{"input_ids": [["a"]]}', "no rectangular array"),
        ("x.npz", b"PK", "x.npz"),
        ("x.safetensors", b"12345678", "x.safetensors"),
    ],
)
def test_damaged_inputs_are_refused(
    made: dict[str, Path], tmp_path: Path, name: str, content: bytes, mention: str
) -> None:
    (tmp_path / name).write_bytes(content)
    only_complaint(run("verify", *inputs(made["t5"]), "--inputs", tmp_path / name), 3, mention)


def test_a_pickle_in_an_npz_is_not_loaded(made: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input_ids=np.array([{"a": 1}], dtype=object))
    only_complaint(run("verify", *inputs(made["t5"]), "--inputs", tmp_path / "x.npz"), 3, "x.npz")


def test_texts_go_through_the_bases_tokenizer(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("tiny tiny\n\ntiny tiny tiny tiny\n")
    arguments = ["--base", tiny.base, "--adapter", tiny.adapter, "--merged", tiny.merged]
    ran = run("verify", *arguments, "--text", tmp_path / "texts.txt", "--json")
    assert ran.code == 0, ran
    assert report_of(ran)["reference"]["inputs"] == ["lines 1 to 2, length 1"]
    only_complaint(run("verify", *arguments, "--text", tmp_path / "none.txt"), 3, "none.txt")
    both = ["--text", tmp_path / "texts.txt", "--inputs", tmp_path / "x.npz"]
    only_complaint(run("verify", *arguments, *both), 2, "exclude")


def test_texts_without_a_tokenizer_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("words\n")
    only_complaint(run("verify", *inputs(made["t5"]), "--text", tmp_path / "texts.txt"), 3, "tokenizer")


def test_tolerances_replace_the_gates(made: dict[str, Path]) -> None:
    folder = made["t5"]
    merged = ["--merged", folder / "merged"]
    exact = run("verify", *inputs(folder), *merged, "--atol", "0", "--json")
    assert exact.code == 1
    assert [g["name"] for g in report_of(exact)["steps"][0]["gates"]] == ["max error beyond rtol"]
    loose = run("verify", *inputs(folder), "--merged", folder / "base", "--atol", "1e3", "--json")
    assert loose.code == 0
    assert any("bit for bit" in warning for warning in report_of(loose)["warnings"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_working_dtype_can_be_chosen(made: dict[str, Path], dtype: str) -> None:
    folder = made["llama-biased"]
    ran = run("verify", *inputs(folder), "--merged", folder / "merged", "--dtype", dtype, "--json")
    assert ran.code == 0, ran
    report = report_of(ran)
    assert report["reference"]["dtype"] == report["steps"][0]["precision"] == dtype


def test_a_model_larger_than_memory_runs_layer_by_layer(made: dict[str, Path]) -> None:
    folder = made["llama-biased"]
    for size, words in (("200KB", "float64 does not fit"), ("100KB", "layer by layer")):
        ran = run("verify", *inputs(folder), "--merged", folder / "merged", "--max-memory", size, "--json")
        assert ran.code == 0, ran
        report = report_of(ran)
        assert report["reference"]["precision"] == "float32"
        assert words in " ".join(report["warnings"])
    assert report["reference"]["applied_by"] == "hooks"


def test_a_reference_no_wider_than_the_model_is_judged_with_rounding_noise(made: dict[str, Path]) -> None:
    folder = made["t5"]
    merged = ["--merged", folder / "merged", "--json"]
    wide = report_of(run("verify", *inputs(folder), *merged))["reference"]
    for size in ("400KB", "150KB"):
        ran = run("verify", *inputs(folder), *merged, "--max-memory", size)
        assert ran.code == 0, ran
        narrow = report_of(ran)["reference"]
        assert narrow["precision"] == narrow["dtype"] == "float32"
        assert 0.1 < narrow["unmerged"]["max_error"] / wide["unmerged"]["max_error"] < 10
    damaged = ["--merged", folder / "base", "--json", "--max-memory", "150KB"]
    step = report_of(run("verify", *inputs(folder), *damaged))["steps"][0]
    assert not step["passed"] and step["location"] is not None


@pytest.mark.parametrize(
    "combine",
    [[], ["--combine", "linear", "--weights", "0.3,0.6"], ["--combine", "delta", "--weights", "0.5,1.5"]],
    ids=["product", "linear", "delta"],
)
def test_several_adapters_are_verified_as_they_were_combined(
    made: dict[str, Path], tmp_path: Path, combine: list[str]
) -> None:
    folder = made["llama-biased"]
    kind = zoo.by_name("llama-biased")
    zoo.adapt(zoo.build(kind, dtype="bfloat16"), kind, seed=9).save_pretrained(tmp_path / "second")
    both = [*inputs(folder), "--adapter", tmp_path / "second"]
    assert run("merge", *both, "--output", tmp_path / "merged", *combine).code == 0
    assert run("verify", *both, "--merged", tmp_path / "merged").code == 0
    (tmp_path / "merged" / "ia3_export.json").unlink()
    assert run("verify", *both, "--merged", tmp_path / "merged", *combine).code == 0
    other = ["--combine", "delta", "--weights", "1,2"]
    assert run("verify", *both, "--merged", tmp_path / "merged", *other).code == 1


@pytest.mark.parametrize(
    "options", [["--dtype", "float32"], ["--dtype", "float16"], ["--cast", "peft-low-mem"]]
)
def test_the_manifest_says_how_it_was_merged(
    made: dict[str, Path], tmp_path: Path, options: list[str]
) -> None:
    folder = made["llama-biased"]
    assert run("merge", *inputs(folder), "--output", tmp_path / "merged", *options).code == 0
    ran = run("verify", *inputs(folder), "--merged", tmp_path / "merged")
    assert ran.code == 0, ran
    (tmp_path / "merged" / "ia3_export.json").write_text('{"options": {"combine": "evil", "weights": 3}}')
    assert run("verify", *inputs(folder), "--merged", tmp_path / "merged").code == ("--cast" in options)


def test_what_peft_merged_and_saved_is_proven_too(made: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    folder = made["llama-biased"]
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    ran = run("verify", *inputs(folder), "--merged", tmp_path / "merged")
    assert ran.code == 0, ran


def test_without_artifacts_a_temporary_merge_is_verified(made: dict[str, Path]) -> None:
    ran = run("verify", *inputs(made["bert-seq-cls"]))
    assert ran.code == 0, ran
    assert "merged" in ran.stdout and "in parity" in ran.stdout


def test_every_report_is_written_and_inputs_are_left_alone(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made["t5"]
    before = contents(folder)
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    kinds = {"report": "json", "markdown": "md", "junit": "xml", "html": "html"}
    targets = [word for kind, end in kinds.items() for word in (f"--{kind}", tmp_path / "new" / f"r.{end}")]
    ran = run("verify", *inputs(folder), "--merged", folder / "merged", *targets)
    assert ran.code == 0, ran
    assert json.loads((tmp_path / "new" / "r.json").read_text())["verdict"] == "in parity"
    assert ET.parse(tmp_path / "new" / "r.xml").getroot().tag == "testsuites"
    assert "in parity" in (tmp_path / "new" / "r.md").read_text()
    assert (tmp_path / "new" / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.html", "r.json", "r.md", "r.xml"]
    text = summary.read_text()
    assert text.startswith("before\n") and text.count("in parity") >= 1
    assert contents(folder) == before


def test_reports_never_replace_an_input(made: dict[str, Path], tmp_path: Path) -> None:
    folder = made["t5"]
    merged = ["--merged", folder / "merged"]
    ran = run("verify", *inputs(folder), *merged, "--report", folder / "base" / "config.json")
    only_complaint(ran, 2, "config.json")
    only_complaint(run("verify", *inputs(folder), *merged, "--html", tmp_path), 4, "folder")
    same = ["--html", tmp_path / "x", "--junit", tmp_path / "x"]
    only_complaint(run("verify", *inputs(folder), *merged, *same), 2, "one file")
    (tmp_path / "file").write_text("")
    ran = run("verify", *inputs(folder), *merged, "--weights-only", "--report", tmp_path / "file" / "r.json")
    assert ran.code == 4 and "error:" in ran.stderr


def test_the_terminal_report_fits_80_columns(
    made: dict[str, Path], exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = made["bert-seq-cls"]
    ran = run("verify", *inputs(folder), "--merged", folder / "merged", "--onnx", exported)
    table = [
        line for line in ran.stdout.splitlines() if line.startswith((" unmerged", " onnx", " merged", " ─"))
    ]
    assert len(table) == 7, ran.stdout
    assert max(map(len, table)) <= 80


def test_a_missing_device_is_a_usage_error(made: dict[str, Path]) -> None:
    import torch

    only_complaint(run("verify", *inputs(made["t5"]), "--device", "tpu"), 2, "tpu")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    only_complaint(run("verify", *inputs(made["t5"]), "--device", "cuda"), 2, "no CUDA device")


def test_fused_experts_with_vectors_of_transformers_4_are_proven_by_weights(tmp_path: Path) -> None:
    fixture = Path(__file__).parent.parent / "fixtures" / "mixtral_v4"
    ran = run("verify", *inputs(fixture))
    only_complaint(ran, 3, "experts")
    assert "--weights-only" in ran.stderr
    assert run("merge", *inputs(fixture), "--output", tmp_path / "merged").code == 0
    assert run("verify", *inputs(fixture), "--merged", tmp_path / "merged", "--weights-only").code == 0


def test_a_folder_that_cannot_be_loaded_is_a_failed_step(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["t5"] / "merged", tmp_path / "merged")
    (tmp_path / "merged" / "config.json").write_text('{"model_type": "bert"}')
    ran = run("verify", *inputs(made["t5"]), "--merged", tmp_path / "merged", "--json")
    assert ran.code == 1, ran
    assert "config.json differs" in " ".join(report_of(ran)["weights"][0]["notes"])


@pytest.mark.gpu
def test_a_merge_is_in_parity_on_a_gpu(made: dict[str, Path], exported: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    for name in ("llama-biased", "bert-seq-cls", "resnet-basic"):
        folder = made[name]
        graphs = ["--onnx", exported / "model.onnx"] if name == "bert-seq-cls" else []
        ran = run(
            "verify", *inputs(folder), "--merged", folder / "merged", *graphs, "--device", "cuda", "--json"
        )
        assert ran.code == 0, ran
        assert report_of(ran)["reference"]["runs_on"].startswith("PyTorch on cuda (")
