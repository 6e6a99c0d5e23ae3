"""What every benchmark here needs.

Time and memory of a process, rounds that interleave, medians, the machine, tables.

A run is one fresh process, timed from its start to its end. Each round runs every variant once and starts one
variant later than the round before, so none always follows the same neighbour; slow variants run in some of
the rounds, spread evenly. Before a run, untimed: the former output goes, the disk is synced, and the base is
read once (warm) or the page cache is dropped (cold: the base, python and every library come from the disk, or
from what the host of a virtual machine caches). Nothing is synced inside the timed part unless the variant
does it itself.

CPU is user + system. Peak RSS counts mapped file pages; no process can show less than the script that started
it, so nothing large is imported here, and scripts make their models in children. "disk read" is what the
process itself fetched from the disk: near zero when warm, at least the base when cold; otherwise the label
does not hold.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB = 1024 * 1024
SHARD_SIZE = "800MB"  # as the shards of the base, for every variant that rewrites them
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of making the output, and a cheap command that brings its libraries into memory."""

    name: str
    command: tuple[str, ...]
    warm_up: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    slow: bool = False
    optional: bool = False  # a failure leaves the row out instead of ending the benchmark


@dataclass(frozen=True)
class Usage:
    """What one process took, its children that it waited for included."""

    wall_s: float
    cpu_s: float
    peak_rss_mib: float
    disk_read_mib: float


@dataclass(frozen=True)
class Run:
    """One measured run of a variant."""

    variant: str
    cache: str
    round: int
    usage: Usage


@dataclass(frozen=True, kw_only=True)
class Row:
    """All runs of one variant in one state of the cache."""

    variant: str
    cache: str
    runs: int
    wall_median_s: float
    wall_min_s: float
    ratio_to_cp: float | None  # median over the rounds of wall / wall of cp in the same round
    cpu_median_s: float
    peak_rss_mib: float
    disk_read_median_mib: float


@dataclass(frozen=True)
class Comparison:
    """One merged output beside another (`unlike`: the tensors that differ) and beside the base."""

    variant: str
    tensors: int
    changed_by_merge: int
    unlike: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a benchmark of merges works: the two inputs and a folder that is emptied before every run."""

    base: Path
    adapter: Path
    run: Path

    @property
    def output(self) -> Path:
        return self.run / "out"


class CommandFailed(Exception):
    """A measured command ended with a non-zero exit code, or could not be started."""


# --- one process ---


def child_environment(extra: Iterable[tuple[str, str]]) -> dict[str, str]:
    """This process's own, offline and quiet, with `extra`."""
    environment = dict(os.environ)
    environment.pop("IA3_EXPORT_PLAIN_IO", None)
    environment.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    environment.update(extra)
    return environment


def measure(
    command: Sequence[str],
    extra_environment: Iterable[tuple[str, str]] = (),
    *,
    whole_tree: bool = False,
    accepted: Collection[int] = (0,),
) -> Usage:
    """Run a command to its end, start-up included. Raises `CommandFailed` with the last lines of its stderr
    for an exit code that is not `accepted`.

    Peak RSS is that of the largest process; with `whole_tree` the largest sum over the tree that a look every
    20 ms found, if that is more.
    """
    environment = child_environment(extra_environment)
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=environment
            )
        except OSError as problem:
            raise CommandFailed(f"{command[0]}: {problem}") from problem
        sums = [0]
        if whole_tree:
            threading.Thread(target=_watch, args=(child.pid, sums), daemon=True).start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode not in accepted:
            log.seek(0)
            tail = log.read().decode(errors="replace").strip().splitlines()[-12:]
            raise CommandFailed("\n".join([f"exit code {child.returncode}: {' '.join(command)}", *tail]))
    return Usage(
        wall_s=wall,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_mib=max(sums[0] / MIB, usage.ru_maxrss / 1024),
        disk_read_mib=usage.ru_inblock * 512 / MIB,
    )


