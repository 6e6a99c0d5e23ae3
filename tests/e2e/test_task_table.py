"""One graph with a table of tasks: an input says which adapter each text of a batch takes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from ia3_export.onnx.swap import made_up
from tests.e2e.command import Ran, run
from tests.support import zoo
from tests.support.exported import KINDS
from tests.support.two_tasks import inputs, written

pytestmark = pytest.mark.filterwarnings("ignore")

JAVASCRIPT = Path(__file__).parent.parent / "runtimes" / "javascript"
#: GPT-2's Conv1D, a head of the adapter's own, an encoder-decoder, convolutions, tokens in one row.
FAMILIES = ("gpt2", "bert-seq-cls", "t5", "resnet", "opt")
FILES = ("model.onnx", "model_fp16.onnx", "model_int8.onnx", "model_quantized.onnx", "model_q4.onnx")


@dataclass(frozen=True)
class Tabled:
    """A base, two adapters, and their export with a table."""

    base: Path
    adapters: tuple[Path, Path]
    folder: Path
    ran: Ran

    @property
    def sources(self) -> tuple[str | Path, ...]:
        return ("--base", self.base, "--adapter", self.adapters[0], "--adapter", self.adapters[1])

    def source(self, which: int) -> tuple[str | Path, ...]:
        return ("--base", self.base, "--adapter", self.adapters[which])

    def graph(self, file: str) -> Path:
        return self.folder / "onnx" / file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tabled:
    folder = tmp_path_factory.mktemp("tabled")
    base, adapters = written("llama", folder)
    given = ("--base", base, "--adapter", adapters[0], "--adapter", adapters[1], "--task-table")
    ran = run("onnx", *given, "--output", folder / "out", "--precision", "fp32,fp16,int8,q8,int4", "--json")
    assert ran.code == 0, ran.stderr
    return Tabled(base, adapters, folder / "out", ran)


def logits(path: Path, tasks: Sequence[int] | None = None, texts: Sequence[int] = (0, 1)) -> Any:
    """The logits of those of the two `inputs`, each with its task."""
    session = onnxruntime.InferenceSession(path)
    feeds = {name: value[list(texts)] for name, value in inputs(path).items()}
    return session.run(["logits"], feeds | ({} if tasks is None else {"task": np.array(tasks)}))[0]


def test_every_row_is_proven_and_the_document_says_whose_it_is(llama: Tabled) -> None:
    document = json.loads(llama.ran.stdout)
    assert document["rows"] == {"one": 1, "two": 2}
    tasks = json.loads((llama.folder / "ia3_export.json").read_text())["tasks"]
    assert (tasks["input"], tasks["base"]) == ("task", 0)
    assert {name: row["row"] for name, row in tasks["adapters"].items()} == document["rows"]
    proofs = {proof["name"]: proof for proof in document["report"]["weights"]}
    for file in FILES:
        assert proofs[f"{file} without an adapter"]["passed"]
        assert proofs[f"{file} with mixed tasks"]["notes"] == [
            "in batches of 4 tasks every row has the bits of its own run"
        ]
    for name, report in document["adapters"].items():
        assert [step["name"] for step in report["steps"]][:2] == ["onnx float32", "onnx float16"]
        assert all(step["passed"] for step in report["steps"][:2])
        assert report["steps"][0]["distance"]["max_error"] < 1e-3 * report["reference"]["effect"]
        proofs = {proof["name"]: proof for proof in report["weights"]}
        for file in FILES:
            assert proofs[f"{name} in {file}"]["passed"]
        assert proofs[f"{name} in model.onnx"]["changed"] == {"one": 6, "two": 2}[name]


@pytest.mark.parametrize("file", FILES)
def test_a_text_among_others_gets_the_bits_that_it_gets_alone(llama: Tabled, file: str) -> None:
    graph = llama.graph(file)
    alone = {(text, task): logits(graph, [task], [text]) for text in (0, 1) for task in range(3)}
    effect = np.abs(alone[0, 1] - alone[0, 0]).max()
    for texts, tasks in (((0, 1, 0), (2, 1, 0)), ((1, 1, 1, 0), (0, 1, 2, 1))):
        found = logits(graph, tasks, texts)
        for place, key in enumerate(zip(texts, tasks, strict=True)):
            np.testing.assert_array_equal(found[place : place + 1], alone[key])
            other = alone[key[0], (key[1] + 1) % 3]
            assert np.abs(found[place] - other[0]).max() > 0.1 * effect


def test_the_cache_of_a_mixed_batch_goes_on_as_each_alone(llama: Tabled) -> None:
    session = onnxruntime.InferenceSession(llama.graph("model.onnx"))
    feeds, names = inputs(llama.graph("model.onnx")), [port.name for port in session.get_outputs()]

    def decoded(texts: Sequence[int], tasks: Sequence[int]) -> Any:
        given = {name: value[list(texts)] for name, value in feeds.items()} | {"task": np.array(tasks)}
        for length in range(6, 9):
            out = dict(zip(names, session.run(None, given), strict=True))
            given |= {n.replace("present", "past_key_values"): v for n, v in out.items() if n != "logits"}
            given["input_ids"] = out["logits"][:, -1:].argmax(-1)
            given["position_ids"] = np.full((len(texts), 1), length)
            given["attention_mask"] = np.ones((len(texts), length + 1), "<i8")
        return out["logits"]

    together = decoded((0, 1, 0), (1, 2, 0))
    for place, (text, task) in enumerate(((0, 1), (1, 2), (0, 0))):
        np.testing.assert_array_equal(together[place : place + 1], decoded([text], [task]))


@pytest.mark.versions
def test_row_0_is_the_base_and_the_others_are_the_folded_graphs(llama: Tabled, tmp_path: Path) -> None:
    sources = [("--model", llama.base), llama.source(0), llama.source(1)]
    for row, source in enumerate(sources):
        plain = ("onnx", *source, "--output", tmp_path / f"{row}", "--no-verify", "--precision", "fp32,int8")
        assert run(*plain).code == 0
        expected = logits(tmp_path / f"{row}" / "onnx" / "model.onnx")
        found = logits(llama.graph("model.onnx"), [row, row])
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        if row == 0:
            np.testing.assert_array_equal(found, expected)
            expected = logits(tmp_path / "0" / "onnx" / "model_int8.onnx")
            np.testing.assert_array_equal(logits(llama.graph("model_int8.onnx"), [0, 0]), expected)


def test_a_task_that_is_not_there_is_an_error_and_negative_ones_count_from_the_end(llama: Tabled) -> None:
    graph = llama.graph("model.onnx")
    np.testing.assert_array_equal(logits(graph, [-1, -2]), logits(graph, [2, 1]))
    np.testing.assert_array_equal(logits(graph, [1]), logits(graph, [1, 1]))  # one for the whole batch
    for task in (3, -4):
        with pytest.raises(Exception, match="indices element out of data bounds"):
            logits(graph, [0, task])


def test_verify_finds_the_row_of_the_adapter_that_it_is_given(llama: Tabled) -> None:
    for which, name in enumerate(("one", "two")):
        ran = run("verify", *llama.source(which), "--onnx", llama.graph("model.onnx"))
        assert ran.code == 0, ran.stderr
        ran = run("verify", *llama.source(which), "--onnx", llama.folder, "--weights-only")
        assert f"weights of {name} in model.onnx: proven" in ran.stdout + ran.stderr
    ran = run("verify", *llama.sources, "--onnx", llama.folder)
    assert ran.code == 2
    assert "one adapter at a time" in ran.stderr


def test_an_adapter_without_a_row_is_named(llama: Tabled, tmp_path: Path) -> None:
    kind = KINDS["llama"]
    zoo.adapt(zoo.build(kind), kind, seed=9).save_pretrained(tmp_path / "nine")
    ran = run("verify", "--base", llama.base, "--adapter", tmp_path / "nine", "--onnx", llama.folder)
    assert ran.code == 3
    assert "no row of this adapter, but of one, two" in ran.stderr


def changed(llama: Tabled, folder: Path, change: Callable[[Any], None], file: str = "model.onnx") -> Path:
    """A copy of the exported folder with another graph; its path."""
    shutil.copytree(llama.folder, folder / "out")
    path = folder / "out" / "onnx" / file
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return path


def edit_tables(graph: Any, edit: Callable[[Any], None]) -> None:
    for tensor in graph.initializer:
        if ".task_table." in tensor.name:
            values = onnx.numpy_helper.to_array(tensor).copy()
            edit(values)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def exchange_rows(graph: Any) -> None:
    def edit(values: Any) -> None:
        values[[1, 2]] = values[[2, 1]]

    edit_tables(graph, edit)


def bend_one(graph: Any) -> None:
    def edit(values: Any) -> None:
        values[1, ..., 3] += 1e-6

    edit_tables(graph, edit)


def bend_row_0(graph: Any) -> None:
    def edit(values: Any) -> None:
        values[0] = 1.5

    edit_tables(graph, edit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange_rows, "does not hold it"),
        (bend_one, "does not hold it"),
        (bend_row_0, "a run of task 0 is no base"),
    ],
)
def test_other_values_in_the_tables_are_found_by_the_weights(
    llama: Tabled, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    path = changed(llama, tmp_path, change)
    ran = run("verify", *llama.source(0), "--onnx", path, "--weights-only")
    assert ran.code == 1
    assert message in ran.stdout + ran.stderr


def test_rows_of_another_adapter_are_not_in_parity(llama: Tabled, tmp_path: Path) -> None:
    path = changed(llama, tmp_path, exchange_rows)
    ran = run("verify", *llama.source(0), "--onnx", path, "--json")
    assert ran.code == 1
    (step,) = json.loads(ran.stdout)["steps"]
    assert not step["passed"]


def test_a_batch_that_takes_all_rows_from_its_first_text_is_found(llama: Tabled, tmp_path: Path) -> None:
    from ia3_export.commands.tabling import prove_mixed
    from ia3_export.parity.bits.graph_files import read_graphs

    def first_for_all(graph: Any) -> None:
        numbers = {"zero": [0], "one": [1]}
        for name, value in numbers.items():
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
        cut = onnx.helper.make_node("Slice", ["task", "zero", "one"], ["first_task"])
        for node in graph.node:
            node.input[:] = ["first_task" if name == "task" else name for name in node.input]
        graph.node.insert(0, cut)

    path = changed(llama, tmp_path, first_for_all)
    (proof,) = prove_mixed(read_graphs([path]))
    assert not proof.passed
    assert "from its own run" in proof.findings[0].detail
    (proof,) = prove_mixed(read_graphs([llama.graph("model.onnx")]))
    assert proof.passed


def no_rows(manifest: dict[str, Any]) -> None:
    manifest["tasks"]["adapters"] = []


def no_number(manifest: dict[str, Any]) -> None:
    manifest["tasks"]["adapters"]["one"]["row"] = "first"


def no_tasks(manifest: dict[str, Any]) -> None:
    del manifest["tasks"]


def beyond(manifest: dict[str, Any]) -> None:
    manifest["tasks"]["adapters"]["one"]["row"] = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_rows, "does not say"),
        (no_number, "does not say"),
        (no_tasks, "does not say"),
        (beyond, "is row 3, which"),
    ],
)
def test_a_manifest_of_another_s_making_is_refused(
    llama: Tabled, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    shutil.copytree(llama.folder, tmp_path / "out")
    path = tmp_path / "out" / "ia3_export.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    ran = run("verify", *llama.source(0), "--onnx", tmp_path / "out", "--weights-only")
    assert ran.code == 3
    assert message in ran.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_proven_and_mix(name: str, tmp_path: Path) -> None:
    base, adapters = written(name, tmp_path)
    given = ("--base", base, "--adapter", adapters[0], "--adapter", adapters[1], "--task-table")
    ran = run("onnx", *given, "--output", tmp_path / "out", "--json", "--precision", "fp32,fp16")
    assert ran.code == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["verdict"] == "in parity" and sorted(document["adapters"]) == ["one", "two"]
    mixed = [proof for proof in document["report"]["weights"] if "mixed" in proof["name"]]
    assert len(mixed) == (4 if name == "t5" else 2) and all(proof["passed"] for proof in mixed)
    for path in (tmp_path / "out" / "onnx").glob("*.onnx"):
        session = onnxruntime.InferenceSession(path)
        feeds = made_up(session, 3) | {"task": np.array([2, 0, 1])}
        rolled = {n: np.roll(v, 1, axis=0) if len(v) == 3 else v for n, v in feeds.items()}
        found, again = (session.run(None, values)[0] for values in (feeds, rolled))
        np.testing.assert_allclose(np.roll(found, 1, axis=0), again, rtol=0, atol=1e-5)


def test_heads_of_several_modules_and_norms_go_by_task(tmp_path: Path) -> None:
    import torch
    from peft import IA3Config, get_peft_model

    kind = KINDS["bert-seq-cls"]
    zoo.build(kind).save_pretrained(tmp_path / "base")
    saved = ["classifier", "pooler", "LayerNorm"]
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = IA3Config(
            task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[], modules_to_save=saved
        )
        model = get_peft_model(zoo.build(kind), config)
        for path, parameter in model.named_parameters():
            if "ia3_l" in path or "modules_to_save" in path:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
    adapters = ("--adapter", tmp_path / "one", "--adapter", tmp_path / "two")
    given = ("--base", tmp_path / "base", *adapters, "--task-table", "--json")
    ran = run("onnx", *given, "--output", tmp_path / "out")
    assert ran.code == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["verdict"] == "in parity"
    assert all(step["passed"] for report in document["adapters"].values() for step in report["steps"])


def test_activations_whose_first_axis_is_not_the_batch_are_refused_by_name() -> None:
    import torch

    from ia3_export.errors import Unsupported
    from ia3_export.onnx.task_table import _Batch, _looked_up

    batch, table = _Batch(), torch.arange(6.0).reshape(3, 1, 2)
    batch.ids = torch.tensor([2, 1])
    rows = _looked_up(batch, table, torch.zeros(6, 2), "fc2")  # three tokens of each text
    assert rows[:, 0, 0].tolist() == [4, 4, 4, 2, 2, 2]
    with pytest.raises(Unsupported, match=r"fc2 gets \(11, 2, 2\), whose first axis is not the batch"):
        _looked_up(batch, table, torch.zeros(11, 2, 2), "fc2")


def test_a_head_that_no_table_can_hold_is_named(tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    kind = KINDS["llama"]
    zoo.build(kind).save_pretrained(tmp_path / "base")
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj"],
        feedforward_modules=[],
        modules_to_save=["embed_tokens"],
    )
    get_peft_model(zoo.build(kind), config).save_pretrained(tmp_path / "one")
    given = ("--base", tmp_path / "base", "--adapter", tmp_path / "one", "--task-table")
    ran = run("onnx", *given, "--output", tmp_path / "out")
    assert ran.code == 3
    assert "embed_tokens.weight, of a module Embedding" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_said_before_anything_is_made(llama: Tabled, tmp_path: Path) -> None:
    cases: Mapping[str, tuple[str | Path, ...]] = {
        "a merged model has none": ("--model", llama.base),
        "--precision keep": (*llama.sources, "--precision", "keep"),
        "--target mobile": (*llama.sources, "--target", "mobile"),
        "--target genai": (*llama.sources, "--target", "genai"),
        "--decoder if": (*llama.sources, "--decoder", "if"),
        "graphs of --swappable": (*llama.sources, "--swappable"),
        "have the same vectors": (*llama.sources, "--adapter", llama.adapters[0]),
    }
    for message, given in cases.items():
        ran = run("onnx", *given, "--task-table", "--output", tmp_path / "out")
        assert ran.code == 2, message
        assert message in ran.stderr or "have one name" in ran.stderr


def test_a_hundred_tasks_are_one_file(llama: Tabled, tmp_path: Path) -> None:
    stored = load_file(llama.adapters[0] / "adapter_model.safetensors")
    random = np.random.default_rng(0)
    adapters = []
    for i in range(100):
        folder = tmp_path / f"task{i}"
        folder.mkdir()
        shutil.copy(llama.adapters[0] / "adapter_config.json", folder)
        made = {n: (1 + 0.5 * random.standard_normal(v.shape)).astype("<f4") for n, v in stored.items()}
        save_file(made, folder / "adapter_model.safetensors")
        adapters += ["--adapter", folder]
    given = ("--base", llama.base, *adapters, "--task-table", "--output", tmp_path / "out", "--no-verify")
    assert run("onnx", *given).code == 0
    graph = tmp_path / "out" / "onnx" / "model.onnx"
    vectors = sum(value.size for value in stored.values())
    grown = graph.stat().st_size - llama.graph("model.onnx").stat().st_size
    assert abs(grown - 98 * 4 * vectors) < 1000
    found = logits(graph, list(range(101)), [0] * 101)
    for task in (0, 37, 100):
        np.testing.assert_array_equal(found[task : task + 1], logits(graph, [task], [0]))
    last = ("verify", "--base", llama.base, "--adapter", tmp_path / "task99", "--onnx", graph)
    ran = run(*last)
    assert ran.code == 0, ran.stderr


NODE = """
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
const [, , modules, runtime, graph] = process.argv;
const ort = createRequire(modules + "/x.js")(runtime);
const { feeds } = JSON.parse(readFileSync(0, "utf8"));
const numbers = {
  int64: (data) => BigInt64Array.from(data.map(BigInt)),
  float32: (data) => Float32Array.from(data),
};
const make = ([type, data, dims]) => new ort.Tensor(type, numbers[type](data), dims);
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(graph)));
const inputs = Object.fromEntries(Object.entries(feeds).map(([name, value]) => [name, make(value)]));
const { logits } = await session.run(inputs);
console.log(JSON.stringify(Array.from(logits.data)));
"""

CHROMIUM = """
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
const [, , modules, , graph, executablePath] = process.argv;
const { chromium } = createRequire(modules + "/x.js")("playwright-core");
const { feeds } = JSON.parse(readFileSync(0, "utf8"));
const args = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"];
const browser = await chromium.launch({ executablePath, args });
try {
  const page = await browser.newPage();
  const dist = modules + "/node_modules/onnxruntime-web/dist/";
  await page.route("http://local.test/**", (route) => {
    const name = new URL(route.request().url()).pathname.slice(1);
    if (name === "") return route.fulfill({ body: "<html></html>", contentType: "text/html" });
    return route.fulfill({ path: name === "graph" ? graph : dist + name });
  });
  await page.goto("http://local.test/");
  const logits = await page.evaluate(async (feeds) => {
    const ort = await import("http://local.test/ort.wasm.min.mjs");
    ort.env.wasm.wasmPaths = "http://local.test/";
    ort.env.wasm.numThreads = 1;
    const numbers = {
      int64: (data) => BigInt64Array.from(data.map(BigInt)),
      float32: (data) => Float32Array.from(data),
    };
    const make = ([type, data, dims]) => new ort.Tensor(type, numbers[type](data), dims);
    const bytes = await (await fetch("http://local.test/graph")).arrayBuffer();
    const session = await ort.InferenceSession.create(new Uint8Array(bytes));
    const inputs = Object.fromEntries(Object.entries(feeds).map(([name, value]) => [name, make(value)]));
    return Array.from((await session.run(inputs)).logits.data);
  }, feeds);
  console.log(JSON.stringify(logits));
} finally {
  await browser.close();
}
"""


def in_javascript(script: str, folder: Path, graph: Path, *words: str) -> Any:
    """The logits that `script` gives for both `inputs` with tasks 2 and 1."""
    (folder / "run.mjs").write_text(script)
    given = inputs(graph) | {"task": np.array([2, 1])}
    feeds = {
        key: [f"{value.dtype}", value.ravel().tolist(), list(value.shape)] for key, value in given.items()
    }
    done = subprocess.run(
        ["node", folder / "run.mjs", JAVASCRIPT, words[0], graph, *words[1:]],
        input=json.dumps({"feeds": feeds}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_javascript_mixes_tasks(llama: Tabled, tmp_path: Path, runtime: str) -> None:
    """Where swappable graphs give the base (onnxruntime-node 1.30) or do not load (onnxruntime-web)."""
    if shutil.which("node") is None or not (JAVASCRIPT / "node_modules" / runtime).is_dir():
        pytest.skip("make runtimes installs it")
    graph = llama.graph("model.onnx")
    found = in_javascript(NODE, tmp_path, graph, runtime)
    np.testing.assert_allclose(found, logits(graph, [2, 1]).ravel(), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_browser_mixes_tasks(llama: Tabled, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None or not (JAVASCRIPT / "node_modules" / "playwright-core").is_dir():
        pytest.skip("no Chromium, or make runtimes was not run")
    graph = llama.graph("model.onnx")
    found = in_javascript(CHROMIUM, tmp_path, graph, "onnxruntime-web", chromium)
    np.testing.assert_allclose(found, logits(graph, [2, 1]).ravel(), rtol=0, atol=2e-5)


def test_openvino_mixes_tasks(llama: Tabled) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install openvino runs this")
    graph = llama.graph("model.onnx")
    # by default it computes in bfloat16 where the processor can
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(inputs(graph) | {"task": np.array([2, 1])})["logits"]
    np.testing.assert_allclose(found, logits(graph, [2, 1]), rtol=0, atol=2e-5)


def test_tables_of_a_large_model_lie_in_its_external_data(
    llama: Tabled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: what a trace put there is overwritten."""
    import onnx

    from ia3_export.onnx import export, files

    monkeypatch.setattr(export, "_STREAMED", 10_000)
    monkeypatch.setattr(files, "INLINE", 64)
    sources = [word for adapter in llama.adapters for word in ("--adapter", adapter)]
    ran = run("onnx", "--base", llama.base, *sources, "--task-table", "--output", tmp_path / "out")
    assert ran.code == 0, ran.stderr
    path = tmp_path / "out" / "onnx" / "model.onnx"
    tables = [
        t for t in onnx.load(path, load_external_data=False).graph.initializer if ".task_table." in t.name
    ]
    assert tables and all(tensor.external_data and not tensor.raw_data for tensor in tables)
