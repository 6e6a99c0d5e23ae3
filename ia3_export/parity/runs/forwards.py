"""The forwards of a verdict, one load each: the live model in its precisions, the base, the merged one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.checkpoint.folder import ADAPTER_CONFIG, Checkpoint
from ia3_export.errors import Refused, Unsupported
from ia3_export.libraries import give_back
from ia3_export.parity.runs.greedy import Decoded, SpecialTokens, decode, prompts, special_tokens
from ia3_export.parity.runs.inputs import Case, is_decoder
from ia3_export.parity.runs.live import (
    FineTune,
    FittedClass,
    RunDevice,
    load_as_library_runs_it,
    load_live,
    load_plain,
)
from ia3_export.parity.runs.metrics import EPSILON, largest_magnitude
from ia3_export.parity.runs.quantized import is_bitsandbytes
from ia3_export.parity.runs.run_torch import ForwardOutputs, Wanted, rounding_noise, run_torch
from ia3_export.parity.runs.wrong import WrongRuns, run_wrong
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
    `wrong` are models that were made wrong, to see whether they could be told.
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
    wrong: WrongRuns


@dataclass(frozen=True, slots=True)
class InputMaker:
    """What makes the inputs for a loaded model, and whether the model may have to write them itself."""

    make: Callable[[Any], Sequence[Case]]
    sampled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class MergedRuns:
    """What the merged model gave in the working dtype (`run`), of 16 bits also in float32 (`single`) and,
    where another runtime widens it, in float64 (`double`).
    """

    run: ForwardOutputs
    decoded: Sequence[Decoded] | None
    single: ForwardOutputs | None
    double: ForwardOutputs | None


def run_unmerged(
    trained: FineTune,
    dtypes: Sequence[str],
    where: RunDevice,
    inputs: InputMaker,
    wanted: Wanted,
) -> UnmergedRuns:
    """Run base + live adapters in each of `dtypes`, in the reference precision, and without the adapters.

    The first of `dtypes` is the one it is loaded in. A run in the reference's own dtype is made with
    `rounding_noise`; `inputs` makes the inputs for the loaded model.

    Raises `Unsupported` when the model cannot be loaded or run, or gives NaN itself.
    """
    stored = trained.base.stored
    live = load_live(trained, dtypes[0], where)
    cast, runs = _caster(live.model, dtypes[0]), dict[str, ForwardOutputs]()
    # the vision tower of Llama 4 keeps what it computes in its first forward
    wide = where.offload is None and live.inner.config.get_text_config() is live.inner.config
    if wide and (inputs.sampled or where.precision == "float32"):
        cast("float32")  # products of 16 bits are slow where the processor has none
    cases, causal = inputs.make(live.inner), is_decoder(live.inner)
    if not wide:
        runs[dtypes[0]] = run_torch(live.model, cases, wanted, trace=True)
    if where.offload is not None:
        del live
        _free(stored)
        live = load_live(trained, "float32", where)
        precision, reference = "float32", run_torch(live.model, cases, wanted, trace=True)
    else:
        precision, reference = _widest(cast, cases, wanted, where.precision)
    finite = _finite(reference, precision)
    cases, reference = [cases[i] for i in finite], reference.part(finite)
    runs = {dtype: run.part(finite) for dtype, run in runs.items()}
    decoded, wrong = None, WrongRuns((), {})
    with live.without_adapter():
        plain = run_torch(live.model, cases, wanted)
    # a reference that is no wider than what it is to judge would have no error of its own
    if precision in dtypes:
        with rounding_noise(live.inner, EPSILON[precision]):
            runs[precision] = run_torch(live.model, cases, wanted, trace=True)
    if where.offload is None:
        decoded = decode(live.model, prompts(cases))
        if live.vectors:
            cast("float32")
            wrong = run_wrong(live, cases, reference.outputs, plain.outputs, wanted)
        # the dtype of the weights first, which it still holds exactly; those that were rounded stay so
        for dtype in sorted(set(dtypes) - runs.keys(), key=lambda d: (d != dtypes[0], EPSILON[d])):
            runs[dtype] = run_torch(cast(dtype), cases, wanted, trace=True)
    class_name, by, refused, special = live.class_name, live.by, live.refused, special_tokens(live.model)
    del live
    _free(stored)
    library, failure = _as_library_runs_it(trained, class_name, where, cases, wanted)
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
        wrong=wrong,
    )


def _as_library_runs_it(
    trained: FineTune, class_name: str, where: RunDevice, cases: Sequence[Case], wanted: Wanted
) -> tuple[ForwardOutputs | None, str]:
    """What a base of bitsandbytes gives on that library's layers, or why that cannot be had: it is a
    comparison more than the proof needs."""
    if not is_bitsandbytes(trained.base.stored):
        return None, ""
    try:
        quantized = load_as_library_runs_it(trained, class_name, where)
        return None if quantized is None else run_torch(quantized, cases, Wanted(wanted.hidden)), ""
    except Unsupported as error:
        return None, str(error)


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
    """Run the merged checkpoint on the same inputs in `dtype`, in float32 if that has 16 bits, and if
    `widened` also in float64."""
    if merged.stored.holds_adapter:
        raise Refused(
            f"{ADAPTER_CONFIG} lies beside the merged weights: transformers would apply that adapter to them",
            hint=f"move {ADAPTER_CONFIG} out of {merged.stored.location.given}",
        )
    model = load_plain(merged, FittedClass(unmerged.class_name), dtype, where)
    cast = _caster(model, dtype)
    run = run_torch(model, unmerged.cases, unmerged.wanted, trace=True)
    decoded = None
    if unmerged.decoded is not None:
        decoded = decode(model, prompts(unmerged.cases), unmerged.special)
    single = double = None
    if where.offload is None and dtype in ("float16", "bfloat16"):
        single = run_torch(cast("float32"), unmerged.cases, unmerged.wanted)
        if widened and where.precision == "float64":
            double = run_torch(cast("float64"), unmerged.cases, unmerged.wanted)
    del model
    _free(merged.stored)
    return MergedRuns(run, decoded, single, double)


def _widest(
    cast: Callable[[str], Any], cases: Sequence[Case], wanted: Wanted, precision: str
) -> tuple[str, ForwardOutputs]:
    if precision == "float64":
        with suppress(Unsupported):  # an operator without a float64 kernel
            return precision, run_torch(cast(precision), cases, wanted, trace=True)
    return "float32", run_torch(cast("float32"), cases, wanted, trace=True)


def _caster(model: Any, loaded: str) -> Callable[[str], Any]:
    """A function that gives `model`, which was `loaded` in a dtype, in another, as often as one likes.

    What was loaded in another (frequencies of rotary embeddings, PEFT's vectors) is always made of that:
    ``Module.to`` there and back would round it.
    """
    import torch

    def tensors() -> Iterator[tuple[str, Any]]:
        yield from model.named_parameters()
        yield from model.named_buffers()

    narrow = getattr(torch, loaded)
    kept = {
        name: tensor.detach().clone()
        for name, tensor in tensors()
        if tensor.is_floating_point() and tensor.dtype != narrow
    }

    def cast(dtype: str) -> Any:
        model.to(getattr(torch, dtype))
        for name, tensor in tensors():
            if name in kept:
                tensor.data = kept[name].clone() if dtype == loaded else kept[name].to(getattr(torch, dtype))
        return model

    return cast


def _free(base: Checkpoint) -> None:
    """Give a deleted model's memory back before the next is loaded; of a small one collecting takes longer
    than that.
    """
    import torch

    if base.nbytes > _LARGE:
        give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
