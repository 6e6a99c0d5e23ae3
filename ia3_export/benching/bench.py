"""``bench``: measure base, live adapter and merged model side by side."""

from __future__ import annotations

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
from ia3_export.benching.settings import DEFAULT_SETTINGS, BenchSettings
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
    settings: BenchSettings = DEFAULT_SETTINGS,
    *,
    on_step: Callable[[str], None] | None = None,
) -> Benchmark:
    """Measure base, unmerged (live adapters) and merged model: PyTorch and ONNX Runtime, float32, on the CPU.

    Every variant is loaded once, in a process of its own; rounds go round-robin, so that the machine's noise
    hits all alike. The merged model and its graphs are made in a temporary folder and not compared with
    anything: `export_onnx` and `verify` do that.

    Args:
        base, adapters: as in `merge`.
        settings: what is measured, and how often.
        on_step: told what is being done.

    Raises `UsageError`, `InputError` and its kinds; what a worker fails with is raised here, too.
    """
    check_arguments(bench, locals())
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one --adapter")
    say = on_step or (lambda _: None)
    with scratch_folder() as scratch:
        with quiet():
            setup = prepare(base, adapters, scratch, settings, say)
        busy = psutil.cpu_percent(_LOOK)
        free, needed = psutil.virtual_memory().available, sum(v.memory for v in setup.variants)
        together = needed <= free
        jobs = [variant.job for variant in setup.variants]
        if together:
            say(f"measuring {len(jobs)} variants in {settings.rounds} rounds")
            measured = _run(jobs, settings.rounds, scratch)
        else:
            say(
                f"{free / 1e9:.1f} GB of memory are free, all variants may take {needed / 1e9:.1f} GB: one "
                "runs after the other"
            )
            measured = [result for job in jobs for result in _run([job], settings.rounds, scratch)]
    return Benchmark(
        base=model_id(setup.base.location),
        adapters=tuple(model_id(adapter.location) for adapter in setup.adapters),
        task=setup.task.name,
        inputs={name: value.shape for name, value in setup.inputs.items()},
        tokens=jobs[0].tokens,
        rounds=settings.rounds,
        threads=settings.used_threads,
        interleaved=together,
        busy=busy,
        machine=_machine(),
        rows=_rows(setup.variants, measured, settings.batch),
    )


def _run(jobs: Sequence[Job], rounds: int, scratch: Path) -> list[tuple[int, Rounds]]:
    """Let `jobs` take turns for `rounds` rounds and one before them, which is not counted.

    Of each: resident memory after the imports, and the answers of all counted rounds.
    """
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
                runtime=job.runtime,
                variant=job.variant,
                precision=job.precision,
                forward=forward,
                token=token,
                tokens_per_second=None if token is None else 1000 * batch / token.median,
                files=prepared.files,
                imported=imported,
                peak=max(answer["peak"] for answer in answers),
                operators=prepared.operators,
            )
        )
    return tuple(rows)


def _machine() -> dict[str, Any]:
    versions = environment()
    versions.pop("machine")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "versions": versions,
    }


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
