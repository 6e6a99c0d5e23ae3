"""In which order, and by which thread, the pieces of an output are written."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.planning.changes import Change

#: Bytes that a thread takes at a time. Copies begin at multiples of it: the kernel moves large, aligned
#: pieces of the page cache, and is half again as slow when a copy begins at any other page.
_CHUNK = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Sink:
    """Where source bytes go in one output: at `position` of `path`, folded when there is a `change`."""

    output: int
    path: Path
    position: int
    change: Change | None


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """`nbytes` at `offset` of a source file (or of an in-memory tensor), and where they go.

    A copy may span several tensors, beginning with `tensor`; any other item is exactly one tensor.
    """

    tensor: StoredTensor
    offset: int
    nbytes: int
    sinks: tuple[Sink, ...]

    @property
    def is_copy(self) -> bool:
        """Whether bytes move from file to file unchanged."""
        return self.tensor.in_file and all(sink.change is None for sink in self.sinks)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A portion of work for one thread: copies only, or transforms only."""

    items: tuple[Item, ...]

    @property
    def is_copy(self) -> bool:
        """Whether it only copies."""
        return self.items[0].is_copy

    @property
    def paths(self) -> set[Path]:
        """The files that the run writes to."""
        return {sink.path for item in self.items for sink in item.sinks}

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(item.nbytes * len(item.sinks) for item in self.items)


def make_runs(sinks: Sequence[tuple[StoredTensor, Sink]]) -> Iterator[Run]:
    """Group sinks by source tensor, in file order, into runs.

    Neighbours that are copied alike become one range.
    """
    by_source: dict[tuple[str, int, int, int], tuple[StoredTensor, list[Sink], list[Sink]]] = {}
    for tensor, sink in sinks:
        place = (str(tensor.file), 0 if tensor.in_file else id(tensor), tensor.offset, tensor.nbytes)
        _, copied, transformed = by_source.setdefault(place, (tensor, [], []))
        (copied if sink.change is None and tensor.in_file else transformed).append(sink)
    copies: list[Item] = []
    transforms: list[Item] = []
    for place in sorted(by_source):
        tensor, copied, transformed = by_source[place]
        if copied:
            item = Item(tensor, tensor.offset, tensor.nbytes, tuple(copied))
            if copies and _continues(copies[-1], item):
                before = copies.pop()
                item = Item(before.tensor, before.offset, before.nbytes + item.nbytes, before.sinks)
            copies.append(item)
        if transformed:
            transforms.append(Item(tensor, tensor.offset, tensor.nbytes, tuple(transformed)))
    yield from _portions(part for item in copies for part in _cut(item))
    yield from _portions(transforms)


def _cut(item: Item) -> Iterator[Item]:
    start = item.offset
    while start < item.offset + item.nbytes:
        end = min((start // _CHUNK + 1) * _CHUNK, item.offset + item.nbytes)
        moved = start - item.offset
        sinks = tuple(Sink(s.output, s.path, s.position + moved, None) for s in item.sinks)
        yield Item(item.tensor, start, end - start, sinks)
        start = end


def _portions(items: Iterable[Item]) -> Iterator[Run]:
    """Runs of about one chunk, each of one source file."""
    run: list[Item] = []
    for item in items:
        full = sum(before.nbytes for before in run) + item.nbytes > _CHUNK
        if run and (full or run[0].tensor.file != item.tensor.file):
            yield Run(tuple(run))
            run = []
        run.append(item)
    if run:
        yield Run(tuple(run))


def _continues(before: Item, item: Item) -> bool:
    """Whether `item` is the bytes right after `before`, in the source and in every sink."""
    return (
        before.tensor.file == item.tensor.file
        and before.offset + before.nbytes == item.offset
        and len(before.sinks) == len(item.sinks)
        and all(
            a.path == b.path and a.position + before.nbytes == b.position
            for a, b in zip(before.sinks, item.sinks, strict=True)
        )
    )


class Queue:
    """The runs to write and the files to hash, handed out to threads.

    A file's copies, then its transforms (which may overwrite what was copied), and then its digest.

    A thread takes a file that no other writes to, else a finished file to hash, else shares one: file systems
    lock a file against a second writer, so two threads on one file are slower than one.
    """

    def __init__(self, runs: Iterable[Run], *, to_hash: Sequence[Path]) -> None:
        self._waiting: dict[Path, deque[Run]] = {}
        self._unfinished: Counter[Path] = Counter()
        self._uncopied: Counter[Path] = Counter()
        self.nbytes = 0
        for run in runs:
            self._waiting.setdefault(min(run.paths), deque()).append(run)
            self._unfinished.update(run.paths)
            self._uncopied.update(run.paths if run.is_copy else ())
            self.nbytes += run.nbytes
        self._writers: Counter[Path] = Counter()
        self._to_hash = list(to_hash)
        self.length = sum(map(len, self._waiting.values())) + len(self._to_hash)
        self._changed = threading.Condition()

    def jobs(self, stopped: Callable[[], bool]) -> Iterator[Run | Path]:
        """Runs to write and finished files to hash, for one thread, until nothing is left."""
        while True:
            with self._changed:
                job = self._next()
                while job is None and (self._to_hash or any(self._waiting.values())) and not stopped():
                    self._changed.wait(0.1)
                    job = self._next()
            if job is None or stopped():
                return
            yield job
            if isinstance(job, Run):
                with self._changed:
                    self._writers[min(job.paths)] -= 1
                    self._unfinished.subtract(job.paths)
                    self._uncopied.subtract(job.paths if job.is_copy else ())
                    self._changed.notify_all()

    def _next(self) -> Run | Path | None:
        files = [path for path, waiting in self._waiting.items() if waiting and self._ready(waiting[0])]
        file: Any = min(files, key=lambda p: (self._writers[p], -len(self._waiting[p])), default=None)
        finished = next((path for path in self._to_hash if self._unfinished[path] == 0), None)
        if finished is not None and (file is None or self._writers[file]):
            self._to_hash.remove(finished)
            return finished
        if file is None:
            return None
        self._writers[file] += 1
        return self._waiting[file].popleft()

    def _ready(self, run: Run) -> bool:
        return run.is_copy or not any(self._uncopied[path] for path in run.paths)
