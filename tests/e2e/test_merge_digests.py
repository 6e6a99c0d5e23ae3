"""``ia3-export merge`` writes the same bytes every time, and digests of them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.e2e.command import contents, merge, run, run_process
from tests.e2e.conftest import Tiny
from tests.support.merged import (
    FOLDED,
    files_below,
    same_weights,
    sha256,
)
from tests.support.tensors import read_folder

# -----------------------------------------------------------------------------------------------
# reproducible bytes


def test_two_runs_give_the_same_bytes_whatever_the_folders_are_called(tiny: Tiny, tmp_path: Path) -> None:
    elsewhere = tmp_path / "some where" / "else"
    shutil.copytree(tiny.base, elsewhere / "base")
    shutil.copytree(tiny.adapter, elsewhere / "adapter")
    merge(elsewhere / "base", elsewhere / "adapter", tmp_path / "another-name")
    assert contents(tmp_path / "another-name") == contents(tiny.merged)


def test_two_sharded_casts_in_processes_of_their_own_give_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    """Processes differ in the order of their sets and tables of strings."""
    for name, seed in (("one", "1"), ("two", "2")):
        ran = run_process(
            "merge",
            "--base",
            tiny.base,
            "--adapter",
            tiny.other,
            "--output",
            tmp_path / name,
            "--dtype",
            "float32",
            "--shard-size",
            "20KB",
            env={"PYTHONHASHSEED": seed},
        )
        assert ran.code == 0, ran
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_plain_reads_and_writes_give_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IA3_EXPORT_PLAIN_IO", "1")
    merge(tiny.base, tiny.adapter, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tiny.merged)


def test_no_text_of_the_output_holds_a_path_or_a_time(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    ran = run(
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        tiny.adapter,
        "--adapter",
        tiny.other,
        "--output",
        output,
        "--digests",
        "full",
        "--dtype",
        "float32",
    )
    assert ran.code == 0, ran
    texts = {path: path.read_text() for path in output.iterdir() if path.suffix in (".json", ".md")}
    assert {path.name for path in texts} >= {"ia3_export.json", "README.md", "config.json"}
    for path, text in texts.items():
        for machine in (tiny.base.parent, tmp_path, Path.home(), Path.cwd(), "/tmp"):
            assert str(machine) not in text, path.name
        assert not re.search(r"\d{4}-\d\d-\d\d|\b\d\d:\d\d:\d\d\b|\b1[6-9]\d{8}\b", text), path.name


# ----------------------------------------------------------------------------------------------------------
# digests


def test_the_manifest_holds_size_and_digest_of_every_other_file(tiny: Tiny) -> None:
    files = json.loads((tiny.merged / "ia3_export.json").read_text())["files"]
    found = {
        name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in files_below(tiny.merged).items()
        if name != "ia3_export.json"
    }
    assert files == found


def test_the_manifest_holds_the_content_digest_of_every_changed_tensor(tiny: Tiny) -> None:
    """SHA-256 over dtype and shape, as in ``BF16[16,32]``, and then the tensor's bytes."""
    import torch

    changes = json.loads((tiny.merged / "ia3_export.json").read_text())["changes"]
    expected = {}
    for name in FOLDED:
        tensor = read_folder(tiny.merged)[name]
        head = f"BF16[{','.join(map(str, tensor.shape))}]".encode()
        expected[name] = hashlib.sha256(head + tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert {row["tensor"]: row["sha256"] for row in changes} == expected


def test_full_digests_cover_the_inputs(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--digests", "full")
    manifest = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())
    base = {
        name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in files_below(tiny.base).items()
    }
    assert manifest["base"]["files"] == base
    assert manifest["adapters"][0]["files"] == {
        name: {"size": (tiny.adapter / name).stat().st_size, "sha256": sha256(tiny.adapter / name)}
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }


def test_without_digests_the_manifest_holds_sizes_alone(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--digests", "none")
    text = (tmp_path / "merged" / "ia3_export.json").read_text()
    assert "sha256" not in text
    assert all(set(entry) == {"size"} for entry in json.loads(text)["files"].values())
    assert same_weights(tmp_path / "merged", tiny.merged)


def test_digests_do_not_cover_inputs_by_default(tiny: Tiny) -> None:
    manifest = json.loads((tiny.merged / "ia3_export.json").read_text())
    assert "files" not in manifest["base"]
    assert "files" not in manifest["adapters"][0]


def test_zeros_that_the_fold_made_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    vectors = load_file(file)
    vectors["base_model.model.model.layers.0.self_attn.k_proj.ia3_l"][3] = 0
    save_file(vectors, file, metadata={"format": "pt"})
    merge(tiny.base, tmp_path / "adapter", tmp_path / "merged")
    changes = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())["changes"]
    flushed = {row["tensor"]: row["flushed_to_zero"] for row in changes if row["flushed_to_zero"]}
    assert flushed == {"model.layers.0.self_attn.k_proj.weight": 32}
