"""Running the command line in tests: in this process or as one of its own, and looking at what it left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from ia3_export.cli import cli


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: int
    stdout: str
    stderr: str


def run(*args: str | Path, stdin: str = "") -> Ran:
    """Run the command line in this process, with `stdin` typed into it.

    An exception that is no exit is a failure of the test.
    """
    result = CliRunner().invoke(cli, [str(arg) for arg in args], input=stdin, prog_name="ia3-export")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def command_line(*args: str | Path) -> list[str]:
    """The same as the words of a process."""
    return [sys.executable, "-m", "ia3_export", *map(str, args)]


def run_process(
    *args: str | Path, env: Mapping[str, str] | None = None, umask: int = -1, stdin: str = ""
) -> Ran:
    """Run the command line as a process of its own, with `stdin` typed into it."""
    done = subprocess.run(
        command_line(*args),
        capture_output=True,
        text=True,
        input=stdin,
        env=os.environ | dict(env or {}),
        umask=umask,
        timeout=120,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def merge(base: Path | str, adapter: Path | str, output: Path, *more: str | Path) -> Ran:
    """``merge`` of one adapter, which must succeed."""
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", output, *more)
    assert ran.code == 0, ran
    return ran


def contents(folder: Path) -> dict[str, str]:
    """Everything below `folder`: digests of files, targets of links, and the folders themselves."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def only_complaint(ran: Ran, code: int, *mentions: str) -> None:
    """Assert that `ran` failed with `code`, an ``error:`` that holds all of `mentions`, and a ``hint:``."""
    assert ran.code == code, ran
    assert "Traceback" not in ran.stderr + ran.stdout
    assert ran.stdout == ""
    error, separator, hint = ran.stderr.partition("\nhint: ")
    assert error.startswith("error: "), ran.stderr
    assert separator, f"no hint: {ran.stderr}"
    assert hint.strip(), f"an empty hint: {ran.stderr}"
    for mention in mentions:
        assert mention in error, f"{mention!r} is not in {error!r}"


def split_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by the format's definition and nothing else."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_safetensors(file: Path, header: Mapping[str, Any] | str, data: bytes) -> None:
    """Write a safetensors file with whatever header, right or wrong."""
    text = header if isinstance(header, str) else json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)


def vary_adapter(source: Path, folder: Path, edit: Callable[[dict[str, Any]], None], **config: Any) -> Path:
    """A copy of a PEFT adapter with other tensors (numpy arrays by key) and values in its configuration."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    edit_json(folder / "adapter_config.json", **config)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file; None of Python's removes the key."""
    value = json.loads(file.read_text())
    for key, new in changes.items():
        if new is None:
            value.pop(key, None)
        else:
            value[key] = new
    file.write_text(json.dumps(value))
