"""One graph for several adapters: a run takes each from its file, and is the base without any."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ia3_export.onnx.swap import read_adapter_file, write_adapter
from tests.e2e.command import Ran, run
from tests.support import zoo
from tests.support.exported import KINDS
from tests.support.quantized import source_of
from tests.support.quantized import write_adapter as write_adapter_for
from tests.support.two_tasks import inputs, written

pytestmark = pytest.mark.filterwarnings("ignore")

JAVASCRIPT = Path(__file__).parent.parent / "runtimes" / "javascript"
#: One text, one image model, one with a head of the adapter's own, one encoder-decoder, and GPT-2's Conv1D.
FAMILIES = ("llama", "gpt2", "bert-seq-cls", "t5", "resnet")


@dataclass(frozen=True)
class Swappable:
    """A base, two adapters, and their swappable export."""

    base: Path
    adapters: tuple[Path, Path]
    folder: Path
    ran: Ran

    def sources(self, which: int) -> tuple[str | Path, ...]:
        return ("--base", self.base, "--adapter", self.adapters[which])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Swappable:
    folder = tmp_path_factory.mktemp("swappable")
    base, adapters = written("llama", folder)
    given = ("--base", base, "--adapter", adapters[0], "--adapter", adapters[1], "--swappable")
    ran = run("onnx", *given, "--output", folder / "out", "--precision", "fp32,fp16,int8,int4", "--json")
    assert ran.code == 0, ran.stderr
    return Swappable(base, adapters, folder / "out", ran)


def outputs(path: Path, adapter: Path | None = None, feeds: dict[str, Any] | None = None) -> Any:
    """The logits of `inputs`, with an adapter or its values as inputs."""
    session = onnxruntime.InferenceSession(path)
    options, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if adapter is not None:
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    return session.run(["logits"], inputs(path) | (feeds or {}), options)[0]


def test_every_adapter_and_none_are_proven_and_the_verdict_says_so(llama: Swappable) -> None:
    document = json.loads(llama.ran.stdout)
    assert document["report"]["adapters"] == []
    assert all(step["passed"] for step in document["report"]["steps"][:2])
    assert sorted(document["adapters"]) == ["one", "two"]
    bits = [proof for proof in document["report"]["weights"] if "without an adapter" in proof["name"]]
    assert len(bits) == 4 and all(proof["passed"] and not proof["notes"] for proof in bits)
    for name, report in document["adapters"].items():
        assert [step["name"] for step in report["steps"]][:2] == ["onnx float32", "onnx float16"]
        assert all(step["passed"] for step in report["steps"][:2])
        exact = report["steps"][0]
        assert exact["distance"]["max_error"] < 1e-3 * report["reference"]["effect"]
        assert all(proof["passed"] for proof in report["weights"])
        assert f"{name} for model.onnx" in [proof["name"] for proof in report["weights"]]


def test_without_an_adapter_the_graph_gives_the_base_s_bits(llama: Swappable, tmp_path: Path) -> None:
    plain = (
        "--model",
        llama.base,
        "--output",
        tmp_path / "base",
        "--no-verify",
        "--precision",
        "fp32,int8,int4",
    )
    assert run("onnx", *plain).code == 0
    for name in ("model.onnx", "model_int8.onnx"):
        expected = outputs(tmp_path / "base" / "onnx" / name)
        np.testing.assert_array_equal(outputs(llama.folder / "onnx" / name), expected)


@pytest.mark.versions
@pytest.mark.parametrize("which", [0, 1])
def test_an_adapter_gives_what_its_folded_graph_gives(llama: Swappable, which: int, tmp_path: Path) -> None:
    folded = ("onnx", *llama.sources(which), "--output", tmp_path / "folded", "--no-verify")
    assert run(*folded, "--precision", "fp32,fp16").code == 0
    name = llama.adapters[which].name
    for file, limit in (("model.onnx", 1e-5), ("model_fp16.onnx", 1e-2)):
        graph, adapter = llama.folder / "onnx" / file, llama.folder / "adapters" / f"{name}.onnx_adapter"
        expected, base = outputs(tmp_path / "folded" / "onnx" / file), outputs(graph)
        effect = np.abs(base - expected).max()
        found = outputs(graph, adapter)
        assert np.abs(found - expected).max() < limit * max(1.0, effect) < 0.5 * effect
        # and as plain inputs, for runtimes without RunOptions
        np.testing.assert_array_equal(outputs(graph, feeds=read_adapter_file(adapter)), found)


def test_codes_take_the_vectors_beside_them(llama: Swappable) -> None:
    for file in ("model_int8.onnx", "model_q4.onnx"):
        graph = llama.folder / "onnx" / file
        exact, base = llama.folder / "onnx" / "model.onnx", outputs(graph)
        one, two = (llama.folder / "adapters" / f"{name}.onnx_adapter" for name in ("one", "two"))
        for adapter, other in ((one, two), (two, one)):
            change = outputs(graph, adapter) - base
            right = outputs(exact, adapter) - outputs(exact)
            wrong = outputs(exact, other) - outputs(exact)
            assert np.vdot(change, right) / np.vdot(right, right) == pytest.approx(1, abs=0.25)
            assert np.linalg.norm(change - right) < 0.5 * np.linalg.norm(change - wrong)


def test_verify_takes_the_file_of_the_adapter_that_it_is_given(llama: Swappable) -> None:
    for which in (0, 1):
        ran = run("verify", *llama.sources(which), "--onnx", llama.folder / "onnx" / "model.onnx")
        assert ran.code == 0, ran.stderr
        ran = run("verify", *llama.sources(which), "--onnx", llama.folder, "--weights-only")
        assert f"weights of {llama.adapters[which].name} for model.onnx: proven" in ran.stdout + ran.stderr


def damaged(llama: Swappable, folder: Path) -> Path:
    shutil.copytree(llama.folder, folder / "out")
    return folder / "out" / "adapters"


def test_another_adapter_under_its_name_is_found(llama: Swappable, tmp_path: Path) -> None:
    adapters = damaged(llama, tmp_path)
    shutil.copy(adapters / "one.onnx_adapter", adapters / "two.onnx_adapter")
    ran = run("verify", *llama.sources(1), "--onnx", tmp_path / "out" / "onnx" / "model.onnx")
    assert ran.code == 1
    assert "weights of two for model.onnx: WRONG" in ran.stdout + ran.stderr


def test_one_changed_element_is_found_by_the_weights(llama: Swappable, tmp_path: Path) -> None:
    adapters = damaged(llama, tmp_path)
    values = {name: array.copy() for name, array in read_adapter_file(adapters / "one.onnx_adapter").items()}
    next(iter(values.values()))[0] += 1e-6
    write_adapter(adapters / "one.onnx_adapter", values)
    graph = tmp_path / "out" / "onnx" / "model.onnx"
    ran = run("verify", *llama.sources(0), "--onnx", graph, "--weights-only")
    assert ran.code == 1
    assert "does not hold its vector" in ran.stdout + ran.stderr


def test_a_default_that_is_not_one_is_found(llama: Swappable, tmp_path: Path) -> None:
    import onnx

    damaged(llama, tmp_path)
    path = tmp_path / "out" / "onnx" / "model.onnx"
    model = onnx.load(path)
    vector = next(tensor for tensor in model.graph.initializer if ".ia3_l." in tensor.name)
    vector.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(vector.dims), 1.5, "<f4"), vector.name))
    onnx.save(model, path)
    ran = run("verify", *llama.sources(1), "--onnx", path, "--weights-only")
    assert ran.code == 1
    assert vector.name in ran.stdout + ran.stderr


def test_a_file_that_is_cut_short_is_named(llama: Swappable, tmp_path: Path) -> None:
    file = damaged(llama, tmp_path) / "one.onnx_adapter"
    file.write_bytes(file.read_bytes()[:100])
    ran = run("verify", *llama.sources(0), "--onnx", tmp_path / "out" / "onnx" / "model.onnx")
    assert ran.code == 3
    assert "one.onnx_adapter" in ran.stderr


def outside(manifest: dict[str, Any]) -> None:
    files = manifest["swappable"]["adapters"]["one"]["files"]
    manifest["swappable"]["adapters"]["one"]["files"] = dict.fromkeys(files, "../elsewhere.onnx_adapter")


def without_files(manifest: dict[str, Any]) -> None:
    del manifest["swappable"]["adapters"]["one"]["files"]


def of_lists(manifest: dict[str, Any]) -> None:
    manifest["swappable"]["adapters"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [(outside, "lies outside of it"), (without_files, "does not say"), (of_lists, "does not say")],
)
def test_a_manifest_of_another_s_making_is_refused(
    llama: Swappable, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    damaged(llama, tmp_path)
    path = tmp_path / "out" / "ia3_export.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    shutil.copy(tmp_path / "out" / "adapters" / "one.onnx_adapter", tmp_path / "elsewhere.onnx_adapter")
    ran = run("verify", *llama.sources(0), "--onnx", tmp_path / "out", "--weights-only")
    assert ran.code == 3
    assert message in ran.stderr


def test_an_adapter_that_the_folder_has_not_is_named(llama: Swappable, tmp_path: Path) -> None:
    kind = KINDS["llama"]
    zoo.adapt(zoo.build(kind), kind, seed=9).save_pretrained(tmp_path / "nine")
    given = ("--base", llama.base, "--adapter", tmp_path / "nine", "--onnx", llama.folder)
    ran = run("verify", *given)
    assert ran.code == 3
    assert "no file of this adapter, but of one, two" in ran.stderr


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_other_families_are_proven(name: str, tmp_path: Path) -> None:
    base, adapters = written(name, tmp_path)
    given = ("--base", base, "--adapter", adapters[0], "--adapter", adapters[1], "--swappable")
    ran = run("onnx", *given, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["verdict"] == "in parity" and sorted(document["adapters"]) == ["one", "two"]
    held = [read_adapter_file(file) for file in (tmp_path / "out" / "adapters").iterdir()]
    assert any(not name.endswith("put") for values in held for name in values) == (name == "bert-seq-cls")


@pytest.mark.parametrize("form", ["--swappable", "--task-table"])
def test_optimum_s_two_decoders_are_proven(form: str, tmp_path: Path) -> None:
    base, adapters = written("t5", tmp_path)
    given = ("--base", base, "--adapter", adapters[0], "--adapter", adapters[1], "--decoder", "separate")
    ran = run("onnx", *given, form, "--output", tmp_path / "out")
    assert ran.code == 0, ran.stderr


@pytest.mark.parametrize("form", ["--swappable", "--task-table"])
def test_a_quantized_base_is_the_dense_one_that_it_stands_for(form: str, tmp_path: Path) -> None:
    base = source_of("bnb-nf4")
    config = json.loads((base / "config.json").read_text())
    adapters = [
        write_adapter_for(tmp_path / name, config, seed=seed) for seed, name in enumerate(("one", "two"))
    ]
    given = ("--base", base, "--adapter", adapters[0], "--adapter", adapters[1], form)
    ran = run("onnx", *given, "--output", tmp_path / "out")
    assert ran.code == 0, ran.stderr
    ran = run("verify", "--base", base, "--adapter", adapters[1], "--onnx", tmp_path / "out", "--json")
    assert ran.code == 0, ran.stderr
    assert json.loads(ran.stdout)["base"]["id"] == "bnb-nf4"


def test_heads_of_other_sizes_cannot_share_a_graph(tmp_path: Path) -> None:
    kind = KINDS["bert-seq-cls"]
    base, (one, _) = written("bert-seq-cls", tmp_path)
    more = replace(kind, config={**kind.config, "num_labels": 7})
    zoo.adapt(zoo.build(more), more, seed=3).save_pretrained(tmp_path / "seven")
    given = ("--base", base, "--adapter", one, "--adapter", tmp_path / "seven", "--swappable")
    ran = run("onnx", *given, "--output", tmp_path / "out")
    assert ran.code == 3
    assert "classifier" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_heads_stay_float32_where_the_other_weights_are_codes(tmp_path: Path) -> None:
    base, adapters = written("bert-seq-cls", tmp_path)
    sources = ("--base", base, "--adapter", adapters[0], "--adapter", adapters[1], "--swappable")
    ran = run("onnx", *sources, "--output", tmp_path / "out", "--precision", "int8,q8", "--json")
    assert ran.code == 0, ran.stderr
    document = json.loads(ran.stdout)
    for report in document["adapters"].values():
        coded = [step for step in report["steps"] if step["precision"] == "int8"]
        assert len(coded) == 2 and all(abs(step["effect_present"] - 1) < 0.05 for step in coded)
    held = read_adapter_file(tmp_path / "out" / "adapters" / "one.onnx_adapter")
    assert "classifier.weight" in held


def test_what_cannot_be_is_said_before_anything_is_made(llama: Swappable, tmp_path: Path) -> None:
    one = llama.adapters[0]
    shutil.copytree(one, tmp_path / "copy")
    shutil.copytree(llama.adapters[1], tmp_path / "one")
    cases = {
        "have one name": ("--base", llama.base, "--adapter", one, "--adapter", tmp_path / "one"),
        "have the same vectors": ("--base", llama.base, "--adapter", one, "--adapter", tmp_path / "copy"),
        "a merged model has none": ("--model", llama.base),
        "--precision keep": (*llama.sources(0), "--precision", "keep"),
        "--target mobile": (*llama.sources(0), "--target", "mobile"),
    }
    for message, given in cases.items():
        ran = run("onnx", *given, "--swappable", "--output", tmp_path / "out")
        assert ran.code == 2, message
        assert message in ran.stderr
    ran = run("verify", *llama.sources(0), "--adapter", llama.adapters[1], "--onnx", llama.folder)
    assert ran.code == 2
    assert "one adapter at a time" in ran.stderr


NODE = """
import { createRequire } from "node:module";
const require = createRequire(process.argv[2] + "/x.js");
const ort = require("onnxruntime-node");
const { feeds } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const numbers = {
  int64: (data) => BigInt64Array.from(data.map(BigInt)),
  float32: (data) => Float32Array.from(data),
};
const make = ([type, data, dims]) => new ort.Tensor(type, numbers[type](data), dims);
const session = await ort.InferenceSession.create(process.argv[3]);
const inputs = Object.fromEntries(Object.entries(feeds).map(([name, value]) => [name, make(value)]));
const { logits } = await session.run(inputs);
console.log(JSON.stringify(Array.from(logits.data)));
"""


@pytest.mark.skipif(
    not (JAVASCRIPT / "node_modules" / "onnxruntime-node").is_dir(), reason="make runtimes installs it"
)
def test_onnxruntime_node_still_ignores_the_vectors(llama: Swappable, tmp_path: Path) -> None:
    """Release 1.30 takes them as inputs, says nothing, and computes the base (docs/tasks.md warns of it).
    When this fails, it can swap."""
    graph = llama.folder / "onnx" / "model.onnx"
    (tmp_path / "run.mjs").write_text(NODE)
    given = inputs(graph) | read_adapter_file(llama.folder / "adapters" / "one.onnx_adapter")
    feeds = {
        key: [f"{array.dtype}", array.ravel().tolist(), list(array.shape)] for key, array in given.items()
    }
    done = subprocess.run(
        ["node", tmp_path / "run.mjs", JAVASCRIPT, graph],
        input=json.dumps({"feeds": feeds}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), outputs(graph).ravel(), atol=1e-6)


@pytest.mark.slow
def test_genai_generates_what_the_folded_model_does(llama: Swappable, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai runs this")
    prompt = np.array([[5, 9, 23, 7, 11, 3]], np.int32)

    def generated(folder: Path, adapter: Path | None = None) -> list[int]:
        model = og.Model(str(folder))
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=26)
        generator = og.Generator(model, parameters)
        if adapter is not None:
            adapters = og.Adapters(model)
            adapters.load(str(adapter), "task")
            generator.set_active_adapter(adapters, "task")
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)]

    given = ("--base", llama.base, "--adapter", llama.adapters[0], "--adapter", llama.adapters[1])
    swap = ("--output", tmp_path / "swap", "--swappable", "--target", "genai", "--no-verify")
    assert run("onnx", *given, *swap).code == 0
    found = [generated(tmp_path / "swap")]
    sources: list[tuple[str | Path, ...]] = [("--model", llama.base), llama.sources(0), llama.sources(1)]
    for which, source in enumerate(sources):
        folded = tmp_path / f"folded{which}"
        out = ("--output", folded, "--target", "genai", "--no-verify")
        assert run("onnx", *source, *out).code == 0
        if which:
            adapter = tmp_path / "swap" / "adapters" / f"{llama.adapters[which - 1].name}.onnx_adapter"
            found.append(generated(tmp_path / "swap", adapter))
        assert found[which] == generated(folded)
    assert len({tuple(tokens) for tokens in found}) > 1