def _watch(pid: int, largest: list[int]) -> None:
    """Keep the largest sum of the resident sizes of a process and its descendants in ``largest[0]``."""
    import psutil

    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in (root, *root.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            largest[0] = max(largest[0], total)
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        return


# --- folders and the page cache ---


def clear(folder: Path) -> None:
    """Make it anew, empty, and wait for the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()


def drop_caches() -> None:
    """Empty the page cache; root only."""
    os.sync()
    DROP_CACHES.write_text("3\n")


def read_into_cache(folder: Path) -> None:
    """Bring the files of a folder into the page cache."""
    buffer = bytearray(MIB)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def why_no_cold() -> str | None:
    """The reason why the page cache cannot be dropped here, or None."""
    if os.geteuid() != 0:
        return f"only root may write {DROP_CACHES}"
    try:
        drop_caches()
    except OSError as problem:
        return str(problem)
    return None


def size_mib(folder: Path, pattern: str = "*") -> float:
    """Of the files below `folder` that match `pattern`."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file()) / MIB


# --- what is measured ---


def our_program() -> str:
    """``ia3-export`` beside this python, or on the path."""
    beside = Path(sys.executable).parent / "ia3-export"
    found = str(beside) if beside.exists() else shutil.which("ia3-export")
    if found is None:
        sys.exit("ia3-export is not installed beside this python")
    return found


def our_variant(name: str, place: Place, options: tuple[str, ...], *, plain_io: bool = False) -> Variant:
    """``ia3-export merge`` with `options`."""
    inputs = ("--base", str(place.base), "--adapter", str(place.adapter))
    merge = (our_program(), "merge", *inputs, "--output", str(place.output), *options)
    environment = (("IA3_EXPORT_PLAIN_IO", "1"),) if plain_io else ()
    return Variant(name=name, command=merge, warm_up=(*merge, "--dry-run"), environment=environment)


def copy_variant(place: Place) -> Variant:
    """``cp -r`` of the base, which the others are compared with."""
    command = ("cp", "-r", str(place.base), str(place.output))
    return Variant(name="cp", command=command, warm_up=("cp", "--version"))


# --- rounds ---


def take_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Round and name: all names in every round, each round starting one later than the one before."""
    for index in range(rounds):
        shift = index % len(names)
        for name in (*names[shift:], *names[:shift]):
            yield index, name


def slow_runs_in(round_index: int, rounds: int, slow_rounds: int) -> bool:
    """Whether the slow variants take part in this round: in the first, and slow_rounds times in all."""
    return (round_index * slow_rounds) % rounds < slow_rounds


def run_rounds(
    variants: Sequence[Variant],
    place: Place,
    *,
    cache: str,
    rounds: int,
    slow_rounds: int,
    left_out: dict[str, str],
) -> list[Run]:
    """Measure all variants that are not `left_out`; what an optional one failed with is noted there."""
    runs: list[Run] = []
    by_name = {variant.name: variant for variant in variants}
    for index, name in take_turns(list(by_name), rounds):
        variant = by_name[name]
        if name in left_out or (variant.slow and not slow_runs_in(index, rounds, slow_rounds)):
            continue
        try:
            clear(place.run)
            if cache == "cold":
                drop_caches()
            else:
                if index == 0:
                    measure(variant.warm_up, variant.environment)
                read_into_cache(place.base)
            usage = measure(variant.command, variant.environment)
        except CommandFailed as problem:
            if not variant.optional:
                raise
            left_out[name] = str(problem)
            print(f"{name} is left out: {problem}", file=sys.stderr)
            continue
        runs.append(Run(name, cache, index + 1, usage))
        print(f"{cache} {index + 1}/{rounds} {name:<16}{usage.wall_s:8.2f} s", file=sys.stderr)
    return [run for run in runs if run.variant not in left_out]


def median_ratio(ones: Iterable[float], others: Iterable[float]) -> float:
    """Of what was measured in the same rounds."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def summarize(runs: Sequence[Run], names: Iterable[str]) -> list[Row]:
    """One row per variant that ran, in the order of `names`; all runs of the same cache state."""
    copies = {run.round: run.usage.wall_s for run in runs if run.variant == "cp"}
    rows = []
    for name in names:
        own = [run for run in runs if run.variant == name]
        if not own:
            continue
        walls = [run.usage.wall_s for run in own]
        beside_cp = [run for run in own if run.round in copies]
        ratio = (
            median_ratio((run.usage.wall_s for run in beside_cp), (copies[run.round] for run in beside_cp))
            if beside_cp
            else None
        )
        rows.append(
            Row(
                variant=name,
                cache=own[0].cache,
                runs=len(own),
                wall_median_s=statistics.median(walls),
                wall_min_s=min(walls),
                ratio_to_cp=ratio,
                cpu_median_s=statistics.median(run.usage.cpu_s for run in own),
                peak_rss_mib=max(run.usage.peak_rss_mib for run in own),
                disk_read_median_mib=statistics.median(run.usage.disk_read_mib for run in own),
            )
        )
    return rows


# --- the same result? ---


def compare(variant: str, output: Path, other: Path, base: Path) -> Comparison:
    """Names, dtypes, shapes and bytes of all tensors of `output` beside `other`.

    Imports torch: only after the last measurement, because a child cannot show a smaller peak RSS than the
    process it comes from.
    """
    import torch
    from safetensors import safe_open

    with ExitStack() as stack:

        def read_all(folder: Path) -> dict[str, torch.Tensor]:
            files = [stack.enter_context(safe_open(path, "pt")) for path in folder.glob("*.safetensors")]
            return {name: file.get_tensor(name) for file in files for name in file.keys()}  # noqa: SIM118

        def identical(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
            if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
                return False
            return bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))

        ours, theirs, plain = read_all(output), read_all(other), read_all(base)
        names = sorted({*ours, *theirs})
        unlike = tuple(name for name in names if not identical(ours.get(name), theirs.get(name)))
        changed = sum(not identical(tensor, plain.get(name)) for name, tensor in ours.items())
        return Comparison(variant, len(ours), changed, unlike)


# --- what is printed ---


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def first_line(command: Sequence[str]) -> str:
    """Of what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def machine_line(folder: Path, *more: str) -> str:
    """Cores, memory, kernel, file system of `folder`, releases; and `more`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    parts = [f"{cores()} cores", f"{memory:.0f} GiB", f"Linux {platform.release()} {platform.machine()}"]
    parts += [_filesystem_of(folder), f"python {platform.python_version()}"]
    libraries = ("ia3-export", "torch", "transformers", "peft", "safetensors")
    parts += [f"{name} {version(name)}" for name in libraries]
    return ", ".join([*parts, first_line(("cp", "--version")), *more])


def _filesystem_of(folder: Path) -> str:
    found, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, this_kind, *_ = line.split()
        if len(mount) >= len(found) and folder.resolve().is_relative_to(mount):
            found, kind = mount, this_kind
    return kind


def processor() -> str:
    """Its name, as the kernel of Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table for docs/benchmarks.md: the first `words` columns are words, the others figures."""
    rule = ["---"] * words + ["--:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def print_left_out(left_out: Mapping[str, str]) -> None:
    """What was not measured, and why."""
    for what, reason in left_out.items():
        print(f"left out: {what}: {reason}")


# --- options ---


def positive(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def chosen(text: str, names: Iterable[str]) -> tuple[str, ...]:
    """For argparse: some of `names`, separated by commas."""
    found = tuple(text.split(","))
    for name in found:
        if name not in names:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
    return found


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """One that prints the script's docstring as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
