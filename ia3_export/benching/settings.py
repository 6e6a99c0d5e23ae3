"""What may be chosen of a benchmark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ia3_export.arguments import check_fields
from ia3_export.errors import UsageError
from ia3_export.onnx.options import in_order

#: Graphs of several tasks.
Form = Literal["swappable", "task-table"]
FORMS: tuple[Form, ...] = ("swappable", "task-table")


def free_cores() -> int:
    """Physical cores, as far as this process may use them."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What `bench` measures, and how often.

    Attributes:
        task: as in `GraphOptions`.
        precisions: of ``fp32``, ``fp16``, ``int8``, ``int4``: in which the merged graphs are measured;
            float32 always is among them.
        forms: of ``swappable`` and ``task-table``: graphs in which the adapter is apart from the weights,
            measured with it in the same precisions.
        threads: of PyTorch's and ONNX Runtime's operators; by default one for each physical core that is free
            to use.
        length: tokens of the text that a forward takes.
        tokens: greedy decoding steps after it, with the cache (models that generate).
        batch: sequences, images or sounds in a forward.
        rounds: of measuring, at least 5; one more, to warm up, is not counted.

    Raises `UsageError`.
    """

    task: str | None = None
    precisions: Sequence[str] = ("fp32",)
    forms: Sequence[str] = ()
    threads: int | None = None
    length: int = 32
    tokens: int = 32
    batch: int = 1
    rounds: int = 15

    def __post_init__(self) -> None:
        check_fields(self)
        threads = 1 if self.threads is None else self.threads
        if min(threads, self.length, self.tokens, self.batch) < 1 or self.rounds < 5:
            raise UsageError(
                "--threads, --length, --tokens and --batch are at least 1, --rounds at least 5",
                hint="the spread of fewer rounds says nothing",
            )
        object.__setattr__(self, "precisions", in_order(("fp32", *self.precisions)))
        unknown = sorted(set(self.forms) - set(FORMS))
        if unknown:
            raise UsageError(f"--forms {unknown[0]} is not offered", hint=f"there are {', '.join(FORMS)}")
        object.__setattr__(self, "forms", tuple(dict.fromkeys(self.forms)))
        if "keep" in self.precisions:
            raise UsageError(
                "--precision keep is not measured: what bench merges is dense",
                hint="ia3-export onnx --precision keep writes the file; leave it out here",
            )

    @property
    def used_threads(self) -> int:
        """`threads`, or what they are by default."""
        return free_cores() if self.threads is None else self.threads


DEFAULT_SETTINGS = BenchSettings()
