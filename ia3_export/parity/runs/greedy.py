"""Greedy decoding beside the reference: do both models write the same text?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.parity.runs.generation import generate, special_ids
from ia3_export.parity.runs.inputs import Case
from ia3_export.parity.runs.run_torch import inner_model, place
from ia3_export.report.model import Generation

TOKENS = 12


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """Generated token ids (sequences, steps) and the logits behind them (sequences, steps, vocabulary)."""

    tokens: Array
    logits: Array


#: What generation makes itself.
_OWN_INPUTS = ("decoder_input_ids", "position_ids")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The token that an encoder-decoder's decoder starts with (-1: none), and those that end a text."""

    start: int
    ends: tuple[int, ...]


def special_tokens(model: Any) -> SpecialTokens:
    """Those of the model's generation configuration, as `decode` uses them."""
    ids = special_ids(inner_model(model))
    start = next((ids[n] for n in ("decoder_start_token_id", "bos_token_id") if ids[n] is not None), -1)
    ends = ids["eos_token_id"]
    return SpecialTokens(
        int(start), tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),)
    )


def prompts(cases: Sequence[Case]) -> list[Case]:
    """The cases to generate from: the first, and one with padding on the left if there is one."""
    whole = [case for case in cases if not case.past and "labels" not in case.tensors]
    padded = [case for case in whole if case.side == "left"]
    return whole[:1] + padded[:1]


def decode(model: Any, cases: Sequence[Case], special: SpecialTokens | None = None) -> list[Decoded] | None:
    """Greedy decoding of `TOKENS` tokens after each of `cases`, with the cache; None if `model` cannot
    generate.

    What ends a text is not chosen, so that of a reference must be `special`: a merge may have taken the
    adapter's own.
    """
    import torch

    inner = inner_model(model)
    ids = special_ids(inner)
    if special is not None:
        start = special.start if special.start >= 0 else None
        ids |= {"eos_token_id": list(special.ends) or None, "decoder_start_token_id": start}
    results = []
    for case in cases:
        inputs = {name: v for name, v in place(inner, case.tensors).items() if name not in _OWN_INPUTS}
        out = generate(inner, inputs, TOKENS, ids)
        if out is None:
            return None
        logits = torch.stack(list(out.logits), dim=1).double().cpu().numpy()
        results.append(Decoded(out.sequences[:, -logits.shape[1] :].cpu().numpy(), logits))
    return results or None


def compare_decoded(got: Sequence[Decoded], reference: Sequence[Decoded], bound: float) -> Generation:
    """Where `got` first leaves the reference; excused where the reference's first two logits are within twice
    `bound`.
    """
    tokens = max(r.tokens.shape[1] for r in reference)
    sequences = sum(len(r.tokens) for r in reference)
    first: tuple[int, float] | None = None
    excused = True
    for mine, theirs in zip(got, reference, strict=True):
        for row, expected, logits in zip(mine.tokens, theirs.tokens, theirs.logits, strict=True):
            steps = np.flatnonzero(row != expected)
            if not len(steps):
                continue
            at = int(steps[0])
            distance = float(logits[at][expected[at]] - logits[at][row[at]])
            excused &= distance <= 2 * bound
            if first is None or (at, -distance) < (first[0], -first[1]):
                first = at, distance
    step, margin = first if first is not None else (None, None)
    return Generation(tokens, sequences, step, margin, excused)
