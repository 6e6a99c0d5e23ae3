"""Patches that are cut short, contradict themselves, or would lead out of the folder."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ia3_export
from ia3_export.errors import DamagedFile, IA3ExportError, Refused, Unsupported
from ia3_export.patching.format import read_patch
from tests.e2e.command import contents
from tests.support.patches import edit_patch, write_patch

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_patch(tmp_path_factory.mktemp("patch"))


@pytest.fixture
def copy(made: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the patch to damage, and of the folder."""
    shutil.copytree(made[0], tmp_path / "base")
    return Path(shutil.copy(made[2], tmp_path / "bad.ia3patch")), tmp_path / "base"


def file_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in document["files"] if row["path"] == name)


def piece_of(document: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(piece for row in document["files"] for piece in row["pieces"] if piece["kind"] == kind)


def test_what_is_read_is_what_was_written(made: tuple[Path, Path, Path]) -> None:
    base, merged, path = made
    patch = read_patch(path)
    assert set(patch.before) == {file.relative_to(base).as_posix() for file in base.rglob("*.*")}
    assert set(patch.after) == {file.relative_to(merged).as_posix() for file in merged.rglob("*.*")}
    assert [state.path for state in patch.removed] == ["gone.txt", "old-name.txt"]
    assert len(patch.vectors()) == 2
    assert path.stat().st_size < 4000


def test_the_same_folders_give_the_same_bytes(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    ia3_export.patch(made[0], made[1], tmp_path / "again.ia3patch")
    assert (tmp_path / "again.ia3patch").read_bytes() == made[2].read_bytes()


def test_a_patch_cut_short_anywhere_is_refused(copy: tuple[Path, Path]) -> None:
    path, base = copy
    whole, before = path.read_bytes(), contents(base)
    for size in range(0, len(whole), 61):
        path.write_bytes(whole[:size])
        with pytest.raises(IA3ExportError) as caught:
            ia3_export.apply(path, base)
        assert caught.value.exit_code == 3 and caught.value.hint
    assert contents(base) == before


def test_a_patch_with_a_changed_byte_never_changes_the_folder(copy: tuple[Path, Path]) -> None:
    path, base = copy
    whole, before = path.read_bytes(), contents(base)
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.integers(0, 8)
        path.write_bytes(damaged)
        with pytest.raises(IA3ExportError) as caught:
            ia3_export.apply(path, base)
        assert caught.value.exit_code == 3, caught.value
        assert contents(base) == before


@pytest.mark.parametrize(
    "name",
    ["../out", "/out", "a/../b", "a//b", "./a", "a\\b", "C:out", "a\x00b", "a/", "", ".", "..", "b. "],
)  # fmt: skip
def test_a_path_out_of_the_folder_is_refused(copy: tuple[Path, Path], name: str) -> None:
    path, base = copy
    before = contents(base.parent)
    edit_patch(path, lambda document: file_of(document, "new.json").update(path=name))
    after = contents(base.parent)
    with pytest.raises(DamagedFile) as caught:
        ia3_export.apply(path, base)
    assert "no plain path" in str(caught.value)
    assert contents(base.parent) == after and len(after) == len(before)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: piece_of(d, "copy").update(offset=10**6),
        lambda d: piece_of(d, "copy").update(offset=-1),
        lambda d: piece_of(d, "copy").update(length=0),
        lambda d: piece_of(d, "copy").update(length=True),
        lambda d: piece_of(d, "copy").update(length=2**70),
        lambda d: piece_of(d, "copy").pop("offset"),
        lambda d: piece_of(d, "fold").update(dtype="I8"),
        lambda d: piece_of(d, "fold").update(to="BF16"),
        lambda d: piece_of(d, "fold").update(to="F64", stride=8),
        lambda d: piece_of(d, "fold").update(stride=0),
        lambda d: piece_of(d, "fold").update(stride=2),
        lambda d: piece_of(d, "fold").update(stride=10**9),
        lambda d: piece_of(d, "fold").update(at=[]),
        lambda d: piece_of(d, "fold").update(at=[1]),
        lambda d: piece_of(d, "fold").update(at=[0, 0]),
        lambda d: piece_of(d, "fold").update(at="0"),
        lambda d: piece_of(d, "fold").update(inner=0),
        lambda d: piece_of(d, "fold").update(vector="r0"),
        lambda d: piece_of(d, "fold").update(vector="v99"),
        lambda d: piece_of(d, "zlib").update(tensor="v0"),
        lambda d: piece_of(d, "zlib").update(tensor=None),
        lambda d: piece_of(d, "zlib").update(kind="raw"),
        lambda d: d["files"][0]["to"].update(size=10**12),
        lambda d: d["files"][0]["to"].update(sha256="0"),
        lambda d: d["files"].append(d["files"][0]),
        lambda d: d["kept"].append({"path": "config.json/x", "size": 1, "sha256": "0" * 64}),
        lambda d: d["kept"].append({"path": "CONFIG.json", "size": 1, "sha256": "0" * 64}),
        lambda d: d.update(files={}),
        lambda d: d.update(kept=[1]),
        lambda d: d.pop("tool"),
        lambda d: d["removed"].pop(),
        lambda d: d["removed"].append(d["kept"][0]),
        lambda d: file_of(d, "README.md").update({"from": None, "pieces": []}),
    ],
)
def test_what_contradicts_itself_is_damaged(copy: tuple[Path, Path], edit: Edit) -> None:
    path, base = copy
    before = contents(base)
    edit_patch(path, edit)
    with pytest.raises(DamagedFile) as caught:
        ia3_export.apply(path, base)
    assert str(path) in str(caught.value) and caught.value.hint
    assert contents(base) == before


@pytest.mark.parametrize(
    "edit",
    [lambda d: d.update(schema="ia3-export/patch/2"), lambda d: piece_of(d, "copy").update(kind="lz4")],
)
def test_another_version_is_said_to_be_one(copy: tuple[Path, Path], edit: Edit) -> None:
    path, base = copy
    edit_patch(path, edit)
    with pytest.raises(Unsupported):
        ia3_export.apply(path, base)


def test_a_zlib_stream_never_gives_more_than_the_patch_says(copy: tuple[Path, Path], tmp_path: Path) -> None:
    """A bomb of 64 MB in 64 kB."""
    from ia3_export.checkpoint.header import write_header
    from ia3_export.patching.format import FileChange, FileState, Stored, to_metadata

    bomb = zlib.compress(bytes(64 << 20), 9)
    for length in (1000, (64 << 20) + 1):
        change = FileChange(None, FileState("bomb", length, "0" * 64), (Stored("r0", length, True),))
        prefix, _ = write_header([("r0", "U8", (len(bomb),))], to_metadata("t", [change], [], []))
        copy[0].write_bytes(prefix + bomb)
        with pytest.raises(DamagedFile, match="does not decompress"):
            ia3_export.apply(copy[0], copy[1], output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_would_be_carried_is_limited_and_named(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(made[1], other)
    tensors = load_file(other / "model.safetensors")
    tensors["head"] = np.random.default_rng(5).standard_normal((64, 48)).astype("<f4")
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(Refused, match=r"head in model.safetensors") as caught:
        ia3_export.patch(made[0], other, tmp_path / "p", max_carried=8000)
    assert "--max-carried" in caught.value.hint
    assert not list(tmp_path.glob("*p*"))
    ia3_export.patch(made[0], other, tmp_path / "p", max_carried=20000)
    ia3_export.apply(tmp_path / "p", made[0], output=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(other)
