"""Executes laid-out plans, streaming: nothing is decided here.

Bytes are moved by the kernel; a touched tensor goes through memory in blocks of half a megabyte. Several
outputs of one base are written side by side, so that the base is read once. Threads work on runs of tensors,
each with its own file descriptors.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint import ranges
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import NotFinite
from ia3_export.fold import FLOAT_DTYPES, Workspace, check_block, count_zeros, fold_block, storage_dtype
from ia3_export.planning.changes import Change
from ia3_export.writing.layout import OutputFile
from ia3_export.writing.schedule import Item, Queue, Sink, make_runs
from ia3_export.writing.wording import describe_change

_BLOCK = 1 << 19
_COMPUTED = 1 << 21


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
    sinks: list[tuple[StoredTensor, Sink]] = []
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
            if file.verbatim is not None and not cloned:  # from byte 0 on, so that the copy is aligned
                header = StoredTensor(
                    name="__header__",
                    dtype="U8",
                    shape=(len(file.prefix),),
                    file=file.verbatim.path,
                    offset=0,
                    nbytes=len(file.prefix),
                )
                sinks.append((header, Sink(i, path, 0, None)))
            for piece in file.pieces:
                sink = Sink(i, path, piece.position, piece.change)
                in_place = file.verbatim is not None and piece.source.file == file.verbatim.path
                # pages that the kernel has copied are overwritten faster than new ones are written
                if in_place and piece.change is not None and not cloned:
                    sinks.append((piece.source, Sink(i, path, piece.position, None)))
                if piece.source.nbytes and not (cloned and piece.change is None):
                    sinks.append((piece.source, sink))
    paths = [folder / file.name for folder, files in outputs for file in files]
    queue = Queue(make_runs(sinks), to_hash=paths if digests else [])
    meter = _Meter(queue.nbytes, on_progress)
    workers = ranges.worker_count(queue.length)
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


def _work(
    queue: Queue, results: Sequence[dict[str, TensorResult]], sha256: dict[Path, str] | None, meter: _Meter
) -> None:
    work = Workspace()
    with ExitStack() as stack:
        opened: dict[tuple[Path, str], int] = {}

        def descriptor(path: Path, mode: str) -> int:
            if (path, mode) not in opened:
                opened[path, mode] = stack.enter_context(path.open(mode, buffering=0)).fileno()
            return opened[path, mode]

        for job in queue.jobs(lambda: meter.stopped):
            if isinstance(job, Path):
                assert sha256 is not None
                sha256[job] = ranges.hash_file(job)
                continue
            for item in job.items:
                targets = [descriptor(sink.path, "r+b") for sink in item.sinks]
                source = descriptor(item.tensor.file, "rb") if item.tensor.in_file else -1
                with ranges.reading(item.tensor.file, item.tensor.name):
                    if item.is_copy:
                        _copy(item, source, targets, meter, work)
                    else:
                        _transform(item, source, targets, results, meter, work, digests=sha256 is not None)


def _copy(item: Item, source: int, targets: Sequence[int], meter: _Meter, work: Workspace) -> None:
    buffer = work.get("bytes", _BLOCK, "u1").data
    for target, sink in zip(targets, item.sinks, strict=True):
        ranges.copy_range(source, item.offset, target, sink.position, item.nbytes, meter.add, buffer)


def _transform(
    item: Item,
    source: int,
    targets: Sequence[int],
    results: Sequence[dict[str, TensorResult]],
    meter: _Meter,
    work: Workspace,
    *,
    digests: bool,
) -> None:
    """Read one tensor once, block by block, and write it, folded, to every sink."""
    tensor = item.tensor
    floats = tensor.dtype in FLOAT_DTYPES
    stored = storage_dtype(tensor.dtype) if floats else np.dtype("u1")
    count = tensor.nbytes // stored.itemsize
    step = _block_elements(item, stored.itemsize)
    states = [_State(sink, digests=digests) for sink in item.sinks]
    for first in range(0, count, step):
        length = min(step, count - first)
        raw = _read_block(tensor, source, first, length, stored, work)
        for target, state in zip(targets, states, strict=True):
            state.write(target, raw, first, tensor.dtype, work, floats=floats)
            meter.add(raw.nbytes)
    for state in states:
        if state.sink.change is not None:
            results[state.sink.output][state.sink.change.name] = state.result()


def _read_block(
    tensor: StoredTensor, source: int, first: int, length: int, stored: Any, work: Workspace
) -> Any:
    """Elements ``first:first+length`` as stored, or as they are computed."""
    if tensor.computed is not None:
        try:
            return tensor.computed.read(first, length)
        except OSError as error:
            raise ranges.ReadError(error.strerror or str(error)) from error
    start, nbytes = first * stored.itemsize, length * stored.itemsize
    if tensor.data is not None:
        return tensor.data[start : start + nbytes].view(stored)
    block = work.get("bytes", nbytes, "u1")
    ranges.read_into(source, block.data, tensor.offset + start)
    return block.view(stored)


class _State:
    """A changed tensor while it is written to one sink."""

    def __init__(self, sink: Sink, *, digests: bool) -> None:
        self.sink = sink
        self._hash = content_hash(sink.change.dtype, sink.change.shape) if digests and sink.change else None
        self._position, self._zeros, self._flushed = sink.position, 0, 0

    def write(self, target: int, raw: Any, first: int, dtype: str, work: Workspace, *, floats: bool) -> None:
        change = self.sink.change
        out = raw
        if change is not None and floats:
            out = fold_block(raw, first, dtype, change.dtype, change.scales, work)
            check = check_block(out, change.dtype, work)
            if check.not_finite >= 0:
                raise _not_finite(change, first + check.not_finite)
            if check.zeros:
                self._zeros += check.zeros
                self._flushed += max(0, check.zeros - count_zeros(raw, dtype, work))
        data = out.data.cast("B")
        if self._hash is not None:
            self._hash.update(data)
        ranges.write_all(target, data, self._position)
        self._position += len(data)

    def result(self) -> TensorResult:
        return TensorResult(self._hash.hexdigest() if self._hash else None, self._zeros, self._flushed)


def _block_elements(item: Item, itemsize: int) -> int:
    """How many elements of a tensor are transformed at a time.

    Half a megabyte, in whole periods or rows of the scales so that they take the fast way; of a computed
    tensor more, in its units, since starting a block costs more there.
    """
    limit = _BLOCK // itemsize
    unit = 1
    if item.tensor.computed is not None:
        unit = item.tensor.computed.unit
        return max(_COMPUTED // itemsize // unit, 1) * unit
    for sink in item.sinks:
        for scale in sink.change.scales if sink.change is not None else ():
            fits = scale.period if scale.period <= limit else scale.inner
            if unit % fits:
                unit *= fits
    return limit // unit * unit if unit <= limit else limit


def _not_finite(change: Change, element: int) -> NotFinite:
    index = [int(i) for i in np.unravel_index(element, change.shape)] if change.shape else []
    return NotFinite(
        f"{change.name}{index} is NaN or infinite in {change.dtype} after "
        f"{'; '.join(describe_change(change)) or 'the cast'}",
        hint="the value does not fit this dtype: try --dtype float32 or bfloat16, or look for it in the base",
    )
