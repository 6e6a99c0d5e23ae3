"""Exported graphs on the inputs of a proof: one forward a case, with the cache where there is one, and greedy
decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ia3_export.errors import Unsupported, first_line
from ia3_export.fold import Array
from ia3_export.onnx.exported import ENCODER
from ia3_export.onnx.runtime import (
    OnnxModel,
    Values,
    call,
    cross_step,
    encode,
    first_step,
    next_step,
    positions_of,
    self_step,
)
from ia3_export.parity.runs.greedy import TOKENS, Decoded, SpecialTokens
from ia3_export.parity.runs.inputs import Case
from ia3_export.parity.runs.run_torch import attended


def run_onnx(model: OnnxModel, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Outputs of every case (no cache among them); past tokens of a case run first.

    Raises `Unsupported` when a graph wants other inputs.
    """
    results = []
    for case in cases:
        tensors = {name: value.numpy() for name, value in case.tensors.items()}
        try:
            output = {name: value.numpy() for name, value in _forward(model, tensors, case.past).items()}
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            wanted = sorted(model.decoder.plain_inputs)
            raise Unsupported(
                f"the graph does not run on these inputs ({case.name}): {first_line(error)}",
                hint=f"it wants {', '.join(wanted)}; give them with --inputs",
            ) from None
        results.append(attended(case, output))
    return results


def decode_onnx(model: OnnxModel, cases: Sequence[Case], special: SpecialTokens) -> list[Decoded] | None:
    """Greedy decoding of `TOKENS` tokens after each of `cases`, step by step with the cache, as
    `parity.runs.greedy.decode` does it in PyTorch; None if the graphs have no cache."""
    if not model.cached:
        return None
    results = []
    for case in cases:
        inputs = {
            n: v.numpy() for n, v in case.tensors.items() if n not in ("decoder_input_ids", "position_ids")
        }
        batch = next(iter(inputs.values())).shape[0]
        whole = ENCODER in model.graphs
        step = first_step(model, inputs, np.full((batch, 1), special.start) if whole else inputs["input_ids"])
        tokens: list[Array] = []
        logits: list[Array] = []
        for i in range(TOKENS):
            if i > 0:
                step = next_step(model, step, tokens[-1])
            logits.append(step.outputs["logits"].numpy()[:, -1].astype("<f8"))
            allowed = logits[-1].copy()
            allowed[:, list(special.ends)] = -np.inf
            tokens.append(allowed.argmax(-1)[:, None])
        results.append(Decoded(np.concatenate(tokens, axis=1), np.stack(logits, axis=1)))
    return results


def _forward(model: OnnxModel, tensors: Mapping[str, Array], past: int) -> Values:
    if ENCODER in model.graphs:
        ids = tensors["decoder_input_ids"]
        before = encode(model, tensors)
        if past:
            before = cross_step(model, ids[:, :past], before)
        return cross_step(model, ids[:, past:], before).outputs
    if not model.cached:
        return call(model.decoder, tensors)
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask", np.ones(ids.shape, np.int64))
    positions = tensors.get("position_ids", positions_of(mask))
    cache: Values = {}
    if past:
        cache = self_step(model, ids[:, :past], mask[:, :past], positions[:, :past], {}).cache
    return self_step(model, ids[:, past:], mask, positions[:, past:], cache).outputs
