"""The chain of forwards: unmerged → merged → ONNX → its further precisions, all on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.errors import InputError, UsageError
from ia3_export.fold import Array
from ia3_export.models.model_class import quiet
from ia3_export.models.sentence import SentenceHead, read_sentence_head
from ia3_export.onnx.runtime import open_model
from ia3_export.parity.bits.graph_files import Graph
from ia3_export.parity.facts import MergeOptions
from ia3_export.parity.gates import NUMERIC, coarser
from ia3_export.parity.judging import Artifact, Tolerance, failed_step, judge, unmerged_distance
from ia3_export.parity.metrics import Outputs, compare, largest
from ia3_export.parity.runs.forwards import (
    TORCH_DTYPES,
    Merged,
    Unmerged,
    run_merged,
    run_unmerged,
)
from ia3_export.parity.runs.greedy import Decoded, prompts
from ia3_export.parity.runs.inputs import Case, make_cases
from ia3_export.parity.runs.live import Placement
from ia3_export.parity.runs.own_inputs import fit_text, has_tokenizer, read_inputs, read_texts
from ia3_export.parity.runs.quantized import as_dense
from ia3_export.parity.runs.run_onnx import decode_onnx, run_onnx
from ia3_export.parity.runs.run_torch import exact_matmul
from ia3_export.report.model import Reference, Step, WeightsProof

#: A loaded model takes its parameters in the widest dtype it is run in, and as much again while it is cast or run.
_HEADROOM = 1.5


def run_chain(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    how: MergeOptions,
    merged: Checkpoint | None,
    rounded: str | None,
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

    `rounded` is the dtype to which a merge that stays quantized rounded its scales.
    Raises `UsageError` for a device that is not there, `Unsupported` when the live model cannot be loaded or run.
    """
    place = choose_device(device)
    warnings: list[str] = []
    limits = None if tolerance is None else Tolerance(*tolerance)
    with quiet(), exact_matmul(tf32):
        dense = as_dense(base)
        where = _placement(dense, place, scratch, max_memory, warnings)
        # codes stand for float32 weights
        stored = TORCH_DTYPES[base.main_dtype] if dense is base else "float32"
        written = TORCH_DTYPES[merged.main_dtype] if merged is not None else stored
        codes = merged is not None and as_dense(merged) is not merged
        if codes:
            written = rounded or written
        working = stored if dtype == "auto" else dtype
        used = written if dtype == "auto" else dtype  # in which the merged model runs
        if codes and dtype == "auto":
            used = "float32"
        precisions = {name: graph.precision for name, graph in graphs}
        numeric = [NUMERIC.get(precision, precision) for precision in precisions.values()]
        needed = [coarser(used, written)] if merged is not None and judged else []
        needed += [coarser(written, precision) for precision in numeric]
        hidden = any(graph.outputs[0] in ("last_hidden_state", "token_embeddings") for _, graph in graphs)
        unmerged = run_unmerged(
            base, adapters, how.combine, how.weights, list(dict.fromkeys([working, *needed])), where,
            _case_maker(_tokenizer_folder(base, merged, graphs), inputs, text, seed), hidden=hidden, sentence=_sentence_head(base, graphs),
        )  # fmt: skip

        if unmerged.library_failure:
            warnings.append(
                f"bitsandbytes cannot run this base here ({unmerged.library_failure}); nothing is compared with it"
            )

        def step(
            artifact: Artifact, before: Outputs, runs: Merged | None, decoded: Sequence[Decoded] | None
        ) -> Step:
            proof = next((proof for proof in proofs if proof.name == artifact.name), None)
            return judge(artifact, unmerged, len(adapters), before, runs, decoded, proof, limits, sites)

        steps: list[Step] = []
        before: Outputs = unmerged.runs[working].outputs
        runs: Merged | None = None
        if merged is not None:
            widened = written in ("float16", "bfloat16") and "float32" in numeric and where.offload is None
            file = merged.location.path.resolve().name
            try:
                runs = run_merged(merged, unmerged, used, where, widened=widened)
            except (InputError, ValueError, RuntimeError) as error:
                if not judged:
                    raise
                finding = f"it cannot be run: {error}"
                steps.append(failed_step("merged", "merged", file, written, _torch_on(place), finding))
            if runs is not None and judged:
                every, outputs = range(len(unmerged.cases)), runs.run.outputs
                on = _torch_on(place)
                artifact = Artifact("merged", "merged", file, used, written, on, outputs, every)
                steps.append(step(artifact, before, runs, runs.decoded))
                before = outputs
        for name, graph in graphs:
            artifact, decoded = _run_graph(name, graph, precisions[name], written, place, unmerged)
            steps.append(step(artifact, before, runs, decoded))
            before = _after(before, artifact)
        reference = _reference(unmerged, working, place)
        if unmerged.refused:
            warnings.append(f"PEFT cannot load the adapters, so hooks applied them: {unmerged.refused}")
    weak = _weak(reference, steps) if adapters else []
    return reference, tuple(steps), [*warnings, *weak]


