"""A patch applied: the new files written and verified, into a new folder.

Imports numpy and the standard library only: this is what runs on a device.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ia3_export.checkpoint.ranges import clone, worker_count
from ia3_export.errors import DamagedFile, OutputError
from ia3_export.patching.folders import check_before, check_still
from ia3_export.patching.format import FileChange, PatchFile
from ia3_export.patching.produce import produce
from ia3_export.writing.execute import Progress
from ia3_export.writing.stage import check_target, free_space, locked, places_beside, recover, staged

Report = Callable[[Progress], None]


def write_folder(patch: PatchFile, folder: Path, target: Path, on_progress: Report) -> None:
    """Write what `patch` makes of `folder` to the new folder `target`: the files that it names, no others.

    Raises what `check_before` raises, `DamagedFile` and `OutputError`.
    """
    check_target(target, [folder, patch.path], overwrite=False)
    finish_interrupted(folder)
    seen = check_before(patch, folder)
    check_space(target.absolute().parent, sum(state.size for state in patch.after.values()))
    with staged(target, flush=True) as stage:
        for state in patch.kept:
            _copy(folder / state.path, stage / state.path)
        write_files(patch, folder, stage, on_progress)
        check_still(folder, seen)


def finish_interrupted(folder: Path) -> None:
    """Bring a folder back of which a run was killed between two renames, on a system without an exchange."""
    place = folder.resolve()
    if not place.exists() and places_beside(place)[1].is_dir():
        with locked(place):
            recover(place)


def write_files(patch: PatchFile, folder: Path, stage: Path, on_progress: Report) -> None:
    """Write every changed file of `patch` into `stage`, with the permissions of the old one.

    Raises `DamagedFile` where a file does not become what the patch says.
    """
    vectors = patch.vectors()
    count = _Counter(sum(change.new.size for change in patch.files), on_progress)

    def write(change: FileChange) -> None:
        path = stage / change.new.path
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as aside:
            for block in produce(patch, change, folder, vectors):
                hashed = aside.submit(digest.update, block)
                rest = memoryview(block)
                while rest:
                    rest = rest[file.write(rest) :]
                hashed.result()
                count.add(len(block))
        check_digest(patch, change, digest.hexdigest())
        if change.old is not None:
            shutil.copymode(folder / change.old.path, path)

    largest_first = sorted(patch.files, key=lambda change: -change.new.size)
    with ThreadPoolExecutor(worker_count(len(largest_first))) as pool:
        for _ in pool.map(write, largest_first):
            pass


def check_digest(patch: PatchFile, change: FileChange, digest: str) -> None:
    """Refuse bytes that are not the ones that the patch was made for."""
    if digest != change.new.sha256:
        raise DamagedFile(
            f"{change.new.path} did not become what {patch.path} says: SHA-256 {digest}, not "
            f"{change.new.sha256}",
            hint="nothing was replaced; a file changed meanwhile, or the patch is damaged: fetch it again",
        )


def prove(patch: PatchFile, folder: Path) -> None:
    """Make every changed file without writing it, and compare the digests. Raises `DamagedFile`."""
    found = patch.vectors()

    def check(change: FileChange) -> None:
        digest = hashlib.sha256()
        for block in produce(patch, change, folder, found):
            digest.update(block)
        check_digest(patch, change, digest.hexdigest())

    with ThreadPoolExecutor(worker_count(len(patch.files))) as pool:
        for _ in pool.map(check, patch.files):
            pass


def check_space(folder: Path, wanted: int) -> None:
    """Refuse to begin what the disk has no room for. Raises `OutputError`."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = free_space(there)
    if wanted > free:
        raise OutputError(
            f"the new files have {wanted:,} bytes, and {there} has {free:,} bytes of free space",
            hint="free some space, or give an --output on another disk",
        )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not clone(source, target):
        shutil.copyfile(source, target)
    shutil.copymode(source, target)


class _Counter:
    """Bytes written by all threads."""

    def __init__(self, total: int, report: Report) -> None:
        self.done, self.total, self.report, self.lock = 0, total, report, threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            self.report(Progress(self.done, self.total))
