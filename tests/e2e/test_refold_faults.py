"""Refolding where a graph does not say all: equal tensors kept once, heads of codes, odd folders, damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.e2e.command import Ran, edit_json, run
from tests.support import zoo
from tests.support.exported import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")

KEY = "model.layers.0.self_attn.k_proj.weight"


def refold(folder: Path, adapter: Path, output: Path, *more: str | Path) -> Ran:
    return run("onnx", "--onnx-base", folder, "--adapter", adapter, "--output", output, *more)


def roberta(
    folder: Path, targets: Sequence[str], equal: Callable[[Any], None], precision: str = "fp32"
) -> tuple[Path, Path, Path]:
    """A classifier with a head of two layers in ``modules_to_save``; `equal` makes tensors of the base so."""
    import torch
    import transformers
    from peft import IA3Config, get_peft_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.RobertaConfig(vocab_size=64, max_position_embeddings=80, num_labels=3, **sizes)
    model: Any = transformers.RobertaForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
        equal(model)
    model.save_pretrained(folder / "base")
    settings = IA3Config(task_type="SEQ_CLS", target_modules=list(targets), feedforward_modules=[])
    live = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if ".ia3_l." in name or ".modules_to_save." in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    live.save_pretrained(folder / "adapter")
    ran = run(
        "onnx", "--model", folder / "base", "--output", folder / "exported", "--precision", precision,
        "--no-verify",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    return folder / "base", folder / "adapter", folder / "exported"


def _equal(leaf: str) -> Callable[[Any], None]:
    def make(model: Any) -> None:
        for layer in model.roberta.encoder.layer:
            attention = layer.attention.self
            getattr(attention.value, leaf).copy_(getattr(attention.query, leaf))

    return make


def _zero_head(model: Any) -> None:
    model.roberta.embeddings.LayerNorm.bias.zero_()
    model.classifier.dense.bias.zero_()


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_equal_tensors_that_the_graph_holds_once_are_refused(tmp_path: Path, leaf: str) -> None:
    """The exporter keeps one of them: a vector on it would reach the other, too."""
    base, adapter, exported = roberta(tmp_path, ["query"], _equal(leaf))
    ran = refold(exported, adapter, tmp_path / "out")
    assert ran.code == 3 and f"query.{leaf} at 2 places" in ran.stderr and "--base" in ran.stderr
    ran = refold(exported, adapter, tmp_path / "out", "--base", base)
    assert ran.code == 3 and "are equal in the base" in ran.stderr and f"value.{leaf}" in ran.stderr


def test_a_part_of_a_head_that_the_graph_does_not_name_is_refused(tmp_path: Path) -> None:
    base, adapter, exported = roberta(tmp_path, ["key", "value"], _zero_head)
    for more in ((), ("--base", base)):
        ran = refold(exported, adapter, tmp_path / "out", *more)
        assert ran.code == 3 and "classifier.dense.bias under no name" in ran.stderr


def test_a_head_that_is_in_codes_becomes_the_adapters(tmp_path: Path) -> None:
    base, adapter, exported = roberta(tmp_path, ["key", "value"], lambda _: None, "fp32,int8,q8")
    ran = refold(exported, adapter, tmp_path / "out", "--json")
    assert ran.code == 0, ran.stderr
    ran = run("verify", "--base", base, "--adapter", adapter, "--onnx", tmp_path / "out", "--json")
    assert ran.code == 0, ran.stderr


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, kind = tmp_path_factory.mktemp("llama"), KINDS["llama"]
    zoo.build(kind).save_pretrained(folder / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(folder / "adapter")
    plain = ("--output", folder / "exported", "--precision", "fp32,int8", "--no-verify")
    assert run("onnx", "--model", folder / "base", *plain).code == 0
    return folder / "adapter", folder / "exported"


def test_codes_are_made_anew_without_a_manifest(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """Names of codes do not tell how the float32 graph beside holds a weight."""
    adapter, exported = llama
    ran = refold(exported / "onnx", adapter, tmp_path / "out")
    assert ran.code == 0, ran.stderr


def _snapshot(exported: Path, folder: Path, *, external: str | None) -> Path:
    """The folder as huggingface_hub's cache holds it: links to blobs."""
    snapshot, blobs = folder / "models--a--b" / "snapshots" / "1", folder / "models--a--b" / "blobs"
    shutil.copytree(exported, folder / "plain", ignore=shutil.ignore_patterns("*int8*"))
    if external is not None:
        path = folder / "plain" / "onnx" / "model.onnx"
        model = onnx.load(path)
        path.unlink()
        (path.parent / external).parent.mkdir(exist_ok=True)
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=64)
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted((folder / "plain").rglob("*")) if p.is_file()):
        link = snapshot / path.relative_to(folder / "plain")
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


@pytest.mark.parametrize("external", [None, "model.onnx_data"])
def test_a_snapshot_of_the_hub_takes_an_adapter(
    llama: tuple[Path, Path], tmp_path: Path, external: str | None
) -> None:
    adapter, exported = llama
    snapshot = _snapshot(exported, tmp_path, external=external)
    ran = refold(snapshot, adapter, tmp_path / "out")
    assert ran.code == 0, ran.stderr
    assert (tmp_path / "out" / "config.json").is_file() and not any(
        path.is_symlink() for path in (tmp_path / "out").rglob("*")
    )


