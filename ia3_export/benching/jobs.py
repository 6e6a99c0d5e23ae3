"""What a worker is told, and what it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ia3_export.onnx.tasks import Task

Runtime = Literal["PyTorch", "ONNX Runtime"]
Variant = Literal["base", "unmerged", "merged", "swappable", "task-table"]


@dataclass(frozen=True, slots=True)
class Sources:
    """Folders on this machine: the base, its adapters (folders or files), and what `merge` made of them."""

    base: str
    adapters: tuple[str, ...]
    merged: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One variant in one runtime.

    `graphs` are its ``.onnx`` files (none in PyTorch), `inputs` an ``.npz`` file with the arguments of a
    forward, `start` the token that an encoder-decoder's decoder starts with. Graphs of several tasks are run
    with `active`, an ``.onnx_adapter`` file by graph file, or with the `row` of their table.
    """

    runtime: Runtime
    variant: Variant
    precision: str
    sources: Sources
    graphs: tuple[str, ...]
    task: Task
    inputs: str
    start: int
    threads: int
    tokens: int
    active: Mapping[str, str] = field(default_factory=dict)
    row: int = 0

    @property
    def name(self) -> str:
        """``PyTorch unmerged``, ``ONNX Runtime merged int8``."""
        precision = "" if self.precision == "fp32" else f" {self.precision}"
        return f"{self.runtime} {self.variant}{precision}"


@dataclass(frozen=True, slots=True)
class Runnable:
    """A loaded model.

    `forward` gives a state from which `step` decodes one token greedily, giving the next state (None for
    models that generate nothing).
    """

    forward: Callable[[], Any]
    step: Callable[[Any], Any] | None
