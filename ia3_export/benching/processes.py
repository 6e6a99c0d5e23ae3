"""Workers, seen from the parent: started, asked, and ended with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ia3_export import errors
from ia3_export.benching.jobs import Job
from ia3_export.errors import IA3ExportError, Unsupported, last_line


@dataclass(frozen=True, slots=True, eq=False)
class Worker:
    """A running process with one variant in it; `log` holds what it wrote to standard error."""

    job: Job
    process: subprocess.Popen[str]
    log: Path

    def tell(self, line: str) -> None:
        """Send a command; its answer is read by `answer`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone: its answer says why

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises what the worker failed with, an `IA3ExportError`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = last_line(self.log.read_text(encoding="utf-8", errors="replace"))
            raise Unsupported(
                f"{self.job.name}: its process ended with {_describe(code)}" + (f": {last}" if last else ""),
                hint="it may have run out of memory: free some, or try a smaller --batch or --length",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _error(self.job.name, **answer["error"])
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        """`tell` and `answer`."""
        self.tell(line)
        return self.answer()


@contextmanager
def start_worker(job: Job, log: Path) -> Iterator[Worker]:
    """Start the process of `job`; its first answer comes when its libraries are imported.

    It ends with this context.
    """
    command = [sys.executable, "-P", "-m", "ia3_export.benching.worker"]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent, which ends the workers
        )
    try:
        worker = Worker(job, process, log)
        worker.tell(json.dumps(asdict(job)))
        yield worker
    finally:
        process.kill()
        process.communicate()


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _error(name: str, kind: str, message: str, hint: str) -> IA3ExportError:
    hint = hint or "try another --length, --batch or --task; otherwise please report the architecture"
    error: IA3ExportError = getattr(errors, kind, Unsupported)(f"{name}: {message}", hint=hint)
    return error
