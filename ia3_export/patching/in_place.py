"""A patch applied in place: the folder is the old one or the new one at any moment, and never between.

The new folder is built beside the old one, from hard links to what stays, and the two change places in one
step. Where a system cannot do that, the old one is renamed away and the new one to its name; the old one's
name beside the folder is the journal by which the next run finishes or takes that back.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ia3_export.errors import InputError, OutputError, Refused
from ia3_export.patching.apply import Report, check_space, write_files
from ia3_export.patching.exchange import exchange
from ia3_export.patching.folders import FOR_ANOTHER, Seen, check_before, check_still, is_after, look_at
from ia3_export.patching.format import Copy, PatchFile, read_patch
from ia3_export.patching.reverse import write_reverse
from ia3_export.writing.stage import is_full, locked, places_beside, recover, sync_file, sync_tree


def reverse_of(folder: Path) -> Path:
    """Where the way back of a folder that was patched in place lies."""
    return folder.with_name(f".{folder.name}.ia3-export-revert.ia3patch")


def patch_in_place(patch: PatchFile, folder: Path, on_progress: Report) -> None:
    """Turn `folder` into what `patch` makes of it, and leave the way back beside it.

    Raises what `check_before` raises, `Refused` where a way back is there already, `DamagedFile` and
    `OutputError`; the folder is untouched then.
    """
    with _alone(folder) as place:
        way_back = reverse_of(place)
        patched = way_back.exists() and not _is_stale(way_back, place)
        try:
            seen = check_before(patch, place)
        except InputError as error:
            if patched and error.hint == FOR_ANOTHER:
                error.hint = "another patch was applied to it in place: apply --revert first"
            raise
        if patched:
            raise Refused(
                f"{folder} was patched in place before",
                hint="apply --revert first, or give --output for a new folder",
            )
        check_space(place.parent, _needed(patch))
        draft = _draft(way_back)
        write_reverse(patch, place, draft)
        draft.replace(way_back)
        sync_file(place.parent)
        before = place.stat().st_ino
        try:
            _replace(patch, place, seen, on_progress)
        except BaseException:
            # a way back from a folder that was not replaced leads nowhere
            if place.exists() and place.stat().st_ino == before:
                way_back.unlink(missing_ok=True)
            raise


def revert_in_place(folder: Path, on_progress: Report) -> PatchFile | None:
    """Bring the bytes from before the last patch back, all of them; returns the patch that did.

    None where they are there already. Raises `Refused` where there is no way back or the folder has changed
    since, `DamagedFile` and `OutputError`.
    """
    with _alone(folder) as place:
        way_back = reverse_of(place)
        if not way_back.exists():
            raise Refused(
                f"{folder} was not patched in place: there is no {way_back}",
                hint="what was written with --output has its base still; copy that",
            )
        patch = read_patch(way_back)
        found = None
        if not _is_stale(way_back, place):
            seen = check_before(patch, place)
            check_space(place.parent, sum(change.new.size for change in patch.files))
            _replace(patch, place, seen, on_progress)
            found = patch
        way_back.unlink()
        sync_file(place.parent)
        return found


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """The folder behind `folder`, links followed, locked, and whole again if a run was killed there."""
    place = folder.resolve()
    if place == Path.cwd() or place in Path.cwd().parents or place.parent == place:
        raise Refused(
            f"{folder} holds the working directory, which would be left in a folder that is gone",
            hint="run it from outside of the folder, or give --output",
        )
    try:
        with locked(place):
            recover(place)
            _draft(reverse_of(place)).unlink(missing_ok=True)
            yield place
    except OSError as error:
        hint = (
            "the new files lie beside the folder until they replace it; check that its parent can be written"
        )
        if is_full(error):
            hint = "the folder is as it was; free some space, or give an --output on another disk"
        raise OutputError(f"cannot patch {folder}: {error.strerror or error}", hint=hint) from error


def _draft(way_back: Path) -> Path:
    return way_back.with_name(f"{way_back.name}.draft")


def _is_stale(way_back: Path, place: Path) -> bool:
    """Whether the folder is already what `way_back` leads to: a run was killed before it had replaced it, or
    after it had reverted it."""
    patch = read_patch(way_back)
    return is_after(patch, look_at(place, dict.fromkeys((*patch.before, *patch.after))))


def _needed(patch: PatchFile) -> int:
    """Bytes that are written at most before the old ones go."""
    held = sum(
        piece.length for change in patch.files for piece in change.pieces if not isinstance(piece, Copy)
    )
    return held + sum(change.new.size for change in patch.files)


def _replace(patch: PatchFile, place: Path, seen: dict[str, Seen], on_progress: Report) -> None:
    stage, old = places_beside(place)
    stage.mkdir()
    try:
        changed = {change.new.path for change in patch.files}
        gone = {state.path for state in patch.removed}
        names = _link_tree(place, stage, changed | gone)
        write_files(patch, place, stage, on_progress)
        _drop_empty(stage, gone)
        shutil.copymode(place, stage)
        sync_tree(stage)
        check_still(place, seen)
        if names != set(_walk(place)):
            raise Refused(
                f"files came to {place} or went while the patch was applied",
                hint="nothing was replaced; run again when nothing else writes there",
            )
        if not exchange(stage, place):
            place.rename(old)
            stage.rename(place)
        sync_file(place.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)


def _walk(place: Path) -> Iterator[str]:
    """Names of everything below `place`, folders before what is in them; links are not followed."""
    for root, folders, files in os.walk(place):
        folders.sort()
        for name in (*folders, *sorted(files)):
            yield (Path(root) / name).relative_to(place).as_posix()


def _link_tree(place: Path, stage: Path, left_out: set[str]) -> set[str]:
    """The folders of `place` and links to its files in `stage`, copies where links fail; returns names."""
    names = list(_walk(place))
    for name in names:
        source, target = place / name, stage / name
        mode = source.lstat().st_mode
        if stat.S_ISLNK(mode):
            if name not in left_out:
                target.symlink_to(source.readlink())
        elif stat.S_ISDIR(mode):
            target.mkdir()
            shutil.copymode(source, target)
        elif not stat.S_ISREG(mode):
            raise Refused(f"{source} is no regular file", hint="move it elsewhere, or give --output")
        elif name not in left_out:
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)
    return set(names)


def _drop_empty(stage: Path, gone: set[str]) -> None:
    """Remove folders in which nothing is left of what the patch removed."""
    for name in gone:
        folder = (stage / name).parent
        while folder != stage and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
