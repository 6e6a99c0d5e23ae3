"""Folders and what a patch says of them: listing, digests, and whether the patch is for these bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ia3_export.checkpoint.ranges import hash_file, worker_count
from ia3_export.errors import InputError, NotFound, Refused
from ia3_export.patching.format import FileState, PatchFile, unsafe

#: What tools remember beside a model, at the top of its folder.
_TOOLS = (".cache", ".git")
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
#: What to do about a folder with other bytes.
FOR_ANOTHER = "give the folder that the patch was made from, byte for byte"
Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Seen:
    """A file that was hashed, and how the system described it then."""

    state: FileState
    signature: Signature


def list_folder(folder: Path) -> list[str]:
    """Names of all files of a model in `folder`, sorted; what tools and file managers leave is passed over.

    Raises `NotFound`, and `Refused` for a name that does not mean the same on every system.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} is no folder", hint="give the folder of a model")
    found = []
    for root, folders, files in os.walk(folder):
        top = Path(root) == folder
        folders[:] = [name for name in folders if not (top and name in _TOOLS)]
        names = [name for name in folders if (Path(root) / name).is_symlink()]
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in (*files, *names)]
    found = sorted(name for name in found if name.rpartition("/")[2] not in _LITTER)
    for name in found:
        if unsafe(name):
            raise Refused(
                f"{folder} holds {name!r}, which cannot be a file's name everywhere", hint="rename it"
            )
    return found


def signature(path: Path) -> Signature:
    """What changes when somebody writes to a file."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def look_at(folder: Path, names: Iterable[str]) -> dict[str, Seen]:
    """Size and digest of those files of `folder` that are there. Raises `InputError` and `Refused`."""
    present = [name for name in names if _is_there(folder, name)]
    with ThreadPoolExecutor(worker_count(len(present))) as pool:
        return dict(zip(present, pool.map(lambda name: _see(folder, name), present), strict=True))


def _is_there(folder: Path, name: str) -> bool:
    """Whether `name` is a regular file, and no part of its path leads out of the folder."""
    path = folder
    for part in name.split("/")[:-1]:
        path = path / part
        if path.is_symlink():
            raise Refused(
                f"{path} is a link to another folder, and {name} lies behind it",
                hint="give a folder whose own folders hold the files",
            )
    path = folder / name
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error
    if not stat.S_ISREG(mode):
        raise Refused(f"{path} is no regular file", hint="give the folder that the patch was made for")
    return True


def _see(folder: Path, name: str) -> Seen:
    path = folder / name
    try:
        before = signature(path)
        digest = hash_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error
    return Seen(FileState(name, before[1], digest), before)


def check_before(patch: PatchFile, folder: Path) -> dict[str, Seen]:
    """The files that `patch` reads, every byte of them verified; nothing is written before this has passed.

    Raises `Refused` where the folder has other bytes, says so if it is patched already, or holds a file in
    the place of a new one; `NotFound` where a file or the folder is missing.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} is no folder", hint="give the folder that the patch is for")
    before, after = patch.before, patch.after
    seen = look_at(folder, dict.fromkeys((*before, *after)))
    wrong = [name for name, state in before.items() if name not in seen or seen[name].state != state]
    taken = [
        name
        for name, state in after.items()
        if name not in before and name in seen and seen[name].state != state
    ]
    if not wrong and not taken:
        return {name: seen[name] for name in before}
    if is_after(patch, seen):
        raise Refused(
            f"{folder} is already patched: its files are what {patch.path.name} makes of them",
            hint="nothing is to be done; apply --revert brings the bytes from before back",
        )
    if not wrong:
        raise Refused(
            f"{folder} holds another {taken[0]}, which the patch would make", hint="move it elsewhere"
        )
    raise _other_bytes(patch, folder, wrong, seen)


def is_after(patch: PatchFile, seen: Mapping[str, Seen]) -> bool:
    """Whether every file that `patch` makes is there."""
    after = patch.after
    gone = all(state.path not in seen for state in patch.removed)
    return gone and all(name in seen and seen[name].state == state for name, state in after.items())


def _other_bytes(
    patch: PatchFile, folder: Path, wrong: list[str], seen: Mapping[str, Seen]
) -> Refused | NotFound:
    before, after = patch.before, patch.after
    done = [path for path in wrong if path in seen and seen[path].state == after.get(path)]
    other = [path for path in wrong if path not in done]
    if not other:
        kept = {state.path for state in patch.kept}
        same = next((path for path in before if path not in wrong and path not in kept), "another file")
        return Refused(
            f"{folder} is patched in part: {done[0]} is what the patch makes of it, {same} is what it was",
            hint=FOR_ANOTHER,
        )
    # the largest says most: a weight file rather than a card
    name = max(other, key=lambda path: before[path].size)
    more = f", and {len(other) - 1} of its other files differ too" if len(other) > 1 else ""
    if name not in seen:
        return NotFound(f"{folder} has no {name}, which the patch was made for", hint=FOR_ANOTHER)
    state, have = before[name], seen[name].state
    said = f"{have.size:,} bytes, not {state.size:,}" if have.size != state.size else "has other bytes"
    return Refused(f"the patch is for another folder: {name} in {folder} {said}{more}", hint=FOR_ANOTHER)


def check_still(folder: Path, seen: Mapping[str, Seen]) -> None:
    """Refuse a folder in which somebody wrote since it was verified."""
    for name, one in seen.items():
        try:
            now = signature(folder / name)
        except OSError:
            now = (-1, -1, -1)
        if now != one.signature:
            raise Refused(
                f"{folder / name} changed while the patch was applied",
                hint="nothing was replaced; something else writes to the folder, run again when it is done",
            )
