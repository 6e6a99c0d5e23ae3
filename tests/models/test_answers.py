"""Answers of model classes, kept between processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ia3_export import merge
from ia3_export.adapters import read_adapter
from ia3_export.checkpoint.folder import Checkpoint, read_checkpoint
from ia3_export.models import answers, model_class
from ia3_export.models.answers import remembered, runtime_model
from ia3_export.models.model_class import RuntimeModel, load_runtime_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own, and the folder of its answers."""
    monkeypatch.setenv("IA3_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "classes"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base without a head, and a classifier's adapter that brings one."""
    import torch
    from peft import IA3Config, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    folder = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "base")
    config.num_labels = 5
    settings = IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False
    )
    model = get_peft_model(BertForSequenceClassification(config), settings)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes that are built from here on."""
    names: list[str] = []
    build = model_class.build_on_meta

    def noted(name: str, config: Any) -> Any:
        names.append(name)
        return build(name, config)

    monkeypatch.setattr(model_class, "build_on_meta", noted)
    return names


def test_a_kept_answer_is_the_answer(
    classifier: tuple[Path, Path], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = read_checkpoint(classifier[0]), read_adapter(classifier[1])
    config = base.config or {}
    fresh = load_runtime_model(config, adapter, base.tensors)
    first = runtime_model(config, adapter, base.tensors)
    assert len(list(kept.iterdir())) == 1
    built = asked(monkeypatch)
    second = runtime_model(config, adapter, base.tensors)
    assert not built
    for field in fields(RuntimeModel):
        if field.name != "built":
            values = [getattr(runtime, field.name) for runtime in (fresh, first, second)]
            assert values[0] == values[1] == values[2], field.name
            assert len({type(value) for value in values}) == 1, field.name
    assert second.loading.state.keys() == fresh.loading.state.keys()
    assert built == [fresh.class_name]


@pytest.mark.parametrize("what", ["config", "adapter", "shape", "name"])
def test_another_question_is_asked_again(
    classifier: tuple[Path, Path], kept: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    base, adapter = read_checkpoint(classifier[0]), read_adapter(classifier[1])
    config, tensors = dict(base.config or {}), dict(base.tensors)
    runtime_model(config, adapter, tensors)
    name = "encoder.layer.0.output.dense.bias"
    if what == "config":
        config["num_hidden_layers"] = 1
    elif what == "adapter":
        adapter = replace(adapter, config={**adapter.config, "task_type": "TOKEN_CLS"})
    elif what == "shape":
        tensors[name] = replace(tensors[name], shape=(4, 4))
    else:
        tensors["bert." + name] = tensors.pop(name)
    built = asked(monkeypatch)
    runtime_model(config, adapter, tensors)
    assert built
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("release", ["6.0.0.dev0", "6.0.0"])
def test_a_release_in_the_making_is_asked_every_time(
    release: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers.metadata, "version", lambda _: release)
    counted: list[int] = []
    for _ in range(3):
        assert remembered("q", {"a": 1}, lambda: counted.append(1) or "answer") == "answer"  # type: ignore[func-returns-value]
    assert len(counted) == (3 if "dev" in release else 1)
    assert kept.exists() == ("dev" not in release)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def a_list(file: Path) -> None:
    file.write_text("[]")


def without_a_field(file: Path) -> None:
    content = json.loads(file.read_bytes())
    del content["answer"]["shapes"]
    file.write_text(json.dumps(content))


def with_another_kind(file: Path) -> None:
    content = json.loads(file.read_bytes())
    content["answer"]["converted"] = 3
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [truncated, a_list, without_a_field, with_another_kind])
def test_a_damaged_answer_is_asked_again(
    classifier: tuple[Path, Path], kept: Path, damage: Callable[[Path], None]
) -> None:
    base, adapter = read_checkpoint(classifier[0]), read_adapter(classifier[1])
    first = _ask(base, adapter)
    file = next(kept.iterdir())
    content = file.read_bytes()
    damage(file)
    assert _ask(base, adapter) == first
    assert file.read_bytes() == content


def _ask(base: Checkpoint, adapter: Any) -> tuple[str, dict[str, Any]]:
    runtime = runtime_model(base.config or {}, adapter, base.tensors)
    return runtime.class_name, dict(runtime.shapes)


def test_a_folder_that_cannot_be_written_is_no_error(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IA3_EXPORT_CACHE", str(tmp_path / "file"))
    assert remembered("q", {}, lambda: 7) == 7
    assert not kept.exists()


def test_a_user_without_a_home_is_asked_every_time(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("IA3_EXPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert [remembered("q", {}, lambda: 7) for _ in range(2)] == [7, 7]
    assert not kept.exists()


def test_a_cache_that_may_only_be_read_is_read(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: object) -> None:
        raise PermissionError

    assert remembered("q", {}, lambda: "first") == "first"
    monkeypatch.setattr(answers.os, "utime", refuse)
    assert remembered("q", {}, lambda: "second") == "first"
    assert len(list(kept.iterdir())) == 1


def test_what_is_raised_is_not_kept(kept: Path) -> None:
    def fail() -> int:
        raise KeyError("no such class")

    for _ in range(2):
        with pytest.raises(KeyError, match="no such class"):
            remembered("q", {}, fail)
    assert remembered("q", {}, lambda: 1) == 1


def test_the_oldest_answers_go(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_KEPT", 3)
    for number in range(5):
        remembered("q", number, lambda: "x")
        for age, file in enumerate(sorted(kept.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert len(list(kept.iterdir())) == 3
    counted: list[int] = []
    remembered("q", 4, lambda: counted.append(1))
    assert not counted


def test_a_merge_with_a_kept_answer_is_the_same(
    classifier: tuple[Path, Path], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = classifier
    merge(base, [adapter], tmp_path / "first")
    built = asked(monkeypatch)
    merge(base, [adapter], tmp_path / "second")
    assert not built
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
