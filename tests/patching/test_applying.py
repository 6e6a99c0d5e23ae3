"""Applying a patch where something is wrong, and where the process is killed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ia3_export
from ia3_export.errors import InputError, NotFound, OutputError, Refused
from ia3_export.patching import apply as applying
from ia3_export.patching import in_place
from tests.e2e.command import contents
from tests.support.patches import edit_patch, write_patch

Made = tuple[Path, Path, Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Base, merged, patch."""
    return write_patch(tmp_path)


def beside(folder: Path) -> set[str]:
    return {path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")}


def test_a_new_folder_is_the_merged_one(made: Made, tmp_path: Path) -> None:
    base, merged, patch = made
    before = contents(base)
    done = ia3_export.apply(patch, base, output=tmp_path / "deep" / "new")
    assert contents(done.folder) == contents(merged)
    assert contents(base) == before


def test_in_place_and_back(made: Made) -> None:
    base, merged, patch = made
    before = contents(base)
    (base / "model.safetensors").chmod(0o640)
    kept = (base / "sub" / "kept.bin").stat().st_ino
    ia3_export.apply(patch, base)
    assert contents(base) == contents(merged)
    assert (base / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert (base / "sub" / "kept.bin").stat().st_ino == kept
    assert beside(base) == {".base.ia3-export-revert.ia3patch"}
    ia3_export.revert(base)
    assert contents(base) == before
    assert beside(base) == set()
    with pytest.raises(Refused, match="not patched in place"):
        ia3_export.revert(base)


def test_files_of_the_users_own_stay_in_place_and_links_stay_links(made: Made, tmp_path: Path) -> None:
    base, merged, patch = made
    (base / "notes.txt").write_text("mine")
    (base / "empty").mkdir()
    (tmp_path / "blob").write_bytes((base / "model.safetensors").read_bytes())
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("../blob")
    (base / "link").symlink_to("sub")
    before = contents(base)
    ia3_export.apply(patch, base)
    own = {"notes.txt": before["notes.txt"], "empty": "folder", "link": "link to sub"}
    assert contents(base) == contents(merged) | own
    blob = (tmp_path / "blob").read_bytes()
    ia3_export.revert(base)
    assert {**contents(base), "model.safetensors": ""} == {**before, "model.safetensors": ""}
    assert (tmp_path / "blob").read_bytes() == blob == (base / "model.safetensors").read_bytes()


def test_a_patched_folder_says_so_and_so_does_another(made: Made, tmp_path: Path) -> None:
    base, merged, patch = made
    with pytest.raises(Refused, match="already patched"):
        ia3_export.apply(patch, merged)
    with pytest.raises(Refused, match="already patched"):
        ia3_export.apply(patch, merged, output=tmp_path / "new")
    ia3_export.apply(patch, base)
    with pytest.raises(Refused, match="already patched"):
        ia3_export.apply(patch, base)
    (tmp_path / "second").mkdir()
    *_, other = write_patch(tmp_path / "second", seed=1)
    with pytest.raises(Refused, match=r"another folder: model\.safetensors .* has other bytes") as caught:
        ia3_export.apply(other, base)
    assert "--revert first" in caught.value.hint
    assert contents(base) == contents(merged)


def test_a_second_patch_in_place_waits_for_the_first_to_be_reverted(made: Made, tmp_path: Path) -> None:
    base, merged, patch = made
    third = tmp_path / "third"
    shutil.copytree(merged, third)
    (third / "config.json").write_text('{"third": 3}')
    ia3_export.patch(merged, third, tmp_path / "next.ia3patch")
    ia3_export.apply(patch, base)
    with pytest.raises(Refused, match="was patched in place before"):
        ia3_export.apply(tmp_path / "next.ia3patch", base)
    ia3_export.apply(tmp_path / "next.ia3patch", base, output=tmp_path / "new")
    assert contents(tmp_path / "new") == contents(third)


def test_a_folder_that_is_patched_in_part_says_so(made: Made) -> None:
    base, merged, patch = made
    shutil.copy(merged / "README.md", base)
    with pytest.raises(Refused, match=r"in part: README\.md is what the patch makes .* model\.safetensors"):
        ia3_export.apply(patch, base)


@pytest.mark.parametrize("size", [9 << 20, (4 << 20) - 1, 4 << 20, (4 << 20) + 1])
def test_what_is_carried_may_be_larger_than_a_block(made: Made, tmp_path: Path, size: int) -> None:
    base, merged, _ = made
    (merged / "long.bin").write_bytes(b"0123456789abcdef" * (size // 16) + b"x" * (size % 16))
    patch = ia3_export.patch(base, merged, tmp_path / "long.ia3patch").path
    ia3_export.apply(patch, base)
    assert contents(base) == contents(merged)
    ia3_export.revert(base)


@pytest.mark.parametrize("name", ["model.safetensors", "sub/kept.bin", "gone.txt"])
def test_one_other_byte_anywhere_is_refused_before_the_first_write(
    made: Made, tmp_path: Path, name: str
) -> None:
    base, _, patch = made
    data = bytearray((base / name).read_bytes())
    data[-1] ^= 1
    (base / name).write_bytes(data)
    before = contents(tmp_path)
    for output in (None, tmp_path / "new"):
        with pytest.raises(Refused, match=f"{name} in .* has other bytes"):
            ia3_export.apply(patch, base, output=output)
    (base / name).unlink()
    with pytest.raises(NotFound, match=name):
        ia3_export.apply(patch, base)
    (base / name).write_bytes(data)
    assert contents(tmp_path) == before


def test_a_file_in_the_place_of_a_new_one_is_not_replaced(made: Made) -> None:
    base, _, patch = made
    (base / "new.json").write_text("mine")
    with pytest.raises(Refused, match=r"another new\.json"):
        ia3_export.apply(patch, base)
    assert (base / "new.json").read_text() == "mine"


def test_a_folder_that_leads_elsewhere_is_refused(made: Made, tmp_path: Path) -> None:
    base, _, patch = made
    (base / "sub").rename(tmp_path / "elsewhere")
    (base / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="link to another folder"):
        ia3_export.apply(patch, base)


def test_what_is_no_regular_file_is_refused(made: Made) -> None:
    base, _, patch = made
    (base / "gone.txt").unlink()
    os.mkfifo(base / "gone.txt")
    with pytest.raises(Refused, match="no regular file"):
        ia3_export.apply(patch, base)


def test_a_changed_vector_is_noticed_before_anything_is_replaced(made: Made) -> None:
    base, _, patch = made
    data = bytearray(patch.read_bytes())
    before = contents(base)
    edit_patch(patch, lambda document: None)
    from ia3_export.patching.format import read_patch

    offset = read_patch(patch).blobs["v0"].offset
    data = bytearray(patch.read_bytes())
    data[offset + 3] ^= 1
    patch.write_bytes(data)
    with pytest.raises(InputError, match="did not become"):
        ia3_export.apply(patch, base)
    assert contents(base) == before and beside(base) == set()


@pytest.mark.parametrize("name", ["model.safetensors", "sub/kept.bin", "appeared.txt"])
def test_a_file_that_changes_meanwhile(made: Made, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    base, _, patch = made
    write = applying.write_files

    def disturbed(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        with (base / name).open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(in_place, "write_files", disturbed)
    with pytest.raises(Refused, match="while the patch was applied"):
        ia3_export.apply(patch, base)
    assert (base / "gone.txt").exists() and beside(base) == set()


def test_a_full_disk_leaves_the_folder(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, _, patch = made
    before = contents(base)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(in_place, "write_files", full)
    monkeypatch.setattr(applying, "write_files", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        ia3_export.apply(patch, base)
    assert "free some space" in caught.value.hint
    with pytest.raises(OutputError, match="No space left"):
        ia3_export.apply(patch, base, output=tmp_path / "new")
    monkeypatch.setattr(applying, "free_space", lambda _: 100)
    for output in (None, tmp_path / "new"):
        with pytest.raises(OutputError, match="free space"):
            ia3_export.apply(patch, base, output=output)
    assert contents(base) == before and beside(base) == set()
    assert not (tmp_path / "new").exists()


def test_the_working_directory_is_not_replaced(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made[0] / "sub")
    with pytest.raises(Refused, match="working directory"):
        ia3_export.apply(made[2], made[0])


def test_a_dry_run_writes_nothing_and_says_what_is_wrong(made: Made, tmp_path: Path) -> None:
    before = contents(tmp_path)
    assert ia3_export.apply(made[2], made[0], dry_run=True).content["how"] == "verified"
    with pytest.raises(Refused):
        ia3_export.apply(made[2], made[1], dry_run=True)
    assert contents(tmp_path) == before


DEVICE = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {"ia3_export", "numpy"} | sys.stdlib_module_names:
            raise ImportError(name)
sys.meta_path.insert(0, Only())
import ia3_export
patch, base, new = sys.argv[1:]
ia3_export.apply(patch, base, output=new)
ia3_export.apply(patch, base)
ia3_export.revert(base)
ia3_export.apply(patch, base)
"""


def test_a_device_needs_numpy_alone(made: Made, tmp_path: Path) -> None:
    base, merged, patch = made
    program = [sys.executable, "-S", "-c", DEVICE, str(patch), str(base), str(tmp_path / "new")]
    where = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(program, check=True, env=os.environ | {"PYTHONPATH": where}, timeout=120)
    assert contents(base) == contents(merged) == contents(tmp_path / "new")


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import ia3_export
from ia3_export.errors import Refused
from ia3_export.patching import exchange, in_place
from tests.e2e.command import contents

place, merged, patch, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
old, new = contents(place), contents(merged)
saved = place.parent / "saved"
shutil.copytree(place, saved)
if how.startswith("renames"):
    in_place.exchange = lambda one, other: False

def beside():
    return [path for path in place.parent.iterdir() if path.name.startswith(f".{place.name}.")]

def fresh():
    for path in [place, *beside()]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(saved, place)
    if how.endswith("revert"):
        ia3_export.apply(patch, place)

def act():
    ia3_export.revert(place) if how.endswith("revert") else ia3_export.apply(patch, place)

def in_child(function):
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitpid(child, 0)[1]

def killed(at):
    events = 0
    def hook(event, arguments):
        nonlocal events
        if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")):
            events += 1
            if events == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    act()

seen, at, absent = set(), 0, 0
while True:
    at += 1
    fresh()
    status = in_child(lambda: killed(at))
    if place.exists():
        state = contents(place)
        assert state in (old, new), (at, state)
        seen.add(state == new)
    else:
        absent += 1
        assert how.startswith("renames"), at
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        break
    # what was killed can be run again, and then taken back
    for _ in range(2):
        try:
            act()
        except Refused as error:
            assert "already patched" in str(error) or "was not patched in place" in str(error), error
    assert contents(place) == (old if how.endswith("revert") else new), at
    if not how.endswith("revert"):
        ia3_export.revert(place)
        assert contents(place) == old, at
    assert beside() == [], (at, beside())
assert seen == {True, False}
print(at, absent)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exchange", "exchange-revert", "renames", "renames-revert"])
def test_killed_at_any_moment_the_folder_is_the_old_or_the_new_one(made: Made, how: str) -> None:
    base, merged, patch = made
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(base), str(merged), str(patch), how],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points, absent = map(int, done.stdout.split())
    assert points > 60
    assert absent <= 3
