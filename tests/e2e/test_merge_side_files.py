"""What ``ia3-export merge`` does with everything beside the weights, and with the hub's cache."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.e2e.command import contents, merge, only_complaint, run, run_process
from tests.e2e.conftest import CARD, Tiny
from tests.support.merged import (
    UNTOUCHED_SHARDS,
    files_below,
    same_weights,
    sha256,
)

# ----------------------------------------------------------------------------------------------------
# file modes


def modes(folder: Path) -> set[str]:
    return {f"{stat.S_IMODE(path.stat().st_mode):o}" for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_modes_obey_the_umask(tiny: Tiny, tmp_path: Path, umask: int) -> None:
    """The base's shards have mode 0600 (safetensors writes them so), its side files 0644."""
    args = ("merge", "--base", tiny.base, "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    ran = run_process(*args, umask=umask)
    assert ran.code == 0, ran
    assert modes(tmp_path / "merged") == {f"{0o666 & ~umask:o}"}
    assert stat.S_IMODE((tmp_path / "merged").stat().st_mode) == 0o777 & ~umask


# ---------------------------------------------------------------------------------------------------
# side files


@pytest.fixture
def furnished(tiny: Tiny, tmp_path: Path) -> Path:
    """A base with sub-folders, hidden files, and its weights in other formats."""
    import torch

    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    for name in (
        "1_Pooling/config.json",
        "assets/deep/er/image.png",
        "chat_template.jinja",
        ".gitattributes",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(os.urandom(64))
    for name in ("onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(bytes(16))
    for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.Q4_K_M.gguf"):
        (base / name).write_bytes(bytes(16))
    for name in (".git/config", ".cache/huggingface/download/config.json.metadata"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(bytes(16))
    torch.save({"lm_head.weight": torch.ones(2)}, base / "pytorch_model.bin")
    shutil.copyfile(base / "model-00001-of-00006.safetensors", base / "model.fp16-00001-of-00006.safetensors")
    return base


OTHER_FORMATS = {
    "onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "model.Q4_K_M.gguf", "pytorch_model.bin",
    "model.fp16-00001-of-00006.safetensors",
}  # fmt: skip


def test_side_files_are_copied_byte_for_byte(tiny: Tiny, furnished: Path, tmp_path: Path) -> None:
    merge(furnished, tiny.adapter, tmp_path / "merged")
    before, after = files_below(furnished), files_below(tmp_path / "merged")
    kept = {
        name
        for name in before
        if name not in OTHER_FORMATS
        and name != "README.md"
        and not name.startswith((".git/", ".cache/", "model-"))
    }
    assert kept >= {
        "1_Pooling/config.json",
        "assets/deep/er/image.png",
        ".gitattributes",
        "tokenizer.json",
        "config.json",
    }
    assert [
        name for name in kept if name not in after or after[name].read_bytes() != before[name].read_bytes()
    ] == []


def test_weights_in_other_formats_are_left_out_and_named(tiny: Tiny, furnished: Path, tmp_path: Path) -> None:
    ran = merge(furnished, tiny.adapter, tmp_path / "merged")
    assert OTHER_FORMATS.isdisjoint(files_below(tmp_path / "merged"))
    assert [name for name in OTHER_FORMATS if name not in ran.stdout] == []
    assert set(json.loads((tmp_path / "merged" / "ia3_export.json").read_text())["left_out"]) == OTHER_FORMATS


def test_nothing_of_version_control_or_caches_is_copied(tiny: Tiny, furnished: Path, tmp_path: Path) -> None:
    merge(furnished, tiny.adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / ".git").exists()
    assert not (tmp_path / "merged" / ".cache").exists()


def test_the_bases_card_is_kept_beside_the_new_one(tiny: Tiny) -> None:
    assert (tiny.merged / "README.base.md").read_text() == CARD
    card = (tiny.merged / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| adapter | peft | CAUSAL_LM | 6 | 160 |" in card


def test_a_merge_of_a_merge_keeps_the_first_bases_card(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.merged, tiny.other, tmp_path / "second")
    manifest = json.loads((tmp_path / "second" / "ia3_export.json").read_text())
    assert [adapter["name"] for adapter in manifest["adapters"]] == ["other"]
    assert "README.base.md" in files_below(tmp_path / "second")


def test_a_link_inside_the_base_becomes_a_file(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.base, tmp_path / "base")
    (tmp_path / "base" / "alias.json").symlink_to("config.json")
    merge(tmp_path / "base", tiny.adapter, tmp_path / "merged")
    alias = tmp_path / "merged" / "alias.json"
    assert not alias.is_symlink()
    assert alias.read_bytes() == (tiny.base / "config.json").read_bytes()


def test_a_side_file_that_leads_out_of_the_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.base, tmp_path / "base")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "base" / "notes.txt").symlink_to(tmp_path / "secret")
    before = contents(tmp_path)
    ran = run(
        "merge", "--base", tmp_path / "base", "--adapter", tiny.adapter, "--output", tmp_path / "merged"
    )
    only_complaint(ran, 3, "notes.txt")
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------
# the hub's cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path) -> Path:
    """``HF_HOME`` with the base and the adapter, laid out as huggingface_hub does: links into ``blobs``."""
    home = tmp_path / "hf"
    for repo, folder in (("tiny/base", tiny.base), ("tiny/adapter", tiny.adapter)):
        cache = home / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = cache / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(COMMIT)
        for path in folder.iterdir():
            blob = cache / "blobs" / sha256(path)
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return home


def snapshot_of(home: Path, name: str) -> Path:
    return home / "hub" / f"models--tiny--{name}" / "snapshots" / COMMIT


def test_a_snapshot_of_the_hubs_cache_is_a_base_like_any_other(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    merge(snapshot_of(hub, "base"), snapshot_of(hub, "adapter"), tmp_path / "merged")
    assert same_weights(tmp_path / "merged", tiny.merged)
    assert set(files_below(tmp_path / "merged")) == set(files_below(tiny.merged))
    assert not [path for path in (tmp_path / "merged").rglob("*") if path.is_symlink()]


def test_links_lead_to_the_blobs_of_the_hubs_cache(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(hub, "base")
    merge(snapshot, tiny.adapter, tmp_path / "merged", "--link")
    for name in UNTOUCHED_SHARDS:
        assert (tmp_path / "merged" / name).stat().st_ino == (snapshot / name).stat().st_ino
        assert not (tmp_path / "merged" / name).is_symlink()


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"], ids=["main", "commit"])
def test_a_hub_id_is_found_in_the_cache_offline(tiny: Tiny, hub: Path, tmp_path: Path, revision: str) -> None:
    args = ("--base", f"tiny/base{revision}", "--adapter", f"tiny/adapter{revision}")
    offline = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    ran = run_process("merge", *args, "--output", tmp_path / "merged", env=offline)
    assert ran.code == 0, ran
    assert same_weights(tmp_path / "merged", tiny.merged)
    manifest = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())
    assert (manifest["base"]["id"], manifest["base"]["revision"]) == ("tiny/base", COMMIT)
    assert (manifest["adapters"][0]["id"], manifest["adapters"][0]["name"]) == ("tiny/adapter", "adapter")
    assert "base_model:\n- tiny/base\n" in (tmp_path / "merged" / "README.md").read_text()


def test_a_hub_id_that_the_cache_lacks_is_refused_offline(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    args = ("--base", "tiny/absent", "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    ran = run_process("merge", *args, env={"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"})
    only_complaint(ran, 3, "tiny/absent")
    assert not (tmp_path / "merged").exists()


def test_a_revision_that_the_cache_lacks_is_refused_offline(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    args = ("--base", "tiny/base@v2", "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    ran = run_process("merge", *args, env={"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"})
    only_complaint(ran, 3, "tiny/base@v2")


def test_a_local_folder_wins_over_a_hub_id(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny.base, tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    merge("org/base", tiny.adapter, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tiny.merged)
