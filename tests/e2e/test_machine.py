"""What the machine refuses is said of the right file.

Inputs that cannot be read, outputs and temporary folders that are full.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ia3_export.checkpoint import ranges
from ia3_export.errors import InputError
from ia3_export.writing.execute import Progress
from tests.e2e.command import Ran, command_line, only_complaint, run
from tests.e2e.conftest import Tiny


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.base, tmp_path / "base"))


def limited(*args: str | Path, size: int, **environ: str) -> Ran:
    """Run the command line where no file may grow beyond `size` bytes."""

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(
        command_line(*args),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environ,
        preexec_fn=limit,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("plain", ["0", "1"])
def test_a_disk_that_cannot_be_read_is_the_inputs_fault(
    tiny: Tiny, base: Path, monkeypatch: pytest.MonkeyPatch, plain: str, tmp_path: Path
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setenv("IA3_EXPORT_PLAIN_IO", plain)
    monkeypatch.setattr(ranges, "_preadv", broken)
    monkeypatch.setattr(os, "copy_file_range", broken)
    ran = run("merge", "--base", base, "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    only_complaint(ran, 3, str(base), "cannot be read", os.strerror(errno.EIO))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_side_file_that_goes_away_meanwhile_is_the_inputs_fault(
    tiny: Tiny, base: Path, tmp_path: Path
) -> None:
    from ia3_export import merge

    def remove(_: Progress) -> None:
        (base / "tokenizer.json").unlink(missing_ok=True)

    with pytest.raises(InputError, match=r"cannot read .*tokenizer\.json") as caught:
        merge(base, [tiny.adapter], tmp_path / "merged", on_progress=remove)
    assert caught.value.exit_code == 3
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["", "tokenizer.json", "README.md"])
def test_a_base_that_may_not_be_read_is_the_inputs_fault(
    tiny: Tiny, base: Path, name: str, tmp_path: Path
) -> None:
    (base / name).chmod(0)
    ran = run("merge", "--base", base, "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    (base / name).chmod(0o755)
    only_complaint(ran, 3, str(base / name))


def test_a_limit_of_file_sizes_is_the_outputs_fault(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    ran = limited("merge", "--base", base, "--adapter", tiny.adapter, "--output", output, size=4096)
    only_complaint(ran, 4, f"cannot write {output}", os.strerror(errno.EFBIG))
    assert "--output" in ran.stderr


def test_a_temporary_merge_without_space_asks_for_another_tmpdir(
    tiny: Tiny, base: Path, tmp_path: Path
) -> None:
    for command in (("verify",), ("onnx", "--output", tmp_path / "onnx", "--no-verify")):
        ran = limited(command[0], "--base", base, "--adapter", tiny.adapter, *command[1:], size=4096)
        assert ran.code == 4, ran
        assert "set TMPDIR to a folder on another disk" in ran.stderr
        assert "--output" not in ran.stderr


def test_no_temporary_folder_at_all_is_said(tiny: Tiny, base: Path) -> None:
    ran = limited("verify", "--base", base, "--adapter", tiny.adapter, size=0)
    assert ran.code == 4, ran
    assert "temporary folder" in ran.stderr
    assert "TMPDIR" in ran.stderr
