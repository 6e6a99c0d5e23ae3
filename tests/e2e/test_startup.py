"""What a command imports.

Every case runs in a process of its own, so that this one's imports do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Tiny

HEAVY = ("torch", "transformers", "peft", "onnx", "onnxruntime", "optimum", "huggingface_hub")
PROGRAM = """
import contextlib, io, json, sys
from ia3_export.cli import cli
with contextlib.redirect_stdout(io.StringIO()):
    cli(sys.argv[1:], prog_name="ia3-export", standalone_mode=False)
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(*args: str | Path) -> set[str]:
    """Top-level names in ``sys.modules`` after the command line has run with `args`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, args)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "command",
    [(), ("merge",), ("inspect",), ("patch",), ("apply",)],
    ids=lambda words: " ".join(words) or "group",
)
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    assert modules_after(*command, "--help").isdisjoint((*HEAVY, "numpy"))


def test_inspecting_an_adapter_imports_neither_torch_nor_transformers(tiny: Tiny) -> None:
    assert modules_after("inspect", tiny.adapter).isdisjoint(HEAVY)


def test_planning_by_plain_names_imports_neither_torch_nor_transformers(tiny: Tiny) -> None:
    assert modules_after("inspect", tiny.adapter, "--base", tiny.base).isdisjoint(HEAVY)


def test_merging_by_plain_names_imports_neither_torch_nor_transformers(tiny: Tiny, tmp_path: Path) -> None:
    args = ("merge", "--base", tiny.base, "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    assert modules_after(*args).isdisjoint(HEAVY)
    assert (tmp_path / "merged" / "config.json").is_file()


def test_an_adapter_of_torch_save_needs_no_torch(tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    (tmp_path / "adapter").mkdir()
    vectors = load_file(tiny.adapter / "adapter_model.safetensors")
    torch.save(vectors, tmp_path / "adapter" / "adapter_model.bin")
    config = (tiny.adapter / "adapter_config.json").read_bytes()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(config)
    for adapter in (tiny.adapter, tmp_path / "adapter"):
        args = (
            "merge",
            "--base",
            tiny.base,
            "--adapter",
            adapter,
            "--output",
            tmp_path / adapter.parent.name,
        )
        assert modules_after(*args).isdisjoint(HEAVY)
    first, second = (tmp_path / folder.parent.name for folder in (tiny.adapter, tmp_path / "adapter"))
    for file in first.glob("*.safetensors"):
        assert (second / file.name).read_bytes() == file.read_bytes()


def test_the_class_is_asked_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would pass with a broken probe; the first run shows that it sees an import."""
    from safetensors.torch import load_file, save_file

    keys = load_file(tiny.adapter / "adapter_model.safetensors")
    (tmp_path / "adapter").mkdir()
    short = {name.replace("base_model.model.model.", "base_model.model."): v for name, v in keys.items()}
    save_file(short, tmp_path / "adapter" / "adapter_model.safetensors")
    config = (tiny.adapter / "adapter_config.json").read_bytes()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(config)
    monkeypatch.setenv("IA3_EXPORT_CACHE", str(tmp_path / "cache"))
    merge = ("merge", "--base", tiny.base, "--adapter", tmp_path / "adapter", "--output")
    assert modules_after(*merge, tmp_path / "first") >= {"torch", "transformers"}
    assert modules_after(*merge, tmp_path / "second").isdisjoint(HEAVY)
    for file in (tmp_path / "first").glob("*.safetensors"):
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()


def test_a_command_that_needs_more_than_the_core_says_what_to_install(tiny: Tiny, tmp_path: Path) -> None:
    without = "import sys; sys.modules.update(torch=None, transformers=None, peft=None, onnx=None); "
    sources = ("--base", tiny.base, "--adapter", tiny.adapter)
    for given in (("onnx", *sources, "--output", tmp_path / "out"), ("verify", *sources)):
        ran = subprocess.run(
            [sys.executable, "-c", f"{without}from ia3_export.cli import main; main()", *map(str, given)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 3, ran.stderr
        assert "is not installed" in ran.stderr and "ia3-export[cpu]" in ran.stderr
        assert not (tmp_path / "out").exists()
