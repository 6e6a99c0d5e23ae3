"""Outputs that cannot be written and options that contradict each other.

The exit code, and nothing written.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ia3_export.checkpoint import ranges
from tests.e2e.command import (
    contents,
    join_safetensors,
    only_complaint,
    run,
    run_process,
    split_safetensors,
)
from tests.e2e.conftest import Tiny
from tests.support.bad_input import (
    DOWN_PROJ,
    Case,
    Malicious,
    set_vector,
)

# ------------------------------------------------------------------------------- outputs that
# cannot be written


def test_an_output_inside_the_base_is_refused(case: Case) -> None:
    case.refuses(3, str(case.base), output=case.base / "merged")


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_an_output_that_is_the_base_is_refused(case: Case, more: tuple[str, ...]) -> None:
    case.refuses(3, str(case.base), output=case.base, args=more)


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_an_output_that_is_the_adapter_is_refused(case: Case, more: tuple[str, ...]) -> None:
    case.refuses(3, str(case.adapter), output=case.adapter, args=more)


def test_an_output_that_holds_the_inputs_is_refused_even_with_overwrite(case: Case) -> None:
    case.refuses(3, str(case.folder), output=case.folder, args=("--overwrite",))


def test_an_output_that_leads_into_the_base_by_a_link_is_refused(case: Case) -> None:
    (case.folder / "alias").symlink_to(case.base)
    case.refuses(3, "alias", output=case.folder / "alias" / "merged")


def test_an_output_that_exists_is_refused(case: Case) -> None:
    case.output.mkdir()
    (case.output / "precious.txt").write_text("mine")
    case.refuses(4, str(case.output), "exists")


def test_overwrite_replaces_an_output_that_exists(case: Case, tiny: Tiny) -> None:
    shutil.copytree(tiny.merged, case.output)
    (case.output / "README.md").write_text("old")
    (case.output / ".DS_Store").write_text("of a file manager")
    assert case.merge("--overwrite").code == 0
    assert contents(case.output) == contents(tiny.merged)
    assert {path.name for path in case.folder.iterdir()} == {"base", "adapter", "merged"}


def test_overwrite_replaces_no_folder_that_is_not_ours(case: Case) -> None:
    case.output.mkdir()
    (case.output / "thesis.tex").write_text("mine")
    case.refuses(4, str(case.output), "no folder that ia3-export wrote", args=("--overwrite",))
    (case.output / "ia3_export.json").write_text('{"schema": "another/tool"}')
    case.refuses(4, str(case.output), "no folder that ia3-export wrote", args=("--overwrite",))


@pytest.mark.parametrize("name", ["thesis.tex", "notes/day-1.txt", "model.safetensors.bak"])
def test_overwrite_replaces_no_file_that_the_manifest_does_not_list(
    case: Case, tiny: Tiny, name: str
) -> None:
    shutil.copytree(tiny.merged, case.output)
    (case.output / name).parent.mkdir(exist_ok=True)
    (case.output / name).write_text("mine")
    case.refuses(4, str(case.output), name, args=("--overwrite",))


def test_an_output_per_adapter_replaces_no_folder_that_is_not_ours(case: Case) -> None:
    (case.output / "adapter").mkdir(parents=True)
    (case.output / "adapter" / "thesis.tex").write_text("mine")
    words = ("merge", "--base", case.base, "--adapter", case.adapter, "--output-per-adapter", case.output)
    only_complaint(case.run(*words, "--overwrite"), 4, "no folder that ia3-export wrote")
    assert (case.output / "adapter" / "thesis.tex").read_text() == "mine"


def test_an_empty_folder_may_become_the_output(case: Case, tiny: Tiny) -> None:
    case.output.mkdir()
    assert case.merge().code == 0
    assert contents(case.output) == contents(tiny.merged)


def test_a_refused_overwrite_keeps_the_old_output(case: Case) -> None:
    case.output.mkdir()
    (case.output / "precious.txt").write_text("mine")
    set_vector(case, DOWN_PROJ, 5, float("nan"))
    case.refuses(3, DOWN_PROJ, args=("--overwrite",))


def test_an_output_that_is_a_file_is_refused(case: Case) -> None:
    case.output.write_text("mine")
    case.refuses(4, str(case.output), args=("--overwrite",))


def test_a_file_in_place_of_the_outputs_parent_is_refused(case: Case) -> None:
    (case.folder / "file").write_text("mine")
    case.refuses(4, str(case.folder / "file"), output=case.folder / "file" / "merged")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    done = []

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "ia3-export-test", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        done.append(place)
        return place

    yield mount
    for path in done:
        subprocess.run(["umount", str(path)], check=True)


def test_a_parent_that_is_not_writable_is_named(case: Case, mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=1m,ro")
    case.refuses(4, str(disk), output=disk / "merged")


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    case: Case, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=16k")
    case.refuses(4, str(disk), "bytes", output=disk / "merged")


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    case: Case, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=1m,nr_inodes=7")
    case.refuses(4, str(disk), "No space left", output=disk / "merged")


@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_is_full_at_a_write_leaves_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls = []
    write = ranges._pwrite

    def full(descriptor: int, data: Any, position: int) -> int:
        calls.append(position)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, position)

    monkeypatch.setattr(ranges, "_pwrite", full)
    case.refuses(4, str(case.output), "No space left")


# ------------------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        ("merge --adapter {adapter} --output {out}", "--base"),
        ("merge --base {base} --output {out}", "--adapter"),
        ("merge --base {base} --adapter {adapter}", "--output"),
        (
            "merge --base {base} --adapter {adapter} --output {out} --output-per-adapter {out}",
            "--output-per-adapter",
        ),
        ("merge --base {base} --adapter {adapter} --output {out} --dtype float8", "float8"),
        ("merge --base {base} --adapter {adapter} --output {out} --shard-size five", "5GB"),
        ("merge --base {base} --adapter {adapter} --output {out} --shard-size -5GB", "5GB"),
        ("merge --base {base} --adapter {adapter} --output {out} --combine linear --weights a,b", "0.7,0.3"),
        ("merge --base {base} --adapter {adapter} --output {out} --frobnicate", "--frobnicate"),
        ("merge --base {base} --adapter {adapter} --output-per-adapter {out} --combine linear", "--combine"),
        ("inspect", "ADAPTER"),
        ("frobnicate", "frobnicate"),
    ],
)
def test_wrong_options_exit_with_2_and_name_the_option(case: Case, words: str, mention: str) -> None:
    before = contents(case.folder)
    ran = run(*words.format(base=case.base, adapter=case.adapter, out=case.output).split())
    assert ran.code == 2
    assert mention in ran.stderr.partition("error: ")[2].partition("hint: ")[0]
    assert "--help" in ran.stderr.partition("hint: ")[2]
    assert ran.stdout == ""
    assert contents(case.folder) == before


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ("--combine linear", "one weight"),
        ("--combine linear --weights 0.5,0.5", "one weight"),
        ("--combine delta --weights 0.1,0.2,0.3", "one weight"),
        ("--weights 0.5", "--weights"),
        ("--combine product --weights 0.5", "--weights"),
        ("--combine linear --weights nan", "finite"),
        ("--combine delta --weights inf", "finite"),
    ],
)
def test_weights_that_do_not_fit_exit_with_2(case: Case, options: str, mention: str) -> None:
    case.refuses(2, mention, args=tuple(options.split()))


@pytest.mark.parametrize(
    "spelling", ["{adapter}", "{adapter}/", "{adapter}/../adapter", "{adapter}/adapter_model.safetensors"]
)
def test_the_same_adapter_twice_exits_with_2(case: Case, spelling: str) -> None:
    case.refuses(2, "twice", args=("--adapter", spelling.format(adapter=case.adapter)))


def test_two_adapters_of_one_name_cannot_have_an_output_each(case: Case) -> None:
    shutil.copytree(case.adapter, case.folder / "elsewhere" / "adapter")
    before = contents(case.folder)
    ran = run(
        "merge",
        "--base",
        case.base,
        "--adapter",
        case.adapter,
        "--adapter",
        case.folder / "elsewhere" / "adapter",
        "--output-per-adapter",
        case.output,
    )
    only_complaint(ran, 2, "adapter")
    assert contents(case.folder) == before


# --------------------------------------------------------------------------------------- through
# a real process


def test_a_process_prints_error_and_hint_and_exits_with_3(case: Case) -> None:
    set_vector(case, DOWN_PROJ, 5, float("nan"))
    Case(case.folder, run_process).refuses(3, DOWN_PROJ)


def test_a_process_exits_with_4_when_the_output_exists(case: Case) -> None:
    case.output.mkdir()
    (case.output / "precious.txt").write_text("mine")
    Case(case.folder, run_process).refuses(4, str(case.output))


def test_a_process_exits_with_2_for_weights_that_do_not_fit(case: Case) -> None:
    Case(case.folder, run_process).refuses(2, "--weights", args=("--weights", "0.5"))


def test_no_warning_of_torch_comes_before_the_error(case: Case) -> None:
    for file in case.base.glob("model*"):
        file.unlink()
    (case.base / "pytorch_model.bin").write_bytes(
        pickle.dumps(Malicious(case.folder / "was-run"), protocol=4)
    )
    Case(case.folder, run_process).refuses(3, "pytorch_model.bin", "not executed")


def test_a_tensor_name_that_no_encoding_can_write_is_refused(case: Case, tiny: Tiny) -> None:
    """JSON can spell half a surrogate pair; with --dtype the name would go into the manifest."""
    shutil.rmtree(case.base)
    shutil.copytree(tiny.single, case.base)
    shard = case.base / "model.safetensors"
    header, data = split_safetensors(shard)
    header["lm_head.\ud800"] = header.pop("lm_head.weight")
    join_safetensors(shard, header, data)
    Case(case.folder, run_process).refuses(3, shard.name, args=("--dtype", "float16"))


def test_a_refusal_with_json_is_one_document_on_stdout(case: Case) -> None:
    set_vector(case, DOWN_PROJ, 5, float("nan"))
    ran = case.merge("--json")
    document = json.loads(ran.stdout)
    assert ran.code == document["exit_code"] == 3
    assert DOWN_PROJ in document["error"]
    assert document["hint"]


def test_inspect_reports_refusals_as_findings(case: Case) -> None:
    set_vector(case, DOWN_PROJ, 5, float("nan"))
    ran = run("inspect", case.adapter, "--base", case.base, "--json")
    refusals = json.loads(ran.stdout)["plan"]["refusals"]
    assert ran.code == 0
    assert DOWN_PROJ in refusals[0]["error"]
