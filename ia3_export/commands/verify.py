"""``verify``: does the shipped artifact compute what was trained?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ia3_export.adapters import read_adapter
from ia3_export.adapters.combine import Combine
from ia3_export.adapters.model import Adapter
from ia3_export.arguments import check_arguments, real
from ia3_export.checkpoint.folder import Checkpoint, read_checkpoint
from ia3_export.commands.merge import merge
from ia3_export.errors import UsageError
from ia3_export.onnx.exported import find_onnx
from ia3_export.parity.bits.folder import prove_folder
from ia3_export.parity.bits.graph import prove_graph
from ia3_export.parity.bits.graph_files import Graph, read_graphs
from ia3_export.parity.facts import (
    MergeOptions,
    digests,
    environment,
    merge_options,
    model_id,
    sites_of,
    summarize_sites,
)
from ia3_export.planning.base_match import folded_before
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.quantization.detection import find_quantization
from ia3_export.report.model import Reference, Report, Step, WeightsProof
from ia3_export.writing.execute import Progress
from ia3_export.writing.manifest import NAME
from ia3_export.writing.stage import scratch_folder

Dtype = Literal["auto", "float64", "float32", "float16", "bfloat16"]
#: Kinds of change by which an output has other values than the base's.
_VALUES = ("fold", "replace", "add", "untie")
_TORCH = {"BF16": "bfloat16", "F16": "float16"}
_SEEDS = 2**63


def verify(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    *,
    merged: str | Path | None = None,
    onnx: Sequence[str | Path] = (),
    base_onnx: str | Path | None = None,
    weights_only: bool = False,
    combine: Combine | None = None,
    weights: Sequence[float] = (),
    inputs: str | Path | None = None,
    text: str | Path | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    tf32: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Prove a merged folder and/or ONNX files equal to base + live adapters.

    First the weights: every changed tensor must be the fold of base and adapters bit for bit, every other the base's
    bytes. Then the forwards: the reference is the unmerged forward in float64, and an artifact is in parity when
    ``err(artifact) <= k * err(unmerged) + eps`` (docs/parity.md derives k and eps); quantized ONNX files have gates
    of their own. The control is the adapters' whole effect on the base.

    Args:
        base, adapters: as in `merge`. Without an adapter an ONNX file is compared with the model `base` itself.
        merged: folder that `merge` wrote. Of another tool's dense merge into a quantized base only the forwards are compared:
            its rounding is its own. With neither `merged` nor `onnx`, a merge into a temporary folder is verified.
        onnx: folders that `export_onnx` wrote (all precisions in them), or ``.onnx`` files, in the order of the chain.
        base_onnx: the base's own export, whose operators the graphs must then have.
        weights_only: no forward: streaming, in little memory, without torch unless a head or renamed tensors need it.
        combine, weights: how several adapters act together; by default what the manifest of `merged` says.
        inputs: ``.jsonl``, ``.npz`` or ``.safetensors`` file of forward arguments (`read_inputs`) instead of made-up ones.
        text: text file, a text a line, for the tokenizer of the artifact (of the base, where that has none).
        device: ``cpu``, ``cuda[:N]``, or ``auto``: cuda if there is one.
        dtype: in which PyTorch runs the live and the merged model; ``auto``: as stored.
        tf32: let CUDA use TF32 in float32 products.
        atol, rtol: ``|a - b| <= atol + rtol |b|`` replaces every gate, and the weights proof is shown but decides nothing.
        max_memory: bytes that models may take in memory; a larger one runs layer by layer, the rest on disk.
            Default: what is free.
        seed: of made-up inputs.
        on_progress: told how much of the weights has been compared.

    Raises `IA3ExportError` for inputs that cannot be read; a failed comparison is a `Report`, not an error.
    """
    check_arguments(verify, locals())
    weights = real(weights)
    onnx, tf32 = tuple(onnx), bool(tf32)
    adapters = tuple(adapters)
    if inputs is not None and text is not None:
        raise UsageError("--inputs and --text exclude each other", hint="give one of them")
    if any(number is not None and not 0 <= number < math.inf for number in (atol, rtol)):
        raise UsageError(
            "--atol and --rtol must be finite and at least 0", hint="for example --atol 1e-4 --rtol 1e-3"
        )
    if not 0 <= seed < _SEEDS or (max_memory is not None and max_memory <= 0):
        raise UsageError(
            "--seed is at least 0 and of 63 bits, --max-memory more than 0",
            hint="for example --seed 0 --max-memory 16GB",
        )
    if weights_only and merged is None and not onnx:
        raise UsageError("--weights-only needs --merged or --onnx", hint="give the folder that merge wrote")
    if not adapters and (merged is not None or not onnx):
        raise UsageError("no adapter given", hint="give at least one --adapter")
    checkpoint = read_checkpoint(base)
    read = [read_adapter(source) for source in adapters]
    shipped = read_checkpoint(merged) if merged is not None else None
    how, said = merge_options(
        checkpoint, shipped, len(read), combine, weights, "the manifest, or from the weights' dtype"
    )
    foreign = shipped is not None and not weights_only and _is_foreign(checkpoint, shipped)
    planned = _plan(checkpoint, read, how)  # what is refused has no unmerged forward either
    plan = None if foreign else planned
    read = list(planned.adapters)
    for problem in (folded_before(adapter, checkpoint) for adapter in read):
        if problem is not None:
            raise problem
    graphs = _name_graphs([read_graphs(paths) for location in onnx for paths in find_onnx(location)])
    base_graph = read_graphs(find_onnx(base_onnx)[0]) if base_onnx is not None else None
    overridden = atol is not None or rtol is not None
    with scratch_folder() as scratch:
        subject = shipped
        if shipped is None and not weights_only and (not graphs or _widened(checkpoint, graphs)):
            # without an adapter there is nothing to merge: the checkpoint itself is what the graphs must compute
            subject = _merge(base, read, how, scratch / "merged") if read else checkpoint
        judged = shipped is not None or not graphs  # a merge made for an ONNX file's sake is no artifact
        proofs: list[WeightsProof] = []
        warnings = said
        if plan is None:
            warnings.append(
                "the base is quantized and another tool merged into it, with roundings of its own: only forwards are compared"
            )
        else:
            warnings += plan.warnings
            if subject is not None and judged:
                proofs.append(prove_folder(plan, subject, on_progress=on_progress))
            plain = next((graph for _, graph in graphs if graph.precision == "float32"), None)
            proofs += [
                prove_graph(plan, graph, name, base_graph, float_graph=plain, alone=weights_only)
                for name, graph in graphs
            ]
        reference: Reference | None = None
        steps: tuple[Step, ...] = ()
        if not weights_only:
            from ia3_export.parity.chain import run_chain

            reference, steps, more = run_chain(
                checkpoint, read, how, subject, _rounded(plan), judged, graphs, proofs, sites_of(plan, read), scratch=scratch,
                inputs=inputs, text=text, device=device, dtype=dtype, tf32=tf32,
                tolerance=(atol or 0.0, rtol or 0.0) if overridden else None, max_memory=max_memory, seed=seed,
            )  # fmt: skip
            warnings += more
    proven = all(proof.passed for proof in proofs)
    if overridden and not proven:
        warnings.append("the weights are not bit for bit what a merge gives; --atol and --rtol decide alone")
    return Report(
        in_parity=(proven or (overridden and not weights_only)) and all(step.passed for step in steps),
        base=model_id(checkpoint.location),
        adapters=tuple(model_id(a.location) for a in read),
        weights=tuple(proofs),
        reference=reference,
        steps=tuple(steps),
        sites=summarize_sites(read),
        options=_shown_options(how, seed, atol, rtol, tf32),
        environment=environment(),
        digests=digests(checkpoint, read, shipped, [path for _, graph in graphs for path in graph.paths]),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _is_foreign(base: Checkpoint, merged: Checkpoint) -> bool:
    """Whether `merged` is a merge into a quantized base that another tool made."""
    return not (merged.folder / NAME).is_file() and bool(find_quantization(base).packed)


def _rounded(plan: Plan | None) -> str | None:
    """The coarsest dtype that vectors were folded into, of a merge that stays quantized. GGUF's scales are float16 numbers
    inside the blocks of codes."""
    if plan is None or not plan.kept:
        return None
    dtypes = {change.dtype for change in plan.changes.values() if change.how in _VALUES}
    if plan.base.is_gguf:
        dtypes.add("F16")
    if plan.cast == "peft-low-mem":  # the vectors themselves are rounded
        dtypes.add(plan.quantization.kept)
    return next((_TORCH[dtype] for dtype in ("BF16", "F16") if dtype in dtypes), "float32")


def _plan(base: Checkpoint, adapters: Sequence[Adapter], how: MergeOptions) -> Plan:
    plan = make_plan(
        base, adapters, combine=how.combine, weights=how.weights, cast=how.cast, dtype=how.dtype, quantized=how.quantized,
        allow_missing=how.allow_missing, allow_unused=how.allow_unused, tokenizer=how.tokenizer,
    )  # fmt: skip
    plan.raise_problems()
    return plan


def _merge(base: str | Path, adapters: Sequence[Adapter], how: MergeOptions, target: Path) -> Checkpoint:
    merge(
        base,
        adapters,
        target,
        combine=how.combine,
        weights=how.weights,
        cast=how.cast,
        dtype=how.dtype,
        quantized=how.quantized,
        tokenizer=how.tokenizer,
        digests="none",
        reload_check=False,
    )
    return read_checkpoint(target)


def _name_graphs(graphs: Sequence[Graph]) -> list[tuple[str, Graph]]:
    """``onnx float32``, ``onnx int8``, ...; the file name is added where two have the same precision."""
    names = [f"onnx {graph.precision}" for graph in graphs]
    return [
        (name if names.count(name) == 1 else f"{name} {i + 1}", graph)
        for i, (name, graph) in enumerate(zip(names, graphs, strict=True))
    ]


def _widened(base: Checkpoint, graphs: Sequence[tuple[str, Graph]]) -> bool:
    """Whether a graph computes in float32 what is stored in 16 bits."""
    return base.main_dtype in ("F16", "BF16") and any(graph.precision == "float32" for _, graph in graphs)


def _shown_options(
    how: MergeOptions, seed: int, atol: float | None, rtol: float | None, tf32: bool
) -> dict[str, str]:
    options: dict[str, Any] = {
        "combine": how.combine, "weights": ",".join(map(str, how.weights)), "cast": how.cast, "dtype": how.dtype,
        "quantized": "" if how.quantized == "dequantize" else how.quantized,
        "allow_missing": how.allow_missing or "", "allow_unused": how.allow_unused or "", "tokenizer": "" if how.tokenizer == "auto" else how.tokenizer, "seed": seed,
        "atol": "" if atol is None else atol, "rtol": "" if rtol is None else rtol, "tf32": "on" if tf32 else "",
    }  # fmt: skip
    return {name: str(value) for name, value in options.items() if value != ""}