def test_a_link_to_elsewhere_is_still_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, exported = llama
    snapshot = _snapshot(exported, tmp_path, external="model.onnx_data")
    data = snapshot / "onnx" / "model.onnx_data"
    shutil.move(data.resolve(), tmp_path / "elsewhere")
    data.unlink()
    data.symlink_to(tmp_path / "elsewhere")
    ran = refold(snapshot, adapter, tmp_path / "out")
    assert ran.code == 3 and "outside its folder" in ran.stderr


def test_external_data_in_a_subfolder_stay_there(llama: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, exported = llama
    _snapshot(exported, tmp_path, external="weights/model.bin")
    ran = refold(tmp_path / "plain", adapter, tmp_path / "out")
    assert ran.code == 0, ran.stderr
    assert (tmp_path / "out" / "onnx" / "weights" / "model.bin").is_file()


def test_an_encoder_and_a_decoder_may_share_their_external_data(tmp_path: Path) -> None:
    kind = KINDS["t5"]
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(tmp_path / "adapter")
    plain = ("--output", tmp_path / "exported", "--no-verify")
    assert run("onnx", "--model", tmp_path / "base", *plain).code == 0
    data = tmp_path / "exported" / "onnx" / "weights.data"
    with data.open("wb") as file:
        for path in sorted(data.parent.glob("*.onnx")):
            model = onnx.load(path)
            for tensor in [t for t in model.graph.initializer if len(t.raw_data) > 64]:
                place = {
                    "location": data.name,
                    "offset": str(file.tell()),
                    "length": str(len(tensor.raw_data)),
                }
                file.write(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=value)
            path.write_bytes(model.SerializeToString())
    ran = refold(tmp_path / "exported", tmp_path / "adapter", tmp_path / "out")
    assert ran.code == 0, ran.stderr


def test_both_branches_of_a_merged_decoder_take_the_vectors(tmp_path: Path) -> None:
    kind = KINDS["t5"]
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(tmp_path / "adapter")
    merged = ("--output", tmp_path / "exported", "--decoder", "if", "--no-verify")
    assert run("onnx", "--model", tmp_path / "base", *merged).code == 0
    ran = refold(tmp_path / "exported", tmp_path / "adapter", tmp_path / "out")
    assert ran.code == 0, ran.stderr
    sources = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    ran = run("verify", *sources, "--onnx", tmp_path / "out")
    assert ran.code == 0, ran.stdout


def test_a_weight_in_an_unknown_operator_is_refused_by_name(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """Products further down are none of it."""
    adapter, exported = llama
    shutil.copytree(exported, tmp_path / "odd", ignore=shutil.ignore_patterns("*int8*"))
    path = tmp_path / "odd" / "onnx" / "model.onnx"
    model = onnx.load(path)
    node = next(node for node in model.graph.node if KEY in node.input)
    node.op_type, node.domain = "FusedMatMul", "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())
    ran = refold(tmp_path / "odd", adapter, tmp_path / "out")
    assert ran.code == 3 and "FusedMatMul" in ran.stderr and "k_proj" in ran.stderr


def test_names_that_contradict_the_base_are_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, exported = llama
    shutil.copytree(exported, tmp_path / "lie")
    provenance = json.loads((exported / "ia3_export.json").read_text())["provenance"]
    rows, other = provenance["model"], KEY.replace("k_proj", "v_proj")
    rows[KEY], rows[other] = rows[other], rows[KEY]
    edit_json(tmp_path / "lie" / "ia3_export.json", provenance=provenance)
    ran = refold(tmp_path / "lie", adapter, tmp_path / "out", "--base", exported.parent / "base")
    assert ran.code == 3 and "other values under the name" in ran.stderr
    assert refold(exported, adapter, tmp_path / "out", "--base", exported.parent / "base").code == 0


def test_a_configuration_of_odd_values_is_no_crash(llama: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, exported = llama
    shutil.copytree(exported, tmp_path / "odd")
    odd = {"num_attention_heads": True, "hidden_size": "7", "head_dim": None, "text_config": [3]}
    edit_json(tmp_path / "odd" / "config.json", vocab_size=None, **odd)
    assert refold(tmp_path / "odd", adapter, tmp_path / "out").code == 0


def _tensor(model: Any) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == KEY)


def _product(model: Any) -> Any:
    return next(node for node in model.graph.node if node.op_type == "MatMul")


def _cycle(model: Any) -> None:
    _product(model).input[1] = "one"
    pairs = (("two", "one"), ("one", "two"))
    model.graph.node.extend(onnx.helper.make_node("Identity", [a], [b]) for a, b in pairs)


DAMAGE: dict[str, Callable[[Any], None]] = {
    "negative sizes": lambda model: _tensor(model).dims.__setitem__(slice(None), [-16, -32]),
    "no type": lambda model: setattr(_tensor(model), "data_type", 99),
    "no outputs": lambda model: _product(model).output.__delitem__(slice(None)),
    "nodes in a circle": _cycle,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_graph_is_refused(llama: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    adapter, exported = llama
    shutil.copytree(exported, tmp_path / "bad", ignore=shutil.ignore_patterns("*int8*"))
    path = tmp_path / "bad" / "onnx" / "model.onnx"
    model = onnx.load(path)
    DAMAGE[what](model)
    path.write_bytes(model.SerializeToString())
    ran = refold(tmp_path / "bad", adapter, tmp_path / "out")
    assert ran.code == 3 and "model.onnx" in ran.stderr and not (tmp_path / "out").exists()
