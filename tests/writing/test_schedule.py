"""The pieces of an output in order.

What becomes one run, which thread takes which, and what happens when one fails.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile
from ia3_export.writing import schedule
from ia3_export.writing.execute import Progress, write_outputs
from ia3_export.writing.layout import OutputFile, Piece
from ia3_export.writing.schedule import Item, Queue, Run, Sink, make_runs

#: Nothing here looks into a change: that there is one is all that counts.
CHANGE: Any = object()
SOURCE = Path("source.safetensors")
FILES = [Path(name) for name in "abcd"]


def stored(offset: int, nbytes: int, file: Path = SOURCE) -> StoredTensor:
    return StoredTensor(
        name=f"at {offset}", dtype="U8", shape=(nbytes,), file=file, offset=offset, nbytes=nbytes
    )


def a_run(*paths: Path, copies: bool = True, nbytes: int = 8) -> Run:
    """One that writes `nbytes` to the beginning of each of `paths`."""
    sinks = tuple(Sink(output=0, path=path, position=0, change=None if copies else CHANGE) for path in paths)
    return Run((Item(tensor=stored(0, nbytes), offset=0, nbytes=nbytes, sinks=sinks),))


def targets_of(run: Run) -> set[Path]:
    return {sink.path for item in run.items for sink in item.sinks}


def never() -> bool:
    return False


# --------------------------------------------------------------------------------------------
# from pieces to runs

CHUNK = 64


def bytes_of(run: Run) -> Iterator[tuple[tuple[Path, int], tuple[Path, int, bool]]]:
    """Every byte that a run writes: where to, where from, and whether it is changed on the way."""
    for item in run.items:
        for sink in item.sinks:
            for i in range(item.nbytes):
                source = (item.tensor.file, item.offset + i, sink.change is not None)
                yield (sink.path, sink.position + i), source


@st.composite
def pieces(draw: st.DrawFn) -> list[tuple[StoredTensor, Sink]]:
    """Tensors of two source files, copied or changed, in up to three outputs."""
    found = []
    for file in (SOURCE, Path("other.safetensors")):
        offset = draw(st.integers(0, 2 * CHUNK))
        for nbytes in draw(st.lists(st.integers(1, 3 * CHUNK), max_size=8)):
            offset += draw(st.sampled_from([0, 0, 0, 5]))
            for output in range(3):
                what = draw(st.sampled_from(["copied", "copied", "moved", "changed", "left out"]))
                path = Path(f"output-{output}") / file.name
                # a moved tensor goes where no other does
                position = offset + (10_000 if what == "moved" else 0)
                change = CHANGE if what == "changed" else None
                if what != "left out":
                    found.append((stored(offset, nbytes, file), Sink(output, path, position, change)))
            offset += nbytes
    return draw(st.permutations(found))


@given(pieces())
@settings(deadline=None, max_examples=150)
def test_runs_write_every_byte_once_in_portions_for_one_thread(
    given_pieces: list[tuple[StoredTensor, Sink]],
) -> None:
    with mock.patch.object(schedule, "_CHUNK", CHUNK):
        runs = list(make_runs(given_pieces))
    wanted = {
        (sink.path, sink.position + i): (tensor.file, tensor.offset + i, sink.change is not None)
        for tensor, sink in given_pieces
        for i in range(tensor.nbytes)
    }
    written = [pair for run in runs for pair in bytes_of(run)]
    assert dict(written) == wanted and len(written) == len(wanted)
    assert sum(run.nbytes for run in runs) == len(wanted)
    copies = [run.is_copy for run in runs]
    assert copies == sorted(copies, reverse=True), "a file's changes would be overwritten by its copies"
    for run in runs:
        assert len({item.tensor.file for item in run.items}) == 1
        assert len({item.is_copy for item in run.items}) == 1
        assert len(run.items) == 1 or sum(item.nbytes for item in run.items) <= CHUNK
        for item in run.items:
            first, last = item.offset, item.offset + item.nbytes - 1
            assert not item.is_copy or first // CHUNK == last // CHUNK, (
                "a copy that begins at no multiple is slow"
            )


def test_neighbours_that_are_copied_alike_become_one_range() -> None:
    pair = [(stored(at, 10), Sink(0, Path("out"), 100 + at, None)) for at in (30, 20, 40)]
    (run,) = make_runs(pair)
    assert [(item.offset, item.nbytes, item.sinks[0].position) for item in run.items] == [(20, 30, 120)]


@pytest.mark.parametrize(
    ("offset", "path", "position"),
    [(30, "out", 31), (31, "out", 30), (30, "elsewhere", 30)],
    ids=["gap in the output", "gap in the source", "another file"],
)
def test_neighbours_that_part_stay_two_ranges(offset: int, path: str, position: int) -> None:
    first = (stored(20, 10), Sink(0, Path("out"), 20, None))
    (run,) = make_runs([first, (stored(offset, 10), Sink(0, Path(path), position, None))])
    assert [(item.offset, item.nbytes) for item in run.items] == [(20, 10), (offset, 10)]


def test_one_tensor_for_two_outputs_is_read_once() -> None:
    sinks = [Sink(output, Path(f"{output}"), 7, CHANGE) for output in (0, 1)]
    (run,) = make_runs([(stored(20, 10), sink) for sink in sinks])
    (item,) = run.items
    assert list(item.sinks) == sinks and run.nbytes == 20


def test_tensors_in_memory_are_told_apart_and_not_copied_from_the_file() -> None:
    tensors = [replace(stored(0, 4), data=np.full(4, value, "u1")) for value in (1, 2)]
    (run,) = make_runs([(tensor, Sink(0, Path("out"), 4 * i, None)) for i, tensor in enumerate(tensors)])
    assert not run.is_copy
    assert {id(item.tensor) for item in run.items} == set(map(id, tensors))


# -----------------------------------------------------------------------------------------------
# who does what


def drain(queue: Queue, threads: int) -> list[tuple[str, Run | Path]]:
    """Let threads do everything: the beginnings and ends of all jobs in their order."""
    log: list[tuple[str, Run | Path]] = []
    stop, lock = threading.Event(), threading.Lock()

    def work() -> None:
        for job in queue.jobs(stop.is_set):
            with lock:
                log.append(("begin", job))
            time.sleep(0.0003)
            with lock:
                log.append(("end", job))

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work) for _ in range(threads)]
        try:
            for future in futures:
                future.result(timeout=20)
        finally:
            stop.set()
    return log


@st.composite
def work_of_a_merge(draw: st.DrawFn) -> tuple[list[Run], list[Path]]:
    """Copies, then changes, each of one or two of four files; and the files that want a digest."""
    targets = st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True)
    copies = [a_run(*paths) for paths in draw(st.lists(targets, max_size=8))]
    changes = [a_run(*paths, copies=False) for paths in draw(st.lists(targets, max_size=8))]
    return copies + changes, draw(st.lists(st.sampled_from(FILES), unique=True))


@given(work_of_a_merge(), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_every_job_is_done_once_copies_before_changes_and_digests_last(
    work: tuple[list[Run], list[Path]], threads: int
) -> None:
    runs, to_hash = work
    queue = Queue(runs, to_hash=to_hash)
    assert queue.length == len(runs) + len(to_hash)
    assert queue.nbytes == sum(run.nbytes for run in runs)
    log = drain(queue, threads)
    jobs = [*runs, *to_hash]
    assert Counter(map(id, (job for _, job in log))) == Counter({id(job): 2 for job in jobs})
    begin = {id(job): at for at, (what, job) in enumerate(log) if what == "begin"}
    end = {id(job): at for at, (what, job) in enumerate(log) if what == "end"}
    for copy in (run for run in runs if run.is_copy):
        for change in (run for run in runs if not run.is_copy and targets_of(run) & targets_of(copy)):
            assert end[id(copy)] < begin[id(change)]
    for path in to_hash:
        assert all(end[id(run)] < begin[id(path)] for run in runs if path in targets_of(run))


def test_a_thread_takes_a_file_that_no_other_writes_to() -> None:
    a, b = FILES[:2]
    queue = Queue([a_run(a), a_run(a), a_run(a), a_run(b), a_run(b)], to_hash=[])
    first, second = queue.jobs(never), queue.jobs(never)
    assert taken(first) == {a}, "the one with most to do"
    assert taken(second) == {b}
    assert taken(second) == {b}, "not a, which the first writes to"
    assert taken(second) == {a}, "but sooner than do nothing it shares a"


def test_a_finished_file_is_hashed_before_a_file_is_shared() -> None:
    a, b = FILES[:2]
    queue = Queue([a_run(a), a_run(a), a_run(a), a_run(b)], to_hash=[a, b])
    first, second = queue.jobs(never), queue.jobs(never)
    assert taken(first) == {a}
    assert taken(second) == {b}
    assert next(second) == b
    assert taken(second) == {a}


def taken(jobs: Iterator[Run | Path]) -> set[Path]:
    """The files of the next run."""
    job = next(jobs)
    assert isinstance(job, Run)
    return job.paths


def test_threads_of_an_empty_queue_end_at_once() -> None:
    assert drain(Queue([], to_hash=[]), 3) == []


def test_files_that_nothing_is_written_to_are_hashed_too() -> None:
    log = drain(Queue([], to_hash=FILES), 2)
    assert Counter(job for _, job in log) == Counter(dict.fromkeys(FILES, 2))


# ----------------------------------------------------------------------------------------------- when
# something fails


def test_a_thread_that_waits_for_another_ends_when_all_are_to_stop() -> None:
    queue = Queue([a_run(FILES[0]), a_run(FILES[0], copies=False)], to_hash=FILES[:1])
    stop = threading.Event()
    unfinished = queue.jobs(stop.is_set)
    assert taken(unfinished) == {FILES[0]}
    waiting = threading.Thread(target=list, args=(queue.jobs(stop.is_set),), daemon=True)
    waiting.start()
    waiting.join(0.25)
    assert waiting.is_alive(), "there is nothing that it might do yet"
    stop.set()
    waiting.join(10)
    assert not waiting.is_alive()
    assert next(unfinished, None) is None


def test_after_the_stop_no_further_job_is_given_out() -> None:
    stop = threading.Event()
    jobs = Queue([a_run(FILES[0]), a_run(FILES[1])], to_hash=[]).jobs(stop.is_set)
    next(jobs)
    stop.set()
    assert next(jobs, None) is None


def outputs(folder: Path, *, damaged: Sequence[int] = ()) -> list[tuple[Path, list[OutputFile]]]:
    """Eight files of 4 MiB each, from sources of their own; the `damaged` ones end early."""
    files = []
    size = 4 << 20
    for i in range(8):
        source = folder / f"source-{i}"
        source.write_bytes(bytes([i]) * (10 if i in damaged else size))
        piece = Piece(source=stored(0, size, source), position=3, change=None)
        files.append(OutputFile(name=f"{i}", prefix=b"abc", size=size + 3, pieces=(piece,), verbatim=None))
    return [(folder / "out", files)]


def write(
    folder: Path, on_progress: Callable[[Progress], None], *, damaged: Sequence[int] = ()
) -> tuple[BaseException | None, list[int]]:
    """Write with four threads.

    The error that came out, and the bytes counted by then; no thread may be left.
    """
    counted = []

    def count(progress: Progress) -> None:
        counted.append(progress.done)
        on_progress(progress)

    before = set(threading.enumerate())
    error: BaseException | None = None
    try:
        with mock.patch("os.cpu_count", return_value=4):
            write_outputs(outputs(folder, damaged=damaged), link=False, digests=True, on_progress=count)
    except BaseException as raised:
        error = raised
    assert set(threading.enumerate()) <= before
    return error, counted


def slowly(progress: Progress) -> None:
    time.sleep(0.05)


def test_all_files_are_written_and_every_byte_is_counted_once(tmp_path: Path) -> None:
    error, counted = write(tmp_path, lambda progress: None)
    assert error is None
    assert counted == sorted(counted) and counted[-1] == 8 * (4 << 20)
    for i in range(8):
        assert (tmp_path / "out" / str(i)).read_bytes() == b"abc" + bytes([i]) * (4 << 20)


def test_an_error_in_one_thread_stops_the_others_and_is_the_one_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "IA3_EXPORT_PLAIN_IO", "1"
    )  # in blocks of half a megabyte, else a file goes in one step
    error, counted = write(tmp_path, slowly, damaged=[2])
    assert isinstance(error, DamagedFile) and "source-2" in str(error)
    assert max(counted) < 2 * (4 << 20), "the three others went on with their files"


def test_an_error_of_the_caller_stops_all_threads_and_is_the_one_raised(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done > 1 << 20:
            raise KeyError("the caller's own")

    error, _ = write(tmp_path, interrupt)
    assert isinstance(error, KeyError) and "the caller's own" in str(error)


def test_of_several_errors_one_is_raised(tmp_path: Path) -> None:
    error, _ = write(tmp_path, slowly, damaged=[0, 1, 2, 3, 4, 5, 6, 7])
    assert isinstance(error, DamagedFile)
