"""``bench``: all variants measured in both runtimes, the document agrees with itself, no process stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ia3_export.benching.jobs import Job, Sources
from ia3_export.benching.processes import start_worker
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.onnx.tasks import TASKS
from tests.e2e.command import Ran, only_complaint, run
from tests.e2e.test_startup import HEAVY, modules_after
from tests.support import zoo

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

QUICK = ("--threads", "1", "--rounds", "5", "--length", "6", "--tokens", "3")
PYTORCH = [("PyTorch", variant, "fp32") for variant in ("base", "unmerged", "merged")]
ONNX = [("ONNX Runtime", variant, "fp32") for variant in ("base", "unmerged", "merged")]


def _make(folder: Path, name: str) -> tuple[str, Path, str, Path]:
    kind = zoo.by_name(name)
    layers = "num_layers" if "num_layers" in kind.config else "num_hidden_layers"
    kind = replace(kind, config={**kind.config, layers: 1})  # it is traced three times
    model = zoo.build(kind)
    model.save_pretrained(folder / "base")
    zoo.adapt(model, kind).save_pretrained(folder / "adapter")
    return "--base", folder / "base", "--adapter", folder / "adapter"


def _workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("benching" in word for word in child.cmdline())]


def _measure(folder: Path, name: str, *more: str) -> tuple[Ran, dict[str, Any]]:
    ran = run("bench", *_make(folder, name), *QUICK, *more, "--json")
    assert ran.code == 0, ran
    assert not _workers()
    assert str(folder) not in ran.stdout + ran.stderr
    return ran, json.loads(ran.stdout)


def _check_rows(ran: Ran, document: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    """The table has every row, and numbers that follow from others do so."""
    rows = document["rows"]
    assert [(row["runtime"], row["variant"], row["precision"]) for row in rows] == expected
    for runtime, variant, precision in expected:
        label = variant if precision == "fp32" else f"{variant} {precision}"
        lines = [line.split("  ") for line in ran.stderr.splitlines() if line.startswith(f" {runtime}")]
        cells = [[cell.strip() for cell in line if cell.strip()][:2] for line in lines]
        assert cells.count([runtime, label]) == 2, ran.stderr  # times and sizes
    for row in rows:
        base = next(r for r in rows if r["runtime"] == row["runtime"])
        for measure in ("forward", "token"):
            if row[measure] is None:
                continue
            timing = row[measure]
            assert len(timing["rounds"]) == document["rounds"]
            assert timing["median"] == np.median(timing["rounds"])
            low, high = np.percentile(timing["rounds"], (25, 75))
            assert timing["iqr"] == pytest.approx(high - low)
            assert timing["ratio"] == timing["median"] / base[measure]["median"]
            assert timing["samples"] >= document["rounds"] and timing["p95"] > 0
        assert 0 < row["imported"] <= row["peak"] and row["files"] > 0
    operators = {
        row["variant"]: row["operators"] for row in rows if row["operators"] and row["precision"] == "fp32"
    }
    assert operators["merged"] == operators["base"] < operators["unmerged"]
    assert all(row["operators"] is None for row in rows if row["runtime"] == "PyTorch")
    for variant in ("unmerged", "merged"):
        compared = [line for line in document["findings"] if f"{variant} / base" in line]
        assert len(compared) == 2 * sum(rows[0][measure] is not None for measure in ("forward", "token"))
        row = next(r for r in rows if r["runtime"] == "PyTorch" and r["variant"] == variant)
        assert f"{variant} / base {row['forward']['ratio']:.2f}x" in compared[0]


def test_a_decoder_is_measured_in_every_variant_and_precision(tmp_path: Path) -> None:
    ran, document = _measure(tmp_path, "gpt2", "--precision", "int8", "--batch", "2")
    _check_rows(ran, document, [*PYTORCH, *ONNX, ("ONNX Runtime", "merged", "int8")])
    assert document["schema"] == "ia3-export/bench/1"
    assert document["task"] == "text-generation"
    assert document["inputs"] == {"input_ids": [2, 6], "attention_mask": [2, 6]}
    assert document["threads"] == 1 and document["tokens"] == 3
    assert set(document["machine"]) == {
        "system",
        "cpu",
        "physical_cores",
        "logical_cores",
        "memory",
        "versions",
    }
    assert {"torch", "onnxruntime", "peft"} <= set(document["machine"]["versions"])
    for row in document["rows"]:
        assert row["tokens_per_second"] == pytest.approx(2 * 1000 / row["token"]["median"])
        assert row["token"]["samples"] == 5 * 3
    whole, small = (
        next(r for r in document["rows"] if r["precision"] == p and r["operators"]) for p in ("fp32", "int8")
    )
    assert small["files"] < whole["files"]
    bars = [line for line in ran.stderr.splitlines() if "x |#" in line]
    assert len(bars) == 2 * len(document["rows"])
    # a process of ONNX Runtime holds no PyTorch
    torch, onnx = (
        max(r["imported"] for r in document["rows"] if r["runtime"] == n) for n in ("PyTorch", "ONNX Runtime")
    )
    assert onnx < torch / 2


def test_an_encoder_has_forwards_and_no_tokens(tmp_path: Path) -> None:
    ran, document = _measure(tmp_path, "bert-seq-cls", "--forms", "swappable,task-table")
    forms = [("ONNX Runtime", form, "fp32") for form in ("swappable", "task-table")]
    _check_rows(ran, document, [*PYTORCH, *ONNX, *forms])
    counts = {row["variant"]: row["operators"] for row in document["rows"] if row["operators"]}
    assert counts["merged"] < counts["swappable"] < counts["task-table"]
    for form in ("swappable", "task-table"):
        assert any(line.startswith(f"one forward, {form} / merged ") for line in document["findings"])
    assert document["task"] == "text-classification"
    assert document["inputs"] == {name: [1, 6] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert all(row["token"] is None and row["tokens_per_second"] is None for row in document["rows"])
    assert "tokens/s" not in ran.stderr and "one token" not in ran.stderr


def test_wrong_usage_is_exit_2_before_anything_is_done(tmp_path: Path) -> None:
    models = _make(tmp_path, "llama")
    only_complaint(run("bench", *models, "--precision", "fp8", "-q"), 2, "fp8")
    only_complaint(run("bench", *models[:2]), 2, "--adapter")
    only_complaint(run("bench", *models, "--rounds", "4"), 2, "--rounds")
    only_complaint(run("bench", *models, "--forms", "folded", "-q"), 2, "--forms folded")
    second = ("--adapter", tmp_path / "none", "--forms", "swappable", "-q")
    only_complaint(run("bench", *models, *second), 3, "none")
    only_complaint(run("bench", *models, "--length", "60", "-q"), 2, "92 positions", "64")
    only_complaint(run("bench", *models, "--task", "fill-mask", "-q"), 3, "AutoModelForMaskedLM")


def test_help_imports_nothing_heavy() -> None:
    assert modules_after("bench", "--help").isdisjoint((*HEAVY, "numpy", "psutil"))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_both_runtimes_time_the_same_computation(tmp_path: Path, name: str) -> None:
    """Prefill and steps with the cache, as the workers run them, give the same logits."""
    import torch

    from ia3_export import export_onnx
    from ia3_export.benching.onnx_side import load_onnx
    from ia3_export.benching.torch_side import load_torch

    base = _make(tmp_path, name)[1]
    exported = export_onnx(tmp_path / "out", model=base, check=False)
    graphs = tuple(str(tmp_path / "out" / file.path) for file in exported.files)
    ids = np.arange(3, 13).reshape(2, 5)
    np.savez(tmp_path / "inputs.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    sources, inputs = Sources("", (), str(base)), str(tmp_path / "inputs.npz")
    job = Job(
        runtime="PyTorch",
        variant="merged",
        precision="fp32",
        sources=sources,
        graphs=graphs,
        task=TASKS[exported.task],
        inputs=inputs,
        start=0,
        threads=1,
        tokens=5,
    )
    ours, theirs = load_torch(job), load_onnx(job)
    assert ours.step is not None and theirs.step is not None
    with torch.no_grad():
        state, other = ours.forward(), theirs.forward()
        for _ in range(6):
            np.testing.assert_allclose(other.outputs["logits"].numpy(), state[0].numpy(), atol=1e-4)
            state, other = ours.step(state), theirs.step(other)
    assert state[1].get_seq_length() == (ids.shape[1] if name == "gpt2" else 1) + 6


# A graph whose forward takes minutes.
ENDLESS = """
<ir_version: 10, opset_import: ["" : 20]>
endless (float[1] input_ids) => (float[1] y) {
    trips = Constant <value_int = 100000000000> ()
    y = Loop (trips, , input_ids) <body = body (int64 i, bool go, float[1] a) => (bool on, float[1] b) {
        on = Identity (go)
        b = Add (a, a)
    }>
}
"""

PLACES = """
<ir_version: 10, opset_import: ["" : 20]>
places (int64[1] input_ids) => (float[n] y) {
    size = Constant <value = int64[1] {64}> ()
    table = ConstantOfShape <value = float[1] {1.0}> (size)
    y = Gather (table, input_ids)
}
"""


@pytest.fixture
def endless(tmp_path: Path) -> Job:
    import onnx

    onnx.save(onnx.parser.parse_model(ENDLESS), tmp_path / "endless.onnx")
    np.savez(tmp_path / "inputs.npz", input_ids=np.zeros(1, np.float32))
    return Job(
        runtime="ONNX Runtime",
        variant="base",
        precision="fp32",
        sources=Sources("", (), ""),
        graphs=(str(tmp_path / "endless.onnx"),),
        task=TASKS["fill-mask"],
        inputs=str(tmp_path / "inputs.npz"),
        start=-1,
        threads=1,
        tokens=0,
    )


LOADED = """
import json, sys
from ia3_export.benching.worker import _import, read_job
job = read_job(sys.argv[1])
_import(job)(job)
print(json.dumps(sorted(sys.modules)))
"""


def test_the_process_of_a_graph_imports_neither_torch_nor_transformers(endless: Job) -> None:
    command = [sys.executable, "-c", LOADED, json.dumps(asdict(endless))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "onnxruntime" in modules
    assert modules.isdisjoint({"torch", "transformers", "peft", "optimum"})


def test_a_graph_that_does_not_load_is_named_by_its_worker(tmp_path: Path, endless: Job) -> None:
    broken = tmp_path / "model_int8.onnx"
    broken.write_bytes(b"not a graph")
    with start_worker(replace(endless, graphs=(str(broken),), precision="int8"), tmp_path / "log") as worker:
        assert worker.answer()["resident"] > 0
        with pytest.raises(
            DamagedFile, match=r"^ONNX Runtime base int8: ONNX Runtime cannot load model_int8.onnx"
        ) as caught:
            worker.ask("load")
    assert str(tmp_path) not in str(caught.value) and "--precision" in caught.value.hint


def test_what_a_forward_fails_with_is_an_error_of_ours(tmp_path: Path, endless: Job) -> None:
    """RoBERTa counts positions from 2 up, so that a text of 64 tokens has no place in 64 of them."""
    import onnx

    onnx.save(onnx.parser.parse_model(PLACES), tmp_path / "places.onnx")
    np.savez(tmp_path / "inputs.npz", input_ids=np.array([64]))
    with start_worker(replace(endless, graphs=(str(tmp_path / "places.onnx"),)), tmp_path / "log") as worker:
        worker.answer()
        worker.ask("load")
        with pytest.raises(Unsupported, match=r"ONNX Runtime base.*out of data bounds"):
            worker.ask("round")
    assert not _workers()


def test_a_worker_that_is_killed_is_reported(tmp_path: Path, endless: Job) -> None:
    with start_worker(endless, tmp_path / "log") as worker:
        worker.answer()
        worker.ask("load")
        worker.tell("round")
        worker.process.kill()
        with pytest.raises(
            Unsupported, match=r"ONNX Runtime base: its process ended with signal 9"
        ) as caught:
            worker.answer()
    assert "memory" in caught.value.hint


def test_a_worker_ends_with_its_context_in_the_middle_of_a_forward(tmp_path: Path, endless: Job) -> None:
    with pytest.raises(KeyboardInterrupt), start_worker(endless, tmp_path / "log") as worker:
        worker.answer()
        worker.ask("load")
        worker.tell("round")
        raise KeyboardInterrupt
    assert worker.process.returncode == -signal.SIGKILL
    assert not _workers()


PARENT = """
import json, sys, time
from pathlib import Path
from ia3_export.benching.processes import start_worker
from ia3_export.benching.worker import read_job
with start_worker(read_job(sys.argv[1]), Path(sys.argv[2])) as worker:
    worker.answer()
    worker.ask("load")
    worker.tell("round")
    print(worker.process.pid, flush=True)
    time.sleep(60)
"""


def test_a_worker_ends_with_a_parent_that_was_killed(tmp_path: Path, endless: Job) -> None:
    command = [sys.executable, "-c", PARENT, json.dumps(asdict(endless)), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        _wait(lambda: worker.cpu_times().user > 1)  # inside the forward
        parent.kill()
    _wait(lambda: _is_gone(worker))


def _is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)
