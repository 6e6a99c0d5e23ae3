"""What may be chosen of an export: task, precisions, further runtimes, form of the decoder, operator set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ia3_export.arguments import check_fields
from ia3_export.errors import UsageError

#: merged: one decoder file that is its own first step; separate: optimum's two; if: those two in one ``If``
DecoderForm = Literal["merged", "separate", "if"]

#: The most exact ones first.
PRECISIONS = ("fp32", "keep", "fp16", "int8", "q8", "int4")
TARGETS = ("transformers.js", "optimum", "genai", "mobile")
#: torch translates to 18 and converts upwards; 24 is beyond some runtimes.
OPSETS = range(18, 24)


def in_order(precisions: Sequence[str]) -> tuple[str, ...]:
    """`precisions` without repetition, in the order of `PRECISIONS`. Raises `UsageError` for others,
    or none."""
    given = tuple(precisions)
    unknown = [name for name in given if name not in PRECISIONS]
    if unknown or not given:
        raise UsageError(
            f"--precision {unknown[0] if unknown else ''} is not offered",
            hint=f"there are {', '.join(PRECISIONS)}",
        )
    return tuple(name for name in PRECISIONS if name in given)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOptions:
    """Which graphs `export_onnx` makes of a model.

    Attributes:
        task: optimum's name or synonym (``text-generation``, ``fill-mask``, ...); inferred from the
            checkpoint by default.
        precisions: of ``fp32``, ``keep`` (the codes of a quantized base), ``fp16``, ``int8``, ``q8``,
            ``int4``, all from one trace; held once each, in this order.
        targets: beside transformers.js and optimum also ``genai`` (``genai_config.json``) and ``mobile``
            (``.ort`` files).
        decoder: form of an encoder-decoder's decoder: ``merged`` (one file that is its own first step),
            ``separate`` (optimum's decoder and decoder with past) or ``if`` (those two as branches of one
            ``If``, as optimum merges them).
        opset: ONNX operator set.
        budget: of ``int4``: bytes that its files may have together; the bits of each weight are chosen so
            that as little as possible is lost.
        keep_effect: of ``int4`` instead: the share of the adapters' effect that is to be left, from 0 to 1;
            chosen so that the files are as small as possible.
        max_loss: the most that a quantized file may lose to be written: mean KL divergence in nats, one minus
            the cosine where there are no logits. Default: any loss is written, and said.
        swappable: the base's graphs, with vectors that a run takes from a file of each adapter.
        task_table: the base's graphs, with a table of all adapters' vectors; an input says which row each
            element of a batch takes.

    Raises `UsageError` for what is not offered (a task: when the checkpoint is read).
    """

    task: str | None = None
    precisions: Sequence[str] = ("fp32",)
    targets: Sequence[str] = ()
    decoder: DecoderForm = "merged"
    opset: int = 20
    budget: int | None = None
    keep_effect: float | None = None
    max_loss: float | None = None
    swappable: bool = False
    task_table: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.opset not in OPSETS:
            raise UsageError(
                f"--opset {self.opset} is not offered",
                hint=f"there are {OPSETS[0]} to {OPSETS[-1]}; every runtime has 20",
            )
        object.__setattr__(self, "opset", int(self.opset))
        object.__setattr__(self, "precisions", in_order(self.precisions))
        object.__setattr__(self, "targets", tuple(self.targets))
        self._check_bits()
        self._check_apart()
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise UsageError(f"--max-loss {self.max_loss} is no loss", hint="give nats, such as 0.02")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown:
            raise UsageError(f"--target {unknown[0]} is not offered", hint=f"there are {', '.join(TARGETS)}")
        if "mobile" in self.targets and self.precisions == ("keep",):
            raise UsageError(
                "--target mobile makes no .ort file of --precision keep: it would hold the float32 weights",
                hint="add int8 or int4; ONNX Runtime's mobile packages read .onnx files too",
            )

    @property
    def apart(self) -> str | None:
        """The option that keeps adapters apart from the weights, if it is given."""
        return "--swappable" if self.swappable else "--task-table" if self.task_table else None

    def _check_apart(self) -> None:
        """Raise `UsageError` for what vectors that stay apart cannot have."""
        refused = {
            "--precision keep": "keep" in self.precisions,
            "--keep-effect": self.keep_effect is not None,
            "--target mobile": "mobile" in self.targets,
            "--decoder if": self.decoder == "if",
            "--target genai": self.task_table and "genai" in self.targets,  # it feeds no input of that name
            "--swappable": self.task_table and self.swappable,
        }
        asked = next((option for option, given in refused.items() if given), None)
        if self.apart is not None and asked is not None:
            raise UsageError(
                f"{'--task-table' if self.task_table else self.apart} makes no graphs of {asked}",
                hint="leave one of them out; a folded export has both",
            )

    def _check_bits(self) -> None:
        asked = [n for n, v in (("budget", self.budget), ("keep-effect", self.keep_effect)) if v is not None]
        if asked and "int4" not in self.precisions:
            raise UsageError(
                f"--{asked[0]} is about the bits of --precision int4, which is not asked for",
                hint="add int4 to --precision",
            )
        if len(asked) > 1:
            raise UsageError(
                "--budget and --keep-effect both decide how many weights have 4 bits", hint="give one of them"
            )
        if self.keep_effect is not None and not 0 < self.keep_effect < 1:
            raise UsageError(
                f"--keep-effect {self.keep_effect} is no share", hint="give a number such as 0.95"
            )
        if self.budget is not None and self.budget <= 0:
            raise UsageError(f"--budget {self.budget} is no size", hint="give bytes, such as 90_000_000")


DEFAULT_GRAPHS = GraphOptions()
