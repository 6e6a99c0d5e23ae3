"""The patch that brings the old bytes back: copies the other way round, all other old bytes as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ia3_export.checkpoint.header import write_header
from ia3_export.errors import DamagedFile
from ia3_export.patching.format import (
    Copy,
    FileChange,
    FileState,
    PatchFile,
    Piece,
    Stored,
    joined,
    to_metadata,
)

_STEP = 4 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """`length` bytes at `offset` of an old file; at `copied` of the new one, or nowhere."""

    offset: int
    length: int
    copied: int | None


def write_reverse(patch: PatchFile, folder: Path, target: Path) -> None:
    """Write the reverse of `patch` to the file `target` and sync it: what makes `folder`, not yet patched, of
    the patched one. Raises `OSError` and `DamagedFile`."""
    untouched = {state.path for state in patch.kept}
    changes: list[FileChange] = []
    held: list[tuple[Path, _Part]] = []
    before = patch.before
    for name, old in before.items():
        if name in untouched:
            continue
        change = _source(patch, old)
        pieces: list[Piece] = []
        for part in _parts(change, old):
            if part.copied is not None:
                pieces.append(Copy(part.copied, part.length))
                continue
            pieces.append(Stored(f"r{len(held)}", part.length, compressed=False))
            held.append((folder / name, part))
        changes.append(FileChange(change.new if change is not None else None, old, tuple(joined(pieces))))
    removed = [change.new for change in patch.files if change.new.path not in before]
    metadata = to_metadata(patch.tool, changes, patch.kept, removed)
    rows = [(f"r{number}", "U8", (part.length,)) for number, (_, part) in enumerate(held)]
    prefix, offsets = write_header(rows, metadata)
    with target.open("xb") as file:
        file.write(prefix)
        for name in sorted(offsets, key=lambda name: offsets[name]):
            _append(file, *held[int(name[1:])])
        file.flush()
        os.fsync(file.fileno())


def _source(patch: PatchFile, old: FileState) -> FileChange | None:
    """The change from whose result `old` is made again: that of the same file first."""
    changes = [change for change in patch.files if change.old == old]
    return min(changes, key=lambda change: change.new.path != old.path, default=None)


def _parts(change: FileChange | None, old: FileState) -> Iterator[_Part]:
    """The old file in its order."""
    copies, position = [], 0
    for piece in change.pieces if change is not None else ():
        if isinstance(piece, Copy):
            copies.append((piece.offset, piece.length, position))
        position += piece.length
    done = 0
    for offset, length, copied in sorted(copies):
        if offset > done:
            yield _Part(done, offset - done, None)
            done = offset
        if offset + length > done:
            yield _Part(done, offset + length - done, copied + done - offset)
            done = offset + length
    if done < old.size:
        yield _Part(done, old.size - done, None)


def _append(target: BinaryIO, path: Path, part: _Part) -> None:
    with path.open("rb") as source:
        source.seek(part.offset)
        left = part.length
        while left:
            block = source.read(min(_STEP, left))
            if not block:
                raise DamagedFile(
                    f"{path} became shorter while it was read", hint="run again when it is whole"
                )
            target.write(block)
            left -= len(block)
