"""The bytes of a new file, in its order, made of the old file and the patch. Never more than a block of
them is in memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile
from ia3_export.fold import Array, Workspace
from ia3_export.patching.format import Copy, FileChange, FoldRule, PatchFile, Stored
from ia3_export.patching.rule import chunks, fold_records

BLOCK = 4 << 20
#: What is multiplied stays in the processor's cache.
_FOLDED = 1 << 19
Block = bytes | bytearray


def produce(
    patch: PatchFile, change: FileChange, folder: Path, vectors: Mapping[str, Array]
) -> Iterator[Block]:
    """The blocks of ``change.new``, in order; the old file is read from `folder`.

    Raises `DamagedFile` where the old file or the patch ends too early, or a zlib stream is not what the
    patch says of it.
    """
    with ExitStack() as stack:
        source = None
        if change.old is not None:
            source = stack.enter_context((folder / change.old.path).open("rb", buffering=0))
        work = Workspace()
        for piece in change.pieces:
            if isinstance(piece, Stored):
                tensor = patch.blobs[piece.tensor]
                yield from _inflate(patch, tensor, piece.length) if piece.compressed else _plain(tensor)
                continue
            assert source is not None
            yield from (
                _copied(source, piece)
                if isinstance(piece, Copy)
                else _folded(source, piece, vectors[piece.vector], work)
            )


def _read(file: BinaryIO, count: int) -> bytearray:
    """`count` bytes from where `file` stands."""
    block = bytearray(count)
    rest = memoryview(block)
    while rest:
        got = file.readinto(rest)  # type: ignore[attr-defined]
        if not got:
            raise DamagedFile(
                f"{file.name} became shorter while it was read",
                hint="something else writes to it; run again when it is done",
            )
        rest = rest[got:]
    return block


def _copied(file: BinaryIO, piece: Copy) -> Iterator[Block]:
    file.seek(piece.offset)
    for start in range(0, piece.length, BLOCK):
        yield _read(file, min(BLOCK, piece.length - start))


def _folded(file: BinaryIO, piece: FoldRule, vector: Array, work: Workspace) -> Iterator[Block]:
    file.seek(piece.offset)
    for first, count in _portions(piece, len(vector)):
        block = _read(file, count * piece.stride)
        yield fold_records(block, first, piece, vector, work)


def _portions(piece: FoldRule, n: int) -> Iterator[tuple[int, int]]:
    """First record and number of records of every block."""
    records, most = piece.records, max(1, _FOLDED // piece.stride)
    if records % (n * piece.inner) == 0:
        yield from ((chunk.first, chunk.count) for chunk in chunks(records, n, piece.inner, most))
        return
    for first in range(0, records, most):
        yield first, min(most, records - first)


def _plain(tensor: StoredTensor) -> Iterator[Block]:
    with tensor.file.open("rb", buffering=0) as file:
        yield from _copied(file, Copy(tensor.offset, tensor.nbytes))


def _inflate(patch: PatchFile, tensor: StoredTensor, length: int) -> Iterator[Block]:
    """The zlib stream in `tensor`, which must give `length` bytes and end there."""
    left, stream = length, zlib.decompressobj()
    try:
        for packed in _plain(tensor):
            rest: Block = packed
            more = True
            while more and not stream.eof:
                room = min(BLOCK, left + 1)
                block = stream.decompress(rest, room)
                left -= len(block)
                if left < 0:
                    raise zlib.error("it is longer")
                if block:
                    yield block
                rest = stream.unconsumed_tail
                more = bool(rest) or len(block) == room  # what was read may give more without more input
    except zlib.error as error:
        raise _no_stream(patch, tensor, length, str(error)) from None
    if left or not stream.eof or stream.unused_data:
        raise _no_stream(patch, tensor, length, "it ends elsewhere")


def _no_stream(patch: PatchFile, tensor: StoredTensor, length: int, said: str) -> DamagedFile:
    return DamagedFile(
        f"the patch {patch.path} is damaged: {tensor.name} does not decompress to {length:,} bytes ({said})",
        hint="fetch the patch again",
    )
