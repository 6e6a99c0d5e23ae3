"""``bench``: measure base, live adapter and merged model side by side."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from ia3_export.arguments import check_arguments
from ia3_export.benching.jobs import Job
from ia3_export.benching.processes import start_worker
from ia3_export.benching.results import Benchmark, Row, Timing, time_rounds
from ia3_export.benching.variants import Prepared, prepare
from ia3_export.errors import UsageError
from ia3_export.models.model_class import quiet
from ia3_export.parity.facts import environment, model_id
from ia3_export.writing.stage import scratch_folder

#: Pools of threads go on spinning for a while after their work is done.
_PAUSE = 0.01
#: Seconds for which the machine is watched before.
_LOOK = 0.5

Rounds = list[dict[str, Any]]


def bench(
    base: str | Path,
    adapters: Sequence[str | Path],
    *,
    task: str | None = None,
    precisions: Sequence[str] = ("fp32",),
    threads: int | None = None,
    length: int = 32,
    tokens: int = 32,
    batch: int = 1,
    rounds: int = 15,
    on_step: Callable[[str], None] | None = None,
) -> Benchmark:
    """Measure base, unmerged (live adapters) and merged model in PyTorch and in ONNX Runtime, in float32 on the CPU.

    Every variant is loaded once, in a process of its own; rounds go round-robin, so that the machine's noise hits all alike. The
    merged model and its graphs are made in a temporary folder and not compared with anything: `export_onnx` and `verify` do that.

    Args:
        base, adapters: as in `merge`.
        task: as in `export_onnx`.
        precisions: of ``fp32``, ``fp16``, ``int8``, ``int4``: in which the merged graphs are measured besides float32.
        threads: of PyTorch's and ONNX Runtime's operators; by default one for each physical core that is free to use.
        length: tokens of the text that a forward takes.
        tokens: greedy decoding steps after it, with the cache (models that generate).
        batch: sequences, images or sounds in a forward.
        rounds: of measuring, at least 5; one more, to warm up, is not counted.
        on_step: told what is being done.

    Raises `UsageError`, `InputError` and its kinds; what a worker fails with is raised here, too.
    """
    check_arguments(bench, locals())
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one --adapter")
    used = threads if threads is not None else free_cores()
    if min(used, length, tokens, batch) < 1 or rounds < 5:
        raise UsageError(
            "--threads, --length, --tokens and --batch are at least 1, --rounds at least 5",
            hint="the spread of fewer rounds says nothing",
        )
    say = on_step or (lambda _: None)
    with scratch_folder() as scratch:
        with quiet():
            setup = prepare(
                base, adapters, scratch, task=task, precisions=precisions, threads=used, length=length, tokens=tokens,
                batch=batch, say=say,
            )  # fmt: skip
        busy = psutil.cpu_percent(_LOOK)
        free, needed = psutil.virtual_memory().available, sum(v.memory for v in setup.variants)
        together = needed <= free
        if together:
            say(f"measuring {len(setup.variants)} variants in {rounds} rounds")
            measured = _run([v.job for v in setup.variants], rounds, scratch)
        else:
            say(
                f"{free / 1e9:.1f} GB of memory are free, all variants may take {needed / 1e9:.1f} GB: one runs after the other"
            )
            measured = [result for v in setup.variants for result in _run([v.job], rounds, scratch)]
    return Benchmark(
        model_id(setup.base.location), tuple(model_id(a.location) for a in setup.adapters), setup.task.name,
        {name: value.shape for name, value in setup.inputs.items()}, setup.variants[0].job.tokens, rounds, used,
        together, busy, _machine(), _rows(setup.variants, measured, batch),
    )  # fmt: skip


def free_cores() -> int:
    """Physical cores, as far as this process may use them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


def _run(jobs: Sequence[Job], rounds: int, scratch: Path) -> list[tuple[int, Rounds]]:
    """Resident memory after the imports, and the answers of all counted rounds, for each of `jobs`, which take turns."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(start_worker(job, scratch / f"worker-{i}.log")) for i, job in enumerate(jobs)
        ]
        results: list[tuple[int, Rounds]] = [(int(w.answer()["resident"]), []) for w in workers]
        for worker in workers:
            worker.tell("load")
        for worker in workers:
            worker.answer()
        for i in range(rounds + 1):
            # back and forth, so that none always follows the same other
            for worker, (_, answers) in list(zip(workers, results, strict=True))[:: 1 if i % 2 else -1]:
                time.sleep(_PAUSE)
                answer = worker.ask("round")
                if i > 0:
                    answers.append(answer)
        return results


def _rows(
    variants: Sequence[Prepared], measured: Sequence[tuple[int, Rounds]], batch: int
) -> tuple[Row, ...]:
    rows: list[Row] = []
    bases: dict[tuple[str, str], Timing] = {}
    for prepared, (imported, answers) in zip(variants, measured, strict=True):
        job = prepared.job
        timings: list[Timing | None] = []
        for measure in ("forward", "token"):
            rounds = [answer[measure] for answer in answers]
            timing = time_rounds(rounds, bases.get((job.runtime, measure))) if rounds[0] else None
            if timing is not None:
                bases.setdefault((job.runtime, measure), timing)
            timings.append(timing)
        forward, token = timings
        assert forward is not None
        rows.append(
            Row(
                job.runtime, job.variant, job.precision, forward, token,
                None if token is None else 1000 * batch / token.median, prepared.files, imported,
                max(answer["peak"] for answer in answers), prepared.operators,
            )
        )  # fmt: skip
    return tuple(rows)


def _machine() -> dict[str, Any]:
    versions = environment()
    versions.pop("machine")
    return {
        "system": f"{platform.system()} {platform.machine()}", "cpu": _cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False), "logical_cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total, "versions": versions,
    }  # fmt: skip


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
