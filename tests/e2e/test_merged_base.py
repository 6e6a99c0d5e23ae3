"""A merged folder as base: the same adapter, known by its vectors, is not folded into it a second time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.command import contents, edit_json, merge, only_complaint, run
from tests.e2e.conftest import Tiny


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    """A merge that is called as its base is."""
    return Path(shutil.copytree(tiny.merged, tmp_path / "base"))


def other_file(tiny: Tiny, kind: str, folder: Path) -> Path:
    """The adapter once more, in another file."""
    renamed = folder / "renamed"
    if kind == "renamed":
        return Path(shutil.copytree(tiny.adapter, renamed))
    assert run("convert", tiny.adapter, "--base", tiny.base, "--output", renamed).code == 0
    return renamed


@pytest.mark.parametrize("kind", ["renamed", "converted"])
def test_the_same_vectors_are_refused_whatever_their_file(
    tiny: Tiny, base: Path, kind: str, tmp_path: Path
) -> None:
    adapter = other_file(tiny, kind, tmp_path)
    before = contents(tmp_path)
    for args in (
        ("merge", "--output", tmp_path / "twice"),
        ("merge", "--output-per-adapter", tmp_path / "each"),
        ("merge", "--output", tmp_path / "twice", "--adapter", tiny.other),
        ("verify",),
        ("verify", "--merged", tiny.merged),
    ):
        ran = run(args[0], "--base", base, "--adapter", adapter, *args[1:])
        only_complaint(ran, 3, f"{base} already holds the vectors of renamed", "adapter was folded into it")
    assert contents(tmp_path) == before
    ran = run("inspect", adapter, "--base", base)
    assert ran.code == 0
    assert "refused: " in ran.stdout


def test_a_merge_of_before_this_record_is_known_by_name_and_size(
    tiny: Tiny, base: Path, tmp_path: Path
) -> None:
    edit_json(base / "ia3_export.json", folded=None)
    ran = run("merge", "--base", base, "--adapter", tiny.adapter, "--output", tmp_path / "twice")
    only_complaint(ran, 3, "already holds the vectors of adapter", "of the same name and size")


def test_another_adapter_is_folded_on_top_and_said(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    ran = merge(base, tiny.other, tmp_path / "second")
    assert "already holds adapter: what is folded now acts on top of it" in ran.stdout
    manifest = json.loads((tmp_path / "second" / "ia3_export.json").read_text())
    assert [row["name"] for row in manifest["folded"]] == ["adapter", "other"]
    for first in (tiny.adapter, tiny.other):
        ran = run("merge", "--base", tmp_path / "second", "--adapter", first, "--output", tmp_path / "third")
        only_complaint(ran, 3, "already holds")
    # as one sequential product
    merge(tiny.base, tiny.adapter, tmp_path / "at-once", "--adapter", tiny.other)
    for file in (tmp_path / "at-once").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_an_adapter_that_was_divided_out_may_be_folded_again(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    merge(tmp_path / "merged", tiny.other, tmp_path / "both")
    unmerge = ("unmerge", "--model", tmp_path / "both", "--adapter", tiny.other, "--output", tmp_path / "one")
    assert run(*unmerge).code == 0
    merge(tmp_path / "one", tiny.other, tmp_path / "again")
    ran = run("merge", "--base", tmp_path / "one", "--adapter", tiny.adapter, "--output", tmp_path / "no")
    only_complaint(ran, 3, "already holds the vectors of adapter")


def test_a_lone_file_is_known_by_the_manifest_beside_it(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    args = ("--adapter", tiny.adapter, "--output", tmp_path / "no")
    ran = run("merge", "--base", tmp_path / "merged" / "model.safetensors", *args)
    only_complaint(ran, 3, "already holds the vectors of adapter")
    shutil.copy(tiny.single / "model.safetensors", tmp_path / "merged" / "plain.safetensors")
    merge(tmp_path / "merged" / "plain.safetensors", tiny.adapter, tmp_path / "yes")


@pytest.mark.parametrize(
    "junk",
    ["[]", "{", '{"schema": 1, "folded": 7}', '{"schema": "ia3-export/manifest/1", "folded": [3, {}]}'],
)
def test_a_manifest_that_cannot_be_read_says_nothing(
    tiny: Tiny, base: Path, junk: str, tmp_path: Path
) -> None:
    (base / "ia3_export.json").write_text(junk)
    merge(base, tiny.adapter, tmp_path / "merged")
