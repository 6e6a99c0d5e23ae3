"""How the forwards of a proof are run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ia3_export.arguments import check_fields
from ia3_export.errors import UsageError
from ia3_export.words import RunDtype

_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Tolerance:
    """``numpy.allclose`` tolerances that replace the gates."""

    atol: float
    rtol: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """On which inputs, where and how exactly models are run, and what is compared.

    Attributes:
        inputs: file with the inputs (``.jsonl``, ``.npz`` or ``.safetensors``) by argument name;
            made up by default.
        text: file with one text a line, for the artifact's tokenizer, or the base's.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        dtype: in which PyTorch runs the live and the merged model; ``auto`` is the stored one.
        tf32: let CUDA use TF32 in float32 products.
        atol, rtol: ``|a - b| <= atol + rtol |b|`` replaces every gate, and the weights proof is shown but
            decides nothing.
        max_memory: bytes that models may take in memory; a larger one runs layer by layer, the rest on disk.
            Default: what is free.
        seed: of made-up inputs.

    Raises `UsageError` for values that are not offered.
    """

    inputs: str | Path | None = None
    text: str | Path | None = None
    device: str = "auto"
    dtype: RunDtype = "auto"
    tf32: bool = False
    atol: float | None = None
    rtol: float | None = None
    max_memory: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.inputs is not None and self.text is not None:
            raise UsageError("--inputs and --text exclude each other", hint="give one of them")
        if any(number is not None and not 0 <= number < math.inf for number in (self.atol, self.rtol)):
            raise UsageError(
                "--atol and --rtol must be finite and at least 0", hint="for example --atol 1e-4 --rtol 1e-3"
            )
        if not 0 <= self.seed < _SEEDS or (self.max_memory is not None and self.max_memory <= 0):
            raise UsageError(
                "--seed is at least 0 and of 63 bits, --max-memory more than 0",
                hint="for example --seed 0 --max-memory 16GB",
            )

    @property
    def tolerance(self) -> Tolerance | None:
        """What replaces the gates, if anything does."""
        if self.atol is None and self.rtol is None:
            return None
        return Tolerance(self.atol or 0.0, self.rtol or 0.0)


#: How forwards run that are told nothing.
DEFAULT_SETTINGS = RunSettings()
