"""The chain of forwards: unmerged → merged → ONNX → its further precisions, all on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.errors import InputError, UsageError
from ia3_export.parity.facts import MergeOptions
from ia3_export.parity.forwards import (
    TORCH_DTYPES,
    Merged,
    Unmerged,
    run_merged,
    run_unmerged,
    working_dtypes,
)
from ia3_export.parity.gates import coarser
from ia3_export.parity.graph import Graph, precision_of
from ia3_export.parity.inputs import Case, make_cases
from ia3_export.parity.judging import Artifact, Tolerance, failed_step, judge, unmerged_distance
from ia3_export.parity.metrics import Outputs, compare, largest
from ia3_export.parity.own_inputs import fit_text, read_inputs, read_texts
from ia3_export.parity.reference import Placement
from ia3_export.parity.runners import exact_matmul, open_onnx, quiet, run_onnx
from ia3_export.report.model import Reference, Step, WeightsProof

#: A loaded model takes its parameters in the widest dtype it is run in, and as much again while it is cast or run.
_HEADROOM = 1.5


def run_chain(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    how: MergeOptions,
    merged: Checkpoint | None,
    judged: bool,
    graphs: Sequence[tuple[str, Graph]],
    proofs: Sequence[WeightsProof],
    sites: Mapping[str, Sequence[str]],
    *,
    scratch: Path,
    inputs: str | Path | None,
    text: str | Path | None,
    device: str,
    dtype: str,
    tf32: bool,
    tolerance: tuple[float, float] | None,
    max_memory: int | None,
    seed: int,
) -> tuple[Reference, tuple[Step, ...], list[str]]:
    """Run everything and judge it: the reference, a step for `merged` (if `judged`) and for each of `graphs`, warnings.

    Raises `UsageError` for a device that is not there, `Unsupported` when the live model cannot be loaded or run.
    """
    place = choose_device(device)
    warnings: list[str] = []
    with quiet(), exact_matmul(tf32):
        where = _placement(base, place, scratch, max_memory, warnings)
        stored = TORCH_DTYPES[base.main_dtype]
        written = TORCH_DTYPES[merged.main_dtype] if merged is not None else stored
        working = stored if dtype == "auto" else dtype
        precisions = {name: precision_of(graph) for name, graph in graphs}
        numeric = {name: "float32" if p in ("int8", "int4") else p for name, p in precisions.items()}
        used = written if dtype == "auto" else dtype  # in which the merged model runs
        needed = [coarser(used, written)] if merged is not None and judged else []
        needed += [coarser(written, p) for p in numeric.values()]
        texts = read_texts(text, base.folder) if text is not None else None
        given = read_inputs(inputs) if inputs is not None else None

        def cases_for(model: Any) -> list[Case]:
            if given is not None:
                return given
            if texts is not None:
                return [fit_text(case, model) for case in texts]
            return make_cases(model, seed=seed)

        hidden = any(graph.outputs == ("last_hidden_state",) for _, graph in graphs)
        unmerged = run_unmerged(
            base, adapters, how.combine, how.weights, working_dtypes([working, *needed], "auto"),
            where, cases_for, hidden=hidden,
        )  # fmt: skip
        steps: list[Step] = []
        before: Outputs = unmerged.runs[working].outputs
        runs: Merged | None = None
        tolerances = None if tolerance is None else Tolerance(*tolerance)
        if merged is not None:
            widened = (
                written in ("float16", "bfloat16") and "float32" in numeric.values() and where.offload is None
            )
            on = _torch_on(place)
            name, kind = merged.location.path.resolve().name, "merged"
            proof = next((p for p in proofs if p.kind == kind), None)
            try:
                runs = run_merged(merged, unmerged, used, where, widened=widened)
            except (InputError, ValueError, RuntimeError) as error:
                if not judged:
                    raise
                steps.append(failed_step(kind, "merged", name, written, on, f"it cannot be run: {error}"))
            if runs is not None and judged:
                every = range(len(unmerged.cases))
                artifact = Artifact(kind, "merged", name, used, written, on, runs.run.outputs, every)
                steps.append(judge(artifact, unmerged, len(adapters), before, runs, proof, tolerances, sites))
            before = runs.run.outputs if runs is not None else before
        for name, graph in graphs:
            session = open_onnx(graph.path, place)
            on = f"ONNX Runtime, {session.get_providers()[0]}"
            usable = [i for i, case in enumerate(unmerged.cases) if not case.past]
            outputs = run_onnx(session, [unmerged.cases[i] for i in usable])
            proof = next((p for p in proofs if p.name == name), None)
            artifact = Artifact(name, "onnx", graph.path.name, precisions[name], written, on, outputs, usable)
            steps.append(judge(artifact, unmerged, len(adapters), before, runs, proof, tolerances, sites))
            whole = [dict(case) for case in before]
            for i, output in zip(usable, outputs, strict=True):
                whole[i] |= output
            before = whole
        reference = _reference(unmerged, working, place)
    return reference, tuple(steps), [*warnings, *_weak(reference, steps)]


def choose_device(device: str) -> str:
    """``auto`` as cpu or cuda. Raises `UsageError` for another name, or a device that is not there."""
    import torch

    there = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if there else "cpu"
    if device != "cpu" and not device.startswith("cuda"):
        raise UsageError(f"--device {device} is no device", hint="there are auto, cpu, cuda[:N]")
    if device == "cpu":
        return device
    if not there:
        raise UsageError(f"--device {device}: no CUDA device is available", hint="use --device cpu")
    index = device.partition(":")[2] or "0"
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: there is no such CUDA device",
            hint=f"there are {torch.cuda.device_count()}, from cuda:0 on",
        )
    return device


def _torch_on(device: str) -> str:
    import torch

    return f"PyTorch on {device}" + (f" ({torch.cuda.get_device_name(device)})" if device != "cpu" else "")


def _placement(
    base: Checkpoint, device: str, scratch: Path, max_memory: int | None, warnings: list[str]
) -> Placement:
    """In memory if it fits in float64; with less, float32 and layer by layer."""
    import psutil

    free = psutil.virtual_memory().available
    if device != "cpu" and max_memory is None:
        import torch

        free = torch.cuda.mem_get_info(torch.device(device))[0]
    limit = free if max_memory is None else max_memory
    elements = sum(tensor.size for tensor in base.tensors.values())
    if 8 * elements * _HEADROOM <= limit:
        return Placement(device)
    if 4 * elements * _HEADROOM <= limit:
        warnings.append("the reference is float32: float64 does not fit into memory")
        return Placement(device, None, 0, "float32")
    warnings.append(
        "the model does not fit into memory: it ran layer by layer, the reference in float32, without greedy decoding"
    )
    return Placement(device, scratch / "offload", int(limit / _HEADROOM), "float32")


def _reference(unmerged: Unmerged, dtype: str, device: str) -> Reference:
    outputs = unmerged.reference.outputs
    effect = compare(unmerged.plain.outputs, outputs, "float64").max_error
    return Reference(
        unmerged.applied_by, unmerged.class_name, unmerged.precision, dtype, _torch_on(device),
        tuple(case.name for case in unmerged.cases), unmerged_distance(unmerged, dtype), effect, largest(outputs),
    )  # fmt: skip


def _weak(reference: Reference, steps: Sequence[Step]) -> list[str]:
    """Where the control says that the forwards could not have told the artifact from the base."""
    limits = {step.name: gate.limit for step in steps for gate in step.gates if gate.name == "max error"}
    return [
        f"the adapters change the outputs by {reference.effect:.3g} only, hardly more than the bound {limit:.3g} of "
        f"{name}: its forwards could not tell it from the base, only the weights proof can"
        for name, limit in limits.items()
        if reference.effect <= 4 * limit
    ]