def _tokenizer_folder(
    base: Checkpoint, merged: Checkpoint | None, graphs: Sequence[tuple[str, Graph]]
) -> Path:
    """Whose tokenizer reads the texts: the artifact's, which may be the adapter's; the base's where it has none."""
    shipped = [merged.folder] if merged is not None else []
    shipped += [graph.paths[0].parent.parent for _, graph in graphs]
    return next((folder for folder in shipped if has_tokenizer(folder)), base.folder)


def _case_maker(
    tokenizer: Path, inputs: str | Path | None, text: str | Path | None, seed: int
) -> Callable[[Any], list[Case]]:
    """What makes the inputs for a loaded model. The user's files are read now, before a model is."""
    if inputs is not None:
        given = read_inputs(inputs)
        return lambda _: given
    if text is not None:
        texts = read_texts(text, tokenizer)
        return lambda model: [fit_text(case, model) for case in texts]
    return lambda model: make_cases(model, seed=seed)


def _sentence_head(base: Checkpoint, graphs: Sequence[tuple[str, Graph]]) -> SentenceHead | None:
    wanted = any("sentence_embedding" in graph.outputs for _, graph in graphs)
    return read_sentence_head(base.folder) if wanted else None


def _run_graph(
    name: str, graph: Graph, precision: str, written: str, device: str, unmerged: Unmerged
) -> tuple[Artifact, Sequence[Decoded] | None]:
    model = open_model(graph.paths, device=device)
    usable = [i for i, case in enumerate(unmerged.cases) if model.cached or not case.past]
    outputs = run_onnx(model, [unmerged.cases[i] for i in usable])
    decoded = None
    if unmerged.decoded is not None:
        decoded = decode_onnx(model, prompts(unmerged.cases), unmerged.special)
    on = f"ONNX Runtime, {model.provider}"
    return Artifact(name, "onnx", graph.file, precision, written, on, outputs, usable), decoded


def _after(before: Outputs, artifact: Artifact) -> list[dict[str, Array]]:
    """What the next step is compared with: the outputs of `artifact`, on inputs it was not run on those before it."""
    whole = [dict(case) for case in before]
    for i, output in zip(artifact.cases, artifact.outputs, strict=True):
        whole[i] |= output
    return whole


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
    dense: Checkpoint, device: str, scratch: Path, max_memory: int | None, warnings: list[str]
) -> Placement:
    """In memory if it fits in float64; with less, float32 and layer by layer."""
    import psutil

    free = psutil.virtual_memory().available
    if device != "cpu" and max_memory is None:
        import torch

        free = torch.cuda.mem_get_info(torch.device(device))[0]
    limit = free if max_memory is None else max_memory
    elements = sum(tensor.size for tensor in dense.tensors.values())
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
