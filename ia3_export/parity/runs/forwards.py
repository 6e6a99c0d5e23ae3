"""The forwards that a verdict needs: the live model in its precisions, the base, and the merged model. One load each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ia3_export.adapters.combine import Combine
from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import ADAPTER_CONFIG, Checkpoint
from ia3_export.errors import Refused, Unsupported
from ia3_export.models.sentence import SentenceHead
from ia3_export.parity.metrics import EPSILON, largest
from ia3_export.parity.runs.greedy import Decoded, SpecialTokens, decode, prompts, special_tokens
from ia3_export.parity.runs.inputs import Case, is_decoder
from ia3_export.parity.runs.live import LiveModel, Placement, load_as_library_runs_it, load_live, load_plain
from ia3_export.parity.runs.quantized import is_bitsandbytes
from ia3_export.parity.runs.run_torch import Run, rounding_noise, run_torch

_LARGE = 64 << 20
TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, eq=False)
class Unmerged:
    """Base + live adapters: the `reference` in `precision`, the runs in coarser dtypes, and the base alone (`plain`). `refused`
    is what PEFT said where hooks applied the adapters instead.

    `decoded` is the reference's greedy decoding, None where the model cannot generate; `library` a quantized base with live
    adapters as its own library runs it, or `library_failure` why that cannot be had here. `hidden` is as in `run_torch`.
    """

    class_name: str
    applied_by: Literal["peft", "hooks", "none"]
    refused: str
    cases: Sequence[Case]
    precision: str
    reference: Run
    runs: Mapping[str, Run]
    plain: Run
    decoded: Sequence[Decoded] | None
    special: SpecialTokens
    library: Run | None
    causal: bool
    hidden: bool
    sentence: SentenceHead | None
    library_failure: str


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """The merged model's run in the working dtype, and where another runtime widens 16-bit weights, in float32 and 64."""

    run: Run
    decoded: Sequence[Decoded] | None
    single: Run | None
    double: Run | None


def run_unmerged(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    combine: Combine,
    weights: Sequence[float],
    dtypes: Sequence[str],
    where: Placement,
    make_cases: Callable[[Any], Sequence[Case]],
    *,
    hidden: bool,
    sentence: SentenceHead | None = None,
) -> Unmerged:
    """Run base + live adapters in each of `dtypes` (the first is the one it is loaded in), then in the reference
    precision, then without the adapters. A run in the reference's own dtype is made with `rounding_noise`; `make_cases` gives the inputs for the loaded model.

    Raises `Unsupported` when the model cannot be loaded or run, or gives NaN itself.
    """
    live = load_live(base, adapters, combine, weights, dtypes[0], where)
    cases = make_cases(live.inner)
    first = run_torch(live.model, cases, hidden=hidden, sentence=sentence, trace=True)
    causal = is_decoder(live.inner)
    if where.offload is not None:
        del live
        _free(base)
        live = load_live(base, adapters, combine, weights, "float32", where)
        precision, reference = (
            "float32",
            run_torch(live.model, cases, hidden=hidden, sentence=sentence, trace=True),
        )
    else:
        precision, reference = _widest(live, cases, hidden, sentence, where.precision)
    finite = _finite(reference, precision)
    cases, reference, first = [cases[i] for i in finite], reference.part(finite), first.part(finite)
    runs, decoded = {dtypes[0]: first}, None
    if where.offload is None:
        decoded = decode(live.model, prompts(cases))
        for dtype in dtypes[1:]:
            runs[dtype] = run_torch(
                _cast(live.model, dtype), cases, hidden=hidden, sentence=sentence, trace=True
            )
            _cast(live.model, precision)
    if (
        precision in runs
    ):  # the reference is no wider than what it is to judge: it would have no error of its own
        with rounding_noise(live.inner, EPSILON[precision]):
            runs[precision] = run_torch(live.model, cases, hidden=hidden, sentence=sentence, trace=True)
    with live.without_adapter():
        plain = run_torch(live.model, cases, hidden=hidden, sentence=sentence)
    class_name, by, refused, special = live.class_name, live.by, live.refused, special_tokens(live.model)
    del live
    _free(base)
    library, failure = None, ""
    if is_bitsandbytes(base):
        try:
            quantized = load_as_library_runs_it(base, adapters, class_name, where)
            library = None if quantized is None else run_torch(quantized, cases, hidden=hidden)
        except Unsupported as error:  # a comparison more than the proof needs
            failure = str(error)
    return Unmerged(
        class_name,
        by,
        refused,
        cases,
        precision,
        reference,
        runs,
        plain,
        decoded,
        special,
        library,
        causal,
        hidden,
        sentence,
        failure,
    )


def _finite(reference: Run, precision: str) -> list[int]:
    """The inputs on which the reference itself is finite: with padding on the left, some models divide zero by zero at the
    padded positions and carry that on."""
    finite = [i for i, output in enumerate(reference.outputs) if np.isfinite(largest([output]))]
    if 0 not in finite:
        raise Unsupported(
            f"the unmerged forward itself gives NaN or infinity in {precision}: there is nothing to compare with",
            hint="check base and adapter; a diverged training looks like this",
        )
    return finite


def run_merged(
    merged: Checkpoint, unmerged: Unmerged, dtype: str, where: Placement, *, widened: bool
) -> Merged:
    """Run the merged checkpoint on the same inputs in `dtype`, and if `widened` in float32 and float64 as well."""
    if merged.holds_adapter:
        raise Refused(
            f"{ADAPTER_CONFIG} lies beside the merged weights: transformers would apply that adapter to them",
            hint=f"move {ADAPTER_CONFIG} out of {merged.location.given}",
        )
    model = load_plain(merged, unmerged.class_name, None, dtype, where)
    hidden, sentence = unmerged.hidden, unmerged.sentence
    run = run_torch(model, unmerged.cases, hidden=hidden, sentence=sentence, trace=True)
    decoded = None
    if unmerged.decoded is not None:
        decoded = decode(model, prompts(unmerged.cases), unmerged.special)
    single = double = None
    if widened:
        single = run_torch(_cast(model, "float32"), unmerged.cases, hidden=hidden, sentence=sentence)
        if unmerged.precision == "float64":
            double = run_torch(_cast(model, "float64"), unmerged.cases, hidden=hidden, sentence=sentence)
    del model
    _free(merged)
    return Merged(run, decoded, single, double)


def _widest(
    live: LiveModel, cases: Sequence[Case], hidden: bool, sentence: SentenceHead | None, precision: str
) -> tuple[str, Run]:
    if precision == "float64":
        with suppress(Unsupported):  # an operator without a float64 kernel
            return precision, run_torch(
                _cast(live.model, precision), cases, hidden=hidden, sentence=sentence, trace=True
            )
    return "float32", run_torch(
        _cast(live.model, "float32"), cases, hidden=hidden, sentence=sentence, trace=True
    )


def _cast(model: Any, dtype: str) -> Any:
    import torch

    return model.to(getattr(torch, dtype))


def _free(base: Checkpoint) -> None:
    """Give a deleted model's memory back before the next is loaded (collecting takes longer than a small model)."""
    import torch

    if base.nbytes > _LARGE:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
