"""The forwards of a verdict, one load each: the live model in its precisions, the base, the merged one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.checkpoint.folder import ADAPTER_CONFIG, Checkpoint
from ia3_export.errors import Refused, Unsupported
from ia3_export.parity.runs.greedy import Decoded, SpecialTokens, decode, prompts, special_tokens
from ia3_export.parity.runs.inputs import Case, is_decoder
from ia3_export.parity.runs.live import (
    FineTune,
    FittedClass,
    LiveModel,
    RunDevice,
    load_as_library_runs_it,
    load_live,
    load_plain,
)
from ia3_export.parity.runs.metrics import EPSILON, largest_magnitude
from ia3_export.parity.runs.quantized import is_bitsandbytes
from ia3_export.parity.runs.run_torch import ForwardOutputs, Wanted, rounding_noise, run_torch
from ia3_export.quantization.base import Base
from ia3_export.words import AppliedBy

_LARGE = 64 << 20


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class UnmergedRuns:
    """What base + live adapters (so many `adapters`) gave: the `reference` in `precision`, the `runs` in
    coarser dtypes, and the base alone (`plain`).

    `refused` is what PEFT said where hooks applied the adapters instead.

    `decoded` is the reference's greedy decoding, None where the model cannot generate; `library` a quantized
    base with live adapters as its own library runs it, or `library_failure` why that cannot be had here.
    """

    class_name: str
    adapters: int
    applied_by: AppliedBy
    refused: str
    wanted: Wanted
    cases: Sequence[Case]
    causal: bool
    precision: str
    reference: ForwardOutputs
    runs: Mapping[str, ForwardOutputs]
    plain: ForwardOutputs
    decoded: Sequence[Decoded] | None
    special: SpecialTokens
    library: ForwardOutputs | None
    library_failure: str


@dataclass(frozen=True, slots=True, eq=False)
class MergedRuns:
    """What the merged model gave in the working dtype (`run`) and, where another runtime widens 16-bit
    weights, in float32 (`single`) and float64 (`double`).
    """

    run: ForwardOutputs
    decoded: Sequence[Decoded] | None
    single: ForwardOutputs | None
    double: ForwardOutputs | None


def run_unmerged(
    trained: FineTune,
    dtypes: Sequence[str],
    where: RunDevice,
    make_cases: Callable[[Any], Sequence[Case]],
    wanted: Wanted,
) -> UnmergedRuns:
    """Run base + live adapters in each of `dtypes`, in the reference precision, and without the adapters.

    The first of `dtypes` is the one it is loaded in. A run in the reference's own dtype is made with
    `rounding_noise`; `make_cases` gives the inputs for the loaded model.

    Raises `Unsupported` when the model cannot be loaded or run, or gives NaN itself.
    """
    stored = trained.base.stored
    live = load_live(trained, dtypes[0], where)
    cases = make_cases(live.inner)
    first = run_torch(live.model, cases, wanted, trace=True)
    causal = is_decoder(live.inner)
    if where.offload is not None:
        del live
        _free(stored)
        live = load_live(trained, "float32", where)
        precision, reference = "float32", run_torch(live.model, cases, wanted, trace=True)
    else:
        precision, reference = _widest(live, cases, wanted, where.precision)
    finite = _finite(reference, precision)
    cases, reference, first = [cases[i] for i in finite], reference.part(finite), first.part(finite)
    runs, decoded = {dtypes[0]: first}, None
    if where.offload is None:
        decoded = decode(live.model, prompts(cases))
        for dtype in dtypes[1:]:
            runs[dtype] = run_torch(_cast(live.model, dtype), cases, wanted, trace=True)
            _cast(live.model, precision)
    # a reference that is no wider than what it is to judge would have no error of its own
    if precision in runs:
        with rounding_noise(live.inner, EPSILON[precision]):
            runs[precision] = run_torch(live.model, cases, wanted, trace=True)
    with live.without_adapter():
        plain = run_torch(live.model, cases, wanted)
    class_name, by, refused, special = live.class_name, live.by, live.refused, special_tokens(live.model)
    del live
    _free(stored)
    library, failure = None, ""
    if is_bitsandbytes(stored):
        try:
            quantized = load_as_library_runs_it(trained, class_name, where)
            library = None if quantized is None else run_torch(quantized, cases, Wanted(wanted.hidden))
        except Unsupported as error:  # a comparison more than the proof needs
            failure = str(error)
    return UnmergedRuns(
        class_name=class_name,
        adapters=len(trained.adapters),
        applied_by=by,
        refused=refused,
        wanted=wanted,
        cases=cases,
        causal=causal,
        precision=precision,
        reference=reference,
        runs=runs,
        plain=plain,
        decoded=decoded,
        special=special,
        library=library,
        library_failure=failure,
    )


def _finite(reference: ForwardOutputs, precision: str) -> list[int]:
    """The inputs on which the reference itself is finite.

    With padding on the left, some models divide zero by zero at the padded positions and carry that on.
    """
    finite = [i for i, output in enumerate(reference.outputs) if np.isfinite(largest_magnitude([output]))]
    if 0 not in finite:
        raise Unsupported(
            f"the unmerged forward itself gives NaN or infinity in {precision}: there is nothing to "
            "compare with",
            hint="check base and adapter; a diverged training looks like this",
        )
    return finite


def run_merged(
    merged: Base, unmerged: UnmergedRuns, dtype: str, where: RunDevice, *, widened: bool
) -> MergedRuns:
    """Run the merged checkpoint on the same inputs in `dtype`, if `widened` also in float32 and float64."""
    if merged.stored.holds_adapter:
        raise Refused(
            f"{ADAPTER_CONFIG} lies beside the merged weights: transformers would apply that adapter to them",
            hint=f"move {ADAPTER_CONFIG} out of {merged.stored.location.given}",
        )
    model = load_plain(merged, FittedClass(unmerged.class_name), dtype, where)
    run = run_torch(model, unmerged.cases, unmerged.wanted, trace=True)
    decoded = None
    if unmerged.decoded is not None:
        decoded = decode(model, prompts(unmerged.cases), unmerged.special)
    single = double = None
    if widened:
        single = run_torch(_cast(model, "float32"), unmerged.cases, unmerged.wanted)
        if unmerged.precision == "float64":
            double = run_torch(_cast(model, "float64"), unmerged.cases, unmerged.wanted)
    del model
    _free(merged.stored)
    return MergedRuns(run, decoded, single, double)


def _widest(
    live: LiveModel, cases: Sequence[Case], wanted: Wanted, precision: str
) -> tuple[str, ForwardOutputs]:
    if precision == "float64":
        with suppress(Unsupported):  # an operator without a float64 kernel
            return precision, run_torch(_cast(live.model, precision), cases, wanted, trace=True)
    return "float32", run_torch(_cast(live.model, "float32"), cases, wanted, trace=True)


def _cast(model: Any, dtype: str) -> Any:
    import torch

    return model.to(getattr(torch, dtype))


def _free(base: Checkpoint) -> None:
    """Give a deleted model's memory back before the next is loaded; of a small one collecting takes longer
    than that.
    """
    import torch

    if base.nbytes > _LARGE:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
