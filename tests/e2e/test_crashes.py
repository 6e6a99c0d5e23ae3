"""A crash of ours is exit 70 with one line to report.

Odd files are refused in words; nothing in a name reaches the terminal raw.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ia3_export.errors import first_line, kind_and_line
from tests.e2e.command import Ran, edit_json, merge, only_complaint, run, vary_adapter
from tests.e2e.conftest import Tiny
from tests.support.exported import Exports

ODD: list[Any] = [7, True, "LlamaForCausalLM", {"a": 1}, [7], [None], [["LlamaForCausalLM"]], []]


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours in the middle of a merge."""

    def fail(*_: object) -> None:
        raise KeyError

    monkeypatch.setattr("ia3_export.commands.merge.lay_out", fail)


def crash(tiny: Tiny, output: Path, *more: str) -> Ran:
    return run("merge", "--base", tiny.base, "--adapter", tiny.adapter, "--output", output, *more)


@pytest.mark.usefixtures("crashing")
def test_a_crash_is_no_verdict(tiny: Tiny, tmp_path: Path) -> None:
    ran = crash(tiny, tmp_path / "merged")
    only_complaint(ran, 70, "crashed in ", ": KeyError")
    assert "please report this line" in ran.stderr
    assert not list(tmp_path.iterdir())
    ran = crash(tiny, tmp_path / "merged", "--json")
    assert ran.code == json.loads(ran.stdout)["exit_code"] == 70


@pytest.mark.usefixtures("crashing")
def test_the_traceback_of_a_crash_is_shown_on_demand(tiny: Tiny, tmp_path: Path) -> None:
    ran = crash(tiny, tmp_path / "merged", "--verbose")
    assert ran.code == 70
    assert "Traceback (most recent call last)" in ran.stderr
    assert "error: ia3-export" in ran.stderr


@pytest.mark.parametrize("architectures", ODD, ids=str)
def test_architectures_of_any_type(tiny: Tiny, architectures: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.single, tmp_path / "base"))
    edit_json(base / "config.json", architectures=architectures)
    merge(base, tiny.adapter, tmp_path / "merged")
    assert run("inspect", tiny.adapter, "--base", base).code == 0
    ran = run("onnx", "--model", base, "--output", tmp_path / "onnx", "--no-verify")
    assert ran.code == 3, ran
    if architectures:
        assert "architectures that are no list of class names" in ran.stderr


@pytest.mark.parametrize("error", [ValueError(), ValueError(""), ValueError("\n\n"), KeyError()])
def test_an_exception_without_text_is_named_by_its_class(error: Exception) -> None:
    assert first_line(error) == kind_and_line(error) == type(error).__name__


def test_an_exception_of_several_lines_gives_its_first() -> None:
    assert first_line(ValueError("\n  first  \nsecond")) == "first"
    assert kind_and_line(ValueError("first\nsecond")) == "ValueError: first"


# ------------------------------------------------------------------------------------------------ ONNX
# external data


def with_constant(source: Path, folder: Path, location: str) -> Path:
    """An exported folder whose graph has a constant that is kept in another file."""
    import onnx

    shutil.copytree(source, folder)
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    tensor = onnx.TensorProto(name="kept", data_type=onnx.TensorProto.FLOAT, dims=[64])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["kept"], value=tensor))
    path.write_bytes(model.SerializeToString())
    return folder


@pytest.mark.parametrize(
    ("location", "words"), [("gone.bin", "is missing"), ("../../secret.bin", "outside its folder")]
)
def test_constants_with_external_data(exports: Exports, location: str, words: str, tmp_path: Path) -> None:
    base, adapter = exports.written("vit")
    (tmp_path / "secret.bin").write_bytes(bytes(256))
    broken = with_constant(exports("vit").folder, tmp_path / "broken", location)
    ran = run("verify", "--base", base, "--adapter", adapter, "--onnx", broken, "--weights-only")
    only_complaint(ran, 3, words)


# ----------------------------------------------------------------------------------------------
# names in the terminal

ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e\n::error::forged"


def test_a_name_cannot_steer_the_terminal(tiny: Tiny, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors[f"base_model.model.{ESCAPE}.ia3_l"] = tensors.pop(
            "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
        )

    adapter = vary_adapter(tiny.adapter, tmp_path / "odd", rename)
    for args in (
        ("inspect", adapter),
        ("inspect", adapter, "--base", tiny.base),
        ("inspect", adapter, "-v", "--json"),
        ("merge", "--base", tiny.base, "--adapter", adapter, "--output", tmp_path / "merged"),
        ("merge", "--base", tiny.base, "--adapter", adapter, "--output", tmp_path / ESCAPE.replace("/", "")),
        ("inspect", tmp_path / ESCAPE),
        ("inspect", adapter, tiny.adapter, "--compare"),
    ):
        ran = run(*args)
        for text in (ran.stderr, "" if "--json" in args else ran.stdout):
            assert not any(letter in text for letter in "\x1b\x07\u202e"), args
            assert not any(line.lstrip().startswith("::") for line in text.splitlines()), args
        shown = ran.stderr if "--json" in args or ran.code else ran.stdout
        assert "\\x1b]0;owned\\x07" in shown, args


def test_a_folder_that_is_called_like_a_command_of_a_runner(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = merge(tiny.base, tiny.adapter, Path("::error ##[x]::"))
    assert "\\::error \\##[x]::: 6 tensors changed" in ran.stdout


@pytest.mark.parametrize("command", ["merge", "onnx", "convert"])
def test_an_output_that_cannot_be_called_so_is_an_output_error(
    tiny: Tiny, command: str, tmp_path: Path
) -> None:
    sources: dict[str, tuple[str | Path, ...]] = {
        "merge": ("--base", tiny.base, "--adapter", tiny.adapter),
        "onnx": ("--model", tiny.base),
        "convert": (tiny.adapter,),
    }
    (tmp_path / "file").write_bytes(b"")
    for output in (tmp_path / ("x" * 300), tmp_path / "file" / "out"):
        only_complaint(run(command, *sources[command], "--output", output), 4, "cannot write")


def test_bytes_that_are_a_protobuf_by_chance_are_no_graph(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"xx")
    ran = run("verify", "--base", tiny.base, "--adapter", tiny.adapter, "--onnx", file)
    only_complaint(ran, 3, str(file), "no graph with outputs")
