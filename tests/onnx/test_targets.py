"""Targets beside the graphs.

``genai_config.json`` and what it refuses, ``.ort`` files and their operators.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.onnx.genai import write_genai_config
from ia3_export.onnx.mobile import write_ort
from tests.e2e.command import only_complaint, run
from tests.support import zoo

pytestmark = [pytest.mark.filterwarnings("ignore")]


def _decoder(
    folder: Path, *, inputs: dict[str, list[Any]], vocabulary: int = 32, name: str = "model.onnx"
) -> Path:
    """A graph with a decoder's logits and these inputs; what it computes does not matter here."""
    import onnx
    from onnx import TensorProto, helper

    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    ports = [
        helper.make_tensor_value_info(
            key, TensorProto.INT64 if key.endswith(("ids", "mask")) else TensorProto.FLOAT, shape
        )
        for key, shape in inputs.items()
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "n", vocabulary])
    graph = helper.make_graph([], "decoder", ports, [logits])
    onnx.save(helper.make_model(graph), folder / "onnx" / name)
    return folder


_IDS: dict[str, list[Any]] = {"input_ids": ["batch_size", "n"], "attention_mask": ["batch_size", "t"]}


def _cache(layers: int, heads: int, key: int, value: int) -> dict[str, list[Any]]:
    return {
        f"past_key_values.{layer}.{part}": ["batch_size", heads, "past", size]
        for layer in range(layers)
        for part, size in (("key", key), ("value", value))
    }


def test_the_graph_tells_what_configurations_call_by_many_names(tmp_path: Path) -> None:
    folder = _decoder(tmp_path, inputs={**_IDS, **_cache(3, 2, 16, 16)}, vocabulary=77)
    (folder / "config.json").write_text(
        json.dumps({"n_layer": 9, "n_embd": 5, "n_positions": 512, "eos_token_id": 7})
    )
    content = json.loads(write_genai_config(folder).read_text())
    model, decoder = content["model"], content["model"]["decoder"]
    assert (model["vocab_size"], model["context_length"], content["search"]["max_length"]) == (77, 512, 512)
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (3, 2, 16)
    assert "position_ids" not in decoder["inputs"] and decoder["filename"] == "onnx/model.onnx"


def test_generation_config_comes_before_config_and_ids_that_are_no_tokens_are_left_out(
    tmp_path: Path,
) -> None:
    folder = _decoder(tmp_path, inputs={**_IDS, **_cache(1, 2, 8, 8)})
    (folder / "config.json").write_text(
        json.dumps({"eos_token_id": 7, "pad_token_id": -1, "bos_token_id": None})
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 9, 99], "temperature": 0.5, "do_sample": True, "num_beams": 2})
    )
    content = json.loads(write_genai_config(folder).read_text())
    assert content["model"]["eos_token_id"] == [5, 9] and content["model"]["pad_token_id"] == 5
    assert "bos_token_id" not in content["model"]
    assert content["search"]["temperature"] == 0.5 and content["search"]["do_sample"] is True
    assert "num_beams" not in content["search"]


def test_the_most_exact_graph_that_there_is_becomes_the_decoder(tmp_path: Path) -> None:
    for name in ("model_q4.onnx", "model_int8.onnx"):
        folder = _decoder(tmp_path, inputs={**_IDS, **_cache(1, 2, 8, 8)}, name=name)
    content = json.loads(write_genai_config(folder).read_text())
    assert content["model"]["decoder"]["filename"] == "onnx/model_int8.onnx"


