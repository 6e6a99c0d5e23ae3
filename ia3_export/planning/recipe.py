"""How adapters are folded: decided once, carried by the plan, recorded in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ia3_export.arguments import check_fields, real
from ia3_export.errors import UsageError
from ia3_export.words import Cast, Combine, Dtype, Quantized, TokenizerChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How adapters are folded into a base.

    Two merges of the same inputs by the same recipe give the same tensors.

    Attributes:
        combine: ``product`` folds one adapter after the other; ``linear`` is PEFT's ``add_weighted_adapter``
            (``sum w l``); ``delta`` is ``1 + sum w (l - 1)``.
        weights: one number an adapter, for ``linear`` and ``delta``.
        cast: ``peft`` multiplies with the vector as saved; ``peft-low-mem`` rounds it to the
            base's dtype first.
        dtype: ``auto`` keeps every tensor's stored dtype (of dequantized ones the dtype that the checkpoint
            computes in); others convert all floating tensors, rounding once.
        quantized: of a quantized base. ``dequantize`` writes it dense; ``keep`` folds the vectors into the
            stored scales and leaves every code alone, or refuses; ``keep-or-dense`` writes the weights dense
            for which that is impossible.
        allow_missing: leave targeted modules without a vector as they are.
        allow_unused: drop vectors and tensors that have no place in the base.
        tokenizer: whose tokenizer, chat template, generation and processor settings the output
            gets: ``auto`` an adapter's where they differ from the base's and their ids fit the
            vocabulary, ``base``, or ``adapter``.

    Raises `UsageError` for values that are not offered.
    """

    combine: Combine = "product"
    weights: Sequence[float] = ()
    cast: Cast = "peft"
    dtype: Dtype = "auto"
    quantized: Quantized = "dequantize"
    allow_missing: bool = False
    allow_unused: bool = False
    tokenizer: TokenizerChoice = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "weights", real(self.weights))
        if self.quantized != "dequantize" and self.dtype != "auto":
            raise UsageError(
                f"--dtype {self.dtype} and --quantized {self.quantized} exclude each other",
                hint="what stays quantized has no dtype; --quantized dequantize writes it in one",
            )

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it under ``options``."""
        return asdict(self) | {"weights": list(self.weights)}

    @property
    def described(self) -> str:
        """What is not the default, in words."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{n} {v}" for n, v in shown.items() if v != getattr(DEFAULT_RECIPE, n))


#: What a merge does that is told nothing.
DEFAULT_RECIPE = Recipe()
