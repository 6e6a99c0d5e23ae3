"""Executes laid-out plans, streaming: nothing is decided here.

Untouched bytes are moved by the kernel; a touched tensor goes through memory in blocks of about 1 MB. Several
outputs of one base are written side by side, so that the base is read once. Threads work on runs of tensors, each
with its own file descriptors.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint import ranges
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile, NotFinite
from ia3_export.fold import FLOAT_DTYPES, check_block, fold_block, storage_dtype
from ia3_export.layout import OutputFile
from ia3_export.plan import Change

_BLOCK = 1 << 19
_RUN = 64 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes written so far, of all bytes that will be."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What became of a changed tensor: content digest (or None), zeros in it, zeros that the fold made."""

    sha256: str | None
    zeros: int
    flushed: int


@dataclass(frozen=True, slots=True)
class Written:
    """The weight files of one output: results by changed tensor, SHA-256 by file, names of hard links."""

    tensors: Mapping[str, TensorResult]
    sha256: Mapping[str, str]
    linked: Sequence[str]


@dataclass(frozen=True, slots=True, eq=False)
class _Sink:
    """Where a source range goes in one output."""

    output: int
    path: Path
    position: int
    change: Change | None


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A range of a source file (or in-memory tensor) and its sinks; a whole tensor where a sink changes it."""

    tensor: StoredTensor
    offset: int
    nbytes: int
    sinks: tuple[_Sink, ...]


def write_outputs(
    outputs: Sequence[tuple[Path, Sequence[OutputFile]]],
    *,
    link: bool,
    digests: bool,
    on_progress: Callable[[Progress], None],
) -> list[Written]:
    """Write the weight files of every output folder.

    Returns, per output, what was written. Raises `NotFinite` and `DamagedFile`; `OSError` is the caller's.
    """
    results: list[dict[str, TensorResult]] = [{} for _ in outputs]
    linked: list[list[str]] = [[] for _ in outputs]
    sha256: dict[Path, str] = {}
    sinks: list[tuple[StoredTensor, _Sink]] = []
    for i, (folder, files) in enumerate(outputs):
        for file in files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if link and file.untouched and file.verbatim is not None:
                if ranges.link_or_copy(file.verbatim.path, path):
                    linked[i].append(file.name)
                continue
            cloned = file.verbatim is not None and ranges.clone(file.verbatim.path, path)
            if not cloned:
                with path.open("wb") as target:
                    target.write(file.prefix)
                    target.truncate(file.size)
            sinks += [
                (piece.source, _Sink(i, path, piece.position, piece.change))
                for piece in file.pieces
                if piece.source.nbytes and not (cloned and piece.change is None)
            ]
    paths = [folder / file.name for folder, files in outputs for file in files]
    queue = _Queue(_split_runs(_items(sinks)), to_hash=paths if digests else [])
    meter = _Meter(queue.nbytes, on_progress)
    workers = max(1, min(os.cpu_count() or 1, 8, queue.length))
    with ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(_work, queue, results, sha256 if digests else None, meter) for _ in range(workers)
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            meter.stop()
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, _Stopped)):
        raise error
    return [
        Written(
            results[i],
            {file.name: sha256[folder / file.name] for file in files} if digests else {},
            linked[i],
        )
        for i, (folder, files) in enumerate(outputs)
    ]


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(dtype: str, shape: Sequence[int]) -> Any:
    """A SHA-256 to be fed a tensor's bytes; dtype and shape go first, as in ``BF16[1024,64]``."""
    return hashlib.sha256(f"{dtype}[{','.join(map(str, shape))}]".encode())


class _Stopped(Exception):
    """Another thread failed, or the user interrupted."""