@pytest.mark.parametrize(
    ("inputs", "mentions"),
    [
        (_IDS, "no key-value cache"),
        ({**_IDS, "token_type_ids": ["batch_size", "n"], **_cache(1, 2, 8, 8)}, "token_type_ids"),
        ({**_IDS, **_cache(2, 4, 12, 6)}, "(4, 12), (4, 6)"),
        (
            {**_IDS, **{k: v for k, v in _cache(3, 2, 8, 8).items() if ".1." not in k}},
            "past_key_values.1.key",
        ),
    ],
    ids=["encoder", "other input", "latent attention", "hybrid"],
)
def test_what_genai_could_not_run_is_refused(
    tmp_path: Path, inputs: dict[str, list[Any]], mentions: str
) -> None:
    folder = _decoder(tmp_path, inputs=inputs)
    with pytest.raises(Unsupported) as caught:
        write_genai_config(folder)
    assert mentions in str(caught.value) and "--target genai" in caught.value.hint
    assert not (folder / "genai_config.json").exists()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    folder = _decoder(tmp_path, inputs=_IDS, name="decoder_model_merged.onnx")
    with pytest.raises(Unsupported, match="encoder and decoder"):
        write_genai_config(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and ``mobile``: its export with ``--target mobile``."""
    folder = tmp_path_factory.mktemp("classifier")
    kind = zoo.by_name("bert-seq-cls")
    one_layer = replace(kind, config={**kind.config, "num_hidden_layers": 1})
    zoo.build(one_layer).save_pretrained(folder / "base")
    ran = run(
        "onnx", "--model", folder / "base", "--output", folder / "mobile", "--target", "mobile", "--no-verify"
    )
    assert ran.code == 0, ran
    return folder


@pytest.mark.slow
def test_a_classifier_for_genai_is_refused_and_nothing_is_written(classifier: Path, tmp_path: Path) -> None:
    ran = run("onnx", "--model", classifier / "base", "--output", tmp_path / "out", "--target", "genai", "-q")
    only_complaint(ran, 3, "onnxruntime-genai")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_ort_file_gives_the_outputs_of_the_onnx_file(classifier: Path) -> None:
    import numpy as np
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(str(classifier / "mobile" / "onnx" / f"model{suffix}"))
        for suffix in (".onnx", ".ort")
    ]
    rng = np.random.default_rng(0)
    for batch, length in ((1, 3), (4, 13)):
        ids = rng.integers(5, 120, (batch, length))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        expected, got = (session.run(None, feeds)[0] for session in sessions)
        assert expected.shape == (batch, 3) and not np.allclose(expected, expected[0, 0])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_list_names_every_operator_that_the_ort_file_runs(classifier: Path, tmp_path: Path) -> None:
    """What a session executes is what ONNX Runtime's own profiler saw."""
    import numpy as np
    import onnxruntime

    onnx = classifier / "mobile" / "onnx"
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(onnx / "model.ort"), options)
    ids = np.ones((1, 3), np.int64)
    session.run(None, {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids})
    events = json.loads(Path(session.end_profiling()).read_text())
    executed = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    lines = (onnx / "model.required_operators.config").read_text().splitlines()
    listed = {operator for line in lines for operator in line.split(";")[2].split(",")}
    assert {"MatMul", "Softmax"} <= executed and executed <= listed


@pytest.mark.slow
def test_ort_files_tell_nothing_of_this_machine_and_say_the_same_each_time(
    classifier: Path, tmp_path: Path
) -> None:
    shutil.copy(classifier / "mobile" / "onnx" / "model.onnx", tmp_path)
    ort, operators = write_ort(tmp_path / "model.onnx")
    assert (ort.name, operators.name) == ("model.ort", "model.required_operators.config")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model.onnx", ort, operators]
    for file in (ort, operators):
        content = file.read_bytes()
        assert not any(word in content for word in (str(tmp_path).encode(), b"site-packages", b"/tmp"))
    first, second = (
        (folder / "model.ort").read_bytes() for folder in (classifier / "mobile" / "onnx", tmp_path)
    )
    # at its head lies the one table whose order is random; the model is all the rest
    assert len(first) == len(second) and first[4096:] == second[4096:]
    assert operators.read_bytes() == (classifier / "mobile" / "onnx" / operators.name).read_bytes()


def test_weights_beyond_a_flatbuffer_are_refused_before_any_work(tmp_path: Path) -> None:
    import onnx

    path = _decoder(tmp_path, inputs=_IDS) / "onnx" / "model.onnx"
    graph = onnx.load(path)
    weight = graph.graph.initializer.add(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[550_000_000])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="model.onnx_data")
    path.write_bytes(graph.SerializeToString())
    with path.with_name("model.onnx_data").open("wb") as file:
        file.truncate(2_200_000_000)  # a sparse file
    with pytest.raises(Unsupported, match=r"2\.2 GB") as caught:
        write_ort(tmp_path / "onnx" / "model.onnx")
    assert "int8" in caught.value.hint


def test_what_onnx_runtime_cannot_convert_is_refused_in_its_words_and_leaves_nothing(tmp_path: Path) -> None:
    import onnx

    graph = tmp_path / "model.onnx"
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[1] x) => (float[1] y) { y = Unheard (x) }'
    onnx.save(onnx.parser.parse_model(text), graph)
    with pytest.raises(Unsupported, match="Unheard"):
        write_ort(graph)
    assert list(tmp_path.iterdir()) == [graph]


def test_what_is_no_graph_is_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(DamagedFile, match=r"model\.onnx"):
        write_ort(tmp_path / "model.onnx")
