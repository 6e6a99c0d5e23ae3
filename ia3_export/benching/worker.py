"""The process that holds one variant: ``python -m ia3_export.benching.worker``, spoken to in lines of JSON.

It answers every line with one: its `Job` when its libraries are imported, ``load``, and ``round``, of which
the first warms up.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ia3_export.benching.jobs import Job, Runnable, Sources
from ia3_export.errors import IA3ExportError, kind_and_line
from ia3_export.onnx.tasks import Task

#: A round repeats short forwards: about this many seconds, at most so often.
_ROUND_SECONDS, _MOST = 0.1, 20


def main() -> None:
    """Serve one benchmark, to the end of standard input or the first error."""
    answers = _take_stdout()
    for answer in _serve(_listen()):
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # the thread that listens would be in the way of an orderly end


def _serve(commands: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The answers; the last one is what went wrong."""
    try:
        yield from _work(commands)
    except IA3ExportError as error:
        yield {"error": {"kind": type(error).__name__, "message": str(error), "hint": error.hint}}
    except Exception as error:  # of torch, transformers or onnxruntime, without a common base
        yield {"error": {"kind": "Unsupported", "message": kind_and_line(error), "hint": ""}}


def _work(commands: Iterator[str]) -> Iterator[dict[str, Any]]:
    job = read_job(next(commands))
    warnings.simplefilter("ignore")
    load = _import(job)
    yield {"resident": _resident()}
    next(commands)
    runnable = load(job)
    yield {}
    repeats = 0
    for _ in commands:
        forwards, steps = measure(runnable, repeats or 1, job.tokens)
        yield {"forward": forwards, "token": steps, "peak": _peak()}
        repeats = repeats or max(1, min(_MOST, int(_ROUND_SECONDS / forwards[0])))


def read_job(line: str) -> Job:
    """A `Job` from its JSON."""
    fields = json.loads(line)
    task = fields["task"] | {"outputs": tuple(fields["task"]["outputs"])}
    return Job(**(fields | {"task": Task(**task), "sources": Sources(**fields["sources"])}))


def measure(runnable: Runnable, repeats: int, tokens: int) -> tuple[list[float], list[float]]:
    """Seconds of `repeats` forwards and of `tokens` decoding steps, each by itself.

    One forward before them, to have the weights in this core's caches again, is not timed.
    """
    state = runnable.forward()
    forwards, steps = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        state = runnable.forward()
        forwards.append(time.perf_counter() - start)
    if runnable.step is not None:
        for _ in range(tokens):
            start = time.perf_counter()
            state = runnable.step(state)
            steps.append(time.perf_counter() - start)
    return forwards, steps


def _import(job: Job) -> Any:
    """Import what the variant needs, and give its loader."""
    if job.runtime == "ONNX Runtime":
        import onnxruntime  # noqa: F401

        from ia3_export.benching.onnx_side import load_onnx

        return load_onnx
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if job.variant == "unmerged":
        import peft  # noqa: F401
    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    from ia3_export.benching.torch_side import load_torch

    return load_torch


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands getrusage's figure on from parent to child, not this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _take_stdout() -> Any:
    """Standard output for answers alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _listen() -> Iterator[str]:
    """Yield the lines of standard input.

    When it ends, because the parent did, so does this process, in the middle of a forward if need be.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield lines.get()


if __name__ == "__main__":
    main()
