"""What is in an exported graph, and what is not.

Weights once, no trace of adapter or machine, standard operators.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ia3_export.errors import Unsupported
from tests.support import zoo
from tests.support.exported import Exported, Exports

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

#: One of each form of graph; other tests compute with the same files.
FOLDERS: list[tuple[str, tuple[str, ...]]] = [
    ("llama", ()), ("gpt2", ()), ("olmoe", ()), ("bert-seq-cls", ()), ("bert-masked-lm", ()),
    ("deberta-v2", ()), ("vit", ()), ("resnet", ()), ("wav2vec2", ()), ("t5", ("--decoder", "merged")),
    ("t5", ("--decoder", "separate")), ("t5", ("--decoder", "if")), ("bart", ("--decoder", "merged")),
    ("whisper", ("--decoder", "merged")), ("llama", ("--opset", "18")), ("llama", ("--opset", "23")),
]  # fmt: skip
each_folder = pytest.mark.parametrize(
    ("name", "options"), FOLDERS, ids=["-".join((name, *options[1:])) for name, options in FOLDERS]
)


def _graphs(proto: Any) -> list[Any]:
    """The main graph and those in attributes."""
    found = [proto.graph]
    for graph in found:
        found += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return found


@each_folder
def test_nothing_of_this_machine_or_of_the_adapter_is_in_any_file(
    exports: Exports, name: str, options: tuple[str, ...]
) -> None:
    exported = exports(name, *options)
    files = [path for path in exported.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".onnx"}
    # of random weights, one in 10^9 looks like such a path
    leak = re.compile(
        rb"/tmp/|/home/|/root/|/usr/|site-packages|python3|[A-Za-z_]{4}\.py\b|File \"|"
        + re.escape(str(exports.folder).encode())
    )
    adapter = re.compile(rb"ia3_l|base_layer|lora_|modules_to_save|base_model\.model")
    for path in files:
        content = path.read_bytes()
        assert not leak.search(content), f"{path.name}: {leak.search(content)}"
        assert not adapter.search(content), f"{path.name}: {adapter.search(content)}"


@each_folder
def test_graphs_are_standard_and_without_stale_shapes(
    exports: Exports, name: str, options: tuple[str, ...]
) -> None:
    import onnx

    exported = exports(name, *options)
    opset = int(dict([options]).get("--opset", "20")) if options else 20
    for path in exported.graphs:
        onnx.checker.check_model(str(path), full_check=True)
        proto = onnx.load(path)
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
        assert not proto.functions and not proto.metadata_props and not proto.doc_string
        for graph in _graphs(proto):
            held = {t.name: list(t.dims) for t in graph.initializer}
            for value in graph.value_info:
                shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
                assert value.name in held and shape in ([], held[value.name]), f"{path.name}: {value.name}"
            for node in graph.node:
                assert not node.metadata_props and not node.doc_string and node.domain == ""
            used = {i for node in graph.node for i in node.input} | {o.name for o in graph.output}
            inner = {i for g in _graphs(proto) for node in g.node for i in node.input}
            assert held.keys() <= used | inner, f"{path.name}: {held.keys() - used - inner} is not used"


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_no_value_has_metadata(exports: Exports, name: str) -> None:
    import onnx

    graph = onnx.load(exports(name).graph()).graph
    assert not any(
        v.metadata_props for v in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    )


@pytest.mark.parametrize("name", ["llama", "bert-seq-cls"])
def test_the_operators_are_those_of_the_bases_own_export(exports: Exports, name: str) -> None:
    """Folding costs nothing at run time: operator by operator, with the same wiring and attributes."""
    import onnx

    folded, plain = (
        onnx.load(exported.graph()) for exported in (exports(name), exports(name, adapted=False))
    )
    for proto in (folded, plain):
        assert len(proto.graph.node) > 50
    assert [n.SerializeToString() for n in folded.graph.node] == [
        n.SerializeToString() for n in plain.graph.node
    ]
    held = [{t.name: t.SerializeToString() for t in p.graph.initializer} for p in (folded, plain)]
    assert held[0].keys() == held[1].keys() and held[0] != held[1]


def _float_weights(path: Path) -> dict[str, Any]:
    import onnx
    from onnx import numpy_helper

    arrays = {t.name: numpy_helper.to_array(t) for g in _graphs(onnx.load(path)) for t in g.initializer}
    return {name: a for name, a in arrays.items() if a.dtype == "float32" and a.nbytes > 1024}


TIED = [("gpt2", "model"), ("bert-masked-lm", "model"), ("t5", "decoder_model_merged"),
        ("bart", "decoder_model_merged"), ("whisper", "decoder_model_merged")]  # fmt: skip


@pytest.mark.parametrize(("name", "stem"), TIED, ids=[name for name, _ in TIED])
def test_a_tied_embedding_is_stored_once(exports: Exports, name: str, stem: str) -> None:
    options = ("--decoder", "merged") if stem != "model" else ()
    exported: Exported = exports(name, *options)
    weights = _float_weights(exported.graph(stem))
    embeddings = [n for n, a in weights.items() if sorted(a.shape) == [32, 320]]
    assert len(embeddings) == 1
    # nothing else takes room: text of the graph aside, the file is its weights
    size = sum(a.nbytes for a in weights.values())
    assert exported.graph(stem).stat().st_size - size < 80_000


@pytest.mark.parametrize("opset", ["16", "99"])
def test_an_opset_that_cannot_be_made_is_refused(exports: Exports, tmp_path: Path, opset: str) -> None:
    from tests.e2e.command import run

    base, _ = exports.written("vit")
    ran = run("onnx", "--model", base, "--output", tmp_path / "out", "--opset", opset, "--no-verify", "-q")
    assert ran.code in (2, 3), ran
    assert "Traceback" not in ran.stderr and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def traced() -> tuple[Any, Any, dict[str, Any]]:
    """A model, its ``onnx_ir.Model``, and the model's state before."""
    from ia3_export.onnx.contract import plan_graphs
    from ia3_export.onnx.tasks import TASKS
    from ia3_export.onnx.trace import trace
    from ia3_export.parity.runs.inputs import make_cases

    model = zoo.build(zoo.by_name("vit"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample = {name: tensor[:2] for name, tensor in make_cases(model)[1].tensors.items()}
    (spec,) = plan_graphs(model, TASKS["image-classification"], sample, "merged", None)
    return model, trace(model, spec, 20), before


def test_tracing_copies_no_weights_and_leaves_the_model_as_it_was(
    traced: tuple[Any, Any, dict[str, Any]],
) -> None:
    import torch

    model, graph, before = traced
    state = model.state_dict(keep_vars=True)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert not model.training
    assert all(type(value) is not torch.Tensor or not value.requires_grad for value in state.values())
    held = {
        name: value.const_value.raw.data_ptr()
        for name, value in graph.graph.initializers.items()
        if name in state and state[name].ndim == 2
    }
    assert len(held) >= 12
    assert all(pointer == state[name].data_ptr() for name, pointer in held.items())


def test_a_weight_that_is_only_read_transposed_is_stored_so_under_its_name(
    traced: tuple[Any, Any, dict[str, Any]],
) -> None:
    import torch

    model, graph, _ = traced
    name = "vit.layers.0.mlp.fc1.weight"
    value = graph.graph.initializers[name].const_value
    assert list(value.shape) == list(model.state_dict()[name].T.shape)
    assert torch.equal(torch.from_numpy(value.numpy()), model.state_dict()[name].T)


def test_what_torch_cannot_trace_is_refused_by_name() -> None:
    import torch

    from ia3_export.onnx.contract import GraphSpec, Port
    from ia3_export.onnx.trace import trace

    model = zoo.build(zoo.by_name("vit"))

    def depends(_: Any, named: dict[str, Any]) -> tuple[Any, ...]:
        total = named["pixel_values"].sum()
        return (total if total.item() > 0 else -total,)

    port = Port("pixel_values", ("batch_size", 3, 16, 16))
    spec = GraphSpec("model", depends, (port,), (torch.ones(2, 3, 16, 16),), (Port("logits", ()),))
    with pytest.raises(Unsupported, match="ViTForImageClassification") as caught:
        trace(model, spec, 20)
    assert "--task" in caught.value.hint
