"""A base as a merge sees it: what is stored, and the dense model that this stands for. Asked once, handed
on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ia3_export.checkpoint.folder import Checkpoint, read_checkpoint
from ia3_export.quantization.detection import Quantization, dense_view, find_quantization


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A checkpoint, a base or a merge of one, with the answers to the question how it is quantized.

    `stored` is what lies on disk, `dense` the same with every quantized weight as the dense tensor that it
    stands for (`stored` itself where none is).
    """

    stored: Checkpoint
    dense: Checkpoint
    quantization: Quantization

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is."""
        return bool(self.quantization.packed)

    def raise_problems(self) -> None:
        """Raise the reason why a quantized weight cannot be read; does nothing when there is none."""
        for problem in self.quantization.problems:
            raise problem


def make_base(stored: Checkpoint) -> Base:
    """Look how `stored` is quantized. What cannot be read is in ``quantization.problems``."""
    quantization = find_quantization(stored)
    dense = dense_view(stored, quantization) if quantization.packed else stored
    return Base(stored, dense, quantization)


def read_base(location: str | Path) -> Base:
    """`make_base` of what `read_checkpoint` finds at `location`, and its errors."""
    return make_base(read_checkpoint(location))