class _Meter:
    """Adds up the bytes of all threads, and tells them to stop."""

    def __init__(self, total: int, on_progress: Callable[[Progress], None]) -> None:
        self._total, self._on_progress = total, on_progress
        self._done = 0
        self.stopped = False
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Make every thread stop at its next step (a no-op for those that are done)."""
        self.stopped = True

    def add(self, count: int) -> None:
        if self.stopped:
            raise _Stopped
        with self._lock:
            self._done += count
            self._on_progress(Progress(self._done, self._total))


class _Queue:
    """What the threads do next: runs of tensors, by output file, and then the digest of each finished file.

    A thread takes a file that no other writes to, else a finished file to hash, else shares one: file systems lock
    a file against a second writer, so two threads on one file are slower than one.
    """

    def __init__(self, runs: Iterable[list[_Item]], *, to_hash: Sequence[Path]) -> None:
        self._waiting: dict[Path, deque[list[_Item]]] = {}
        self._unfinished: Counter[Path] = Counter()
        self.nbytes = 0
        for run in runs:
            self._waiting.setdefault(run[0].sinks[0].path, deque()).append(run)
            self._unfinished.update({sink.path for item in run for sink in item.sinks})
            self.nbytes += sum(item.nbytes * len(item.sinks) for item in run)
        self._writers: Counter[Path] = Counter()
        self._to_hash = list(to_hash)
        self.length = sum(map(len, self._waiting.values())) + len(self._to_hash)
        self._changed = threading.Condition()

    def jobs(self, stopped: Callable[[], bool]) -> Iterator[list[_Item] | Path]:
        """Runs to write and finished files to hash, for one thread, until nothing is left."""
        while True:
            with self._changed:
                job = self._next()
                while job is None and (self._to_hash or any(self._waiting.values())) and not stopped():
                    self._changed.wait(0.1)
                    job = self._next()
            if job is None:
                return
            yield job
            if isinstance(job, list):
                with self._changed:
                    self._writers[job[0].sinks[0].path] -= 1
                    self._unfinished.subtract({sink.path for item in job for sink in item.sinks})
                    self._changed.notify_all()

    def _next(self) -> list[_Item] | Path | None:
        files = [path for path, waiting in self._waiting.items() if waiting]
        file = min(files, key=lambda p: (self._writers[p], -len(self._waiting[p])), default=None)
        finished = next((path for path in self._to_hash if self._unfinished[path] == 0), None)
        if finished is not None and (file is None or self._writers[file]):
            self._to_hash.remove(finished)
            return finished
        if file is None:
            return None
        self._writers[file] += 1
        return self._waiting[file].popleft()


def _items(sinks: Sequence[tuple[StoredTensor, _Sink]]) -> Iterator[_Item]:
    """Group sinks by source tensor and join neighbours that every output copies alike into one range."""
    by_source: dict[tuple[Any, int, int], tuple[StoredTensor, list[_Sink]]] = {}
    for tensor, sink in sinks:
        place: Any = tensor.file if tensor.data is None else id(tensor)
        by_source.setdefault((place, tensor.offset, tensor.nbytes), (tensor, []))[1].append(sink)
    pending: _Item | None = None
    for key in sorted(by_source, key=lambda k: (str(k[0]), k[1])):
        tensor, group = by_source[key]
        item = _Item(tensor, tensor.offset, tensor.nbytes, tuple(group))
        if pending is not None and _continues(pending, item):
            pending = _Item(pending.tensor, pending.offset, pending.nbytes + item.nbytes, pending.sinks)
            continue
        if pending is not None:
            yield pending
        pending = item
    if pending is not None:
        yield pending


def _continues(before: _Item, item: _Item) -> bool:
    plain = all(sink.change is None for sink in (*before.sinks, *item.sinks))
    return (
        plain
        and before.tensor.data is None
        and item.tensor.data is None
        and before.tensor.file == item.tensor.file
        and before.offset + before.nbytes == item.offset
        and len(before.sinks) == len(item.sinks)
        and all(
            a.path == b.path and a.position + before.nbytes == b.position
            for a, b in zip(before.sinks, item.sinks, strict=True)
        )
    )


def _split_runs(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    """Portions of about 64 MB for the threads; plain ranges are cut, changed tensors stay whole."""
    run: list[_Item] = []
    filled = 0
    for item in items:
        for part in _cut(item):
            run.append(part)
            filled += part.nbytes
            if filled >= _RUN:
                yield run
                run, filled = [], 0
    if run:
        yield run


def _cut(item: _Item) -> Iterator[_Item]:
    if item.tensor.data is not None or any(sink.change is not None for sink in item.sinks):
        yield item
        return
    for start in range(0, item.nbytes, _RUN):
        sinks = tuple(_Sink(s.output, s.path, s.position + start, None) for s in item.sinks)
        yield _Item(item.tensor, item.offset + start, min(_RUN, item.nbytes - start), sinks)


def _work(
    queue: _Queue, results: Sequence[dict[str, TensorResult]], sha256: dict[Path, str] | None, meter: _Meter
) -> None:
    buffer = memoryview(bytearray(_BLOCK))
    with ExitStack() as stack:
        opened: dict[tuple[Path, str], int] = {}

        def descriptor(path: Path, mode: str) -> int:
            if (path, mode) not in opened:
                opened[path, mode] = stack.enter_context(path.open(mode, buffering=0)).fileno()
            return opened[path, mode]

        for job in queue.jobs(lambda: meter.stopped):
            if isinstance(job, Path):
                assert sha256 is not None
                sha256[job] = hash_file(job)
                continue
            for item in job:
                targets = [descriptor(sink.path, "r+b") for sink in item.sinks]
                source = descriptor(item.tensor.file, "rb") if item.tensor.data is None else -1
                try:
                    if source >= 0 and all(sink.change is None for sink in item.sinks):
                        _copy(item, source, targets, meter, buffer)
                    else:
                        _transform(item, source, targets, sha256 is not None, results, meter, buffer)
                except EOFError:
                    raise DamagedFile(
                        f"{item.tensor.file} became shorter while it was read, at tensor {item.tensor.name}",
                        hint="something else writes to the inputs; run again when it is done",
                    ) from None


def _copy(item: _Item, source: int, targets: Sequence[int], meter: _Meter, buffer: memoryview) -> None:
    for target, sink in zip(targets, item.sinks, strict=True):
        ranges.copy_range(source, item.offset, target, sink.position, item.nbytes, meter.add, buffer)


def _transform(
    item: _Item,
    source: int,
    targets: Sequence[int],
    digests: bool,
    results: Sequence[dict[str, TensorResult]],
    meter: _Meter,
    buffer: memoryview,
) -> None:
    """Read one tensor once, block by block, and write it, folded, to every sink."""
    tensor = item.tensor
    floats = tensor.dtype in FLOAT_DTYPES
    stored = storage_dtype(tensor.dtype) if floats else np.dtype("u1")
    count = tensor.nbytes // stored.itemsize
    step = _block_elements([s.change for s in item.sinks if s.change is not None], stored.itemsize)
    states = [_State(sink, digests) for sink in item.sinks]
    for first in range(0, count, step):
        length = min(step, count - first)
        start = first * stored.itemsize
        block = buffer[: length * stored.itemsize]
        if tensor.data is None:
            ranges.read_into(source, block, tensor.offset + start)
        else:
            block[:] = tensor.data.data[start : start + len(block)]
        raw = np.frombuffer(block, stored)
        for target, state in zip(targets, states, strict=True):
            state.write(target, raw, first, tensor.dtype, floats)
            meter.add(len(block))
    for state in states:
        if state.sink.change is not None:
            results[state.sink.output][state.sink.change.name] = state.result()


class _State:
    """A changed tensor while it is written to one sink."""

    def __init__(self, sink: _Sink, digests: bool) -> None:
        self.sink = sink
        self._hash = content_hash(sink.change.dtype, sink.change.shape) if digests and sink.change else None
        self._position, self._zeros, self._flushed = sink.position, 0, 0

    def write(self, target: int, raw: Any, first: int, dtype: str, floats: bool) -> None:
        change = self.sink.change
        out = raw
        if change is not None and floats:
            out = fold_block(raw, first, dtype, change.dtype, change.scales)
            check = check_block(out, change.dtype)
            if check.not_finite >= 0:
                raise _not_finite(change, first + check.not_finite)
            if check.zeros:
                self._zeros += check.zeros
                self._flushed += max(0, check.zeros - check_block(raw, dtype).zeros)
        data = out.data.cast("B")
        if self._hash is not None:
            self._hash.update(data)
        ranges.write_all(target, data, self._position)
        self._position += len(data)

    def result(self) -> TensorResult:
        return TensorResult(self._hash.hexdigest() if self._hash else None, self._zeros, self._flushed)


def _block_elements(changes: Sequence[Change], itemsize: int) -> int:
    """Elements per block: about 1 MB, in whole periods or rows of the scales so that they take the fast way."""
    limit = _BLOCK // itemsize
    unit = 1
    for change in changes:
        for scale in change.scales:
            fits = scale.period if scale.period <= limit else scale.inner
            if unit % fits:
                unit *= fits
    return limit // unit * unit if unit <= limit else limit


def _not_finite(change: Change, element: int) -> NotFinite:
    index = [int(i) for i in np.unravel_index(element, change.shape)] if change.shape else []
    return NotFinite(
        f"{change.name}{index} is NaN or infinite in {change.dtype} after {'; '.join(change.folds) or 'the cast'}",
        hint="the value does not fit this dtype: try --dtype float32 or bfloat16, or look for it in the base",
    )
