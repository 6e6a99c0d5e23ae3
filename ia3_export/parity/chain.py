"""The chain of forwards: unmerged → merged → ONNX → its further precisions, all on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.errors import DamagedFile, InputError, UsageError
from ia3_export.fold import Array
from ia3_export.models.model_class import quiet
from ia3_export.models.sentence import SentenceHead, read_sentence_head
from ia3_export.onnx.runtime import open_model
from ia3_export.parity.bits.graph_files import Graph
from ia3_export.parity.discrimination import untold
from ia3_export.parity.gates import coarser, computes_in
from ia3_export.parity.judging import Artifact, Evidence, failed_step, judge, unmerged_distance
from ia3_export.parity.runs.forwards import InputMaker, MergedRuns, UnmergedRuns, run_merged, run_unmerged
from ia3_export.parity.runs.greedy import prompts
from ia3_export.parity.runs.inputs import make_cases
from ia3_export.parity.runs.live import FineTune, RunDevice
from ia3_export.parity.runs.metrics import EPSILON, Outputs, distance_between, largest_magnitude
from ia3_export.parity.runs.own_inputs import find_tokenizer, fit_text, has_tokenizer, read_inputs, read_texts
from ia3_export.parity.runs.run_onnx import decode_onnx, run_onnx
from ia3_export.parity.runs.run_torch import Wanted, exact_matmul
from ia3_export.parity.settings import RunSettings
from ia3_export.quantization.base import Base
from ia3_export.report.model import Reference, Step
from ia3_export.words import TORCH_NAMES

#: A loaded model takes its parameters in the widest dtype it is run in, and as much again while
#: it is cast or run.
_HEADROOM = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is compared with the live model: a `merged` one (`judged`, or run for the graphs' sake alone) and
    named `graphs`.

    `rounded` is the dtype to which a merge that stays quantized rounded its scales. `live`: the graphs
    multiply activations with the vectors, beside the base's own weights, which nothing has rounded.
    """

    merged: Base | None
    judged: bool
    rounded: str | None
    graphs: Sequence[tuple[str, Graph]]
    live: bool = False


@dataclass(frozen=True, slots=True)
class _Dtypes:
    """Torch dtypes: of the live run (`working`), of the merged weights (`written`) and run (`used`)."""

    working: str
    written: str
    used: str


def run_chain(
    trained: FineTune, subject: Subject, evidence: Evidence, settings: RunSettings, scratch: Path
) -> tuple[Reference, tuple[Step, ...], list[str]]:
    """Run the live model, the merged one and the graphs on the same inputs, and judge each by the live one.

    The reference, a step for the merged model (if it is judged) and for each graph, warnings.

    Raises `UsageError` for a device that is not there, `Unsupported` when the live model cannot
    be loaded or run.
    """
    place = choose_device(settings.device)
    warnings: list[str] = []
    merged, graphs = subject.merged, subject.graphs
    for _, graph in graphs:
        if not graph.outputs:  # two bytes may be a valid protobuf
            raise DamagedFile(f"{graph.paths[-1]} holds no graph with outputs", hint="export the model again")
    trained.base.raise_problems()
    if merged is not None:
        merged.raise_problems()
    with quiet(), exact_matmul(settings.tf32):
        where = _run_device(trained.base.dense, place, scratch, settings.max_memory, warnings)
        dtypes = _dtypes(trained.base, subject, settings.dtype)
        numeric = [computes_in(graph.precision) for _, graph in graphs]
        needed = [coarser(dtypes.used, dtypes.written)] if merged is not None and subject.judged else []
        needed += [coarser(dtypes.written, precision) for precision in numeric]
        needed += [precision for precision in numeric if precision == "float16"]
        hidden = any(graph.outputs[0] in ("last_hidden_state", "token_embeddings") for _, graph in graphs)
        judged = list(dict.fromkeys([dtypes.working, *needed]))
        unmerged = run_unmerged(
            trained,
            judged,
            _reference_device(where, judged),
            _input_maker(_tokenizer_folder(trained.base, subject), settings),
            Wanted(hidden, _sentence_head(trained.base, graphs)),
        )
        if unmerged.library_failure:
            warnings.append(
                f"bitsandbytes cannot run this base here ({unmerged.library_failure}); nothing "
                "is compared with it"
            )
        before: Outputs = unmerged.runs[dtypes.working].outputs
        steps: list[Step] = []
        runs: MergedRuns | None = None
        if merged is not None:
            half = dtypes.written in ("float16", "bfloat16")
            widened = half and bool(graphs) and where.offload is None
            try:
                runs = run_merged(merged, unmerged, dtypes.used, where, widened=widened)
            except (InputError, ValueError, RuntimeError) as error:
                if not subject.judged:
                    raise
                steps.append(_not_run(merged, dtypes.written, place, error))
            if runs is not None and subject.judged:
                artifact = _merged_artifact(merged, runs, dtypes, place)
                steps.append(judge(artifact, unmerged, before, runs, evidence, settings.tolerance))
                before = runs.run.outputs
        for name, graph in graphs:
            artifact = _run_graph(name, graph, dtypes.written, place, unmerged)
            steps.append(judge(artifact, unmerged, before, runs, evidence, settings.tolerance))
            before = _after(before, artifact)
        reference = _reference(unmerged, dtypes.working, place)
        if unmerged.refused:
            warnings.append(f"PEFT cannot load the adapters, so hooks applied them: {unmerged.refused}")
    return reference, tuple(steps), [*warnings, *_weak(steps)]


def _dtypes(base: Base, subject: Subject, asked: str) -> _Dtypes:
    if subject.live:
        return _Dtypes("float32", "float32", "float32")
    # codes stand for float32 weights
    stored = "float32" if base.is_quantized else TORCH_NAMES[base.stored.main_dtype]
    merged = subject.merged
    written = TORCH_NAMES[merged.stored.main_dtype] if merged is not None else stored
    if merged is not None and merged.is_quantized:
        written = subject.rounded or written
        used = "float32"
    else:
        used = written
    return _Dtypes(stored, written, used) if asked == "auto" else _Dtypes(asked, written, asked)


def _not_run(merged: Base, written: str, device: str, error: Exception) -> Step:
    file = merged.stored.location.path.resolve().name
    return failed_step("merged", "merged", file, written, _torch_on(device), f"it cannot be run: {error}")


def _merged_artifact(merged: Base, runs: MergedRuns, dtypes: _Dtypes, device: str) -> Artifact:
    outputs = runs.run.outputs
    return Artifact(
        name="merged",
        kind="merged",
        file=merged.stored.location.path.resolve().name,
        precision=dtypes.used,
        weights=dtypes.written,
        runs_on=_torch_on(device),
        outputs=outputs,
        cases=range(len(outputs)),
        decoded=runs.decoded,
    )


def _tokenizer_folder(base: Base, subject: Subject) -> Path:
    """The folder whose tokenizer reads the texts: the artifact's, which may be the adapter's; the base's
    where it has none.
    """
    shipped = [subject.merged.stored.folder] if subject.merged is not None else []
    shipped += [graph.paths[0].parent.parent for _, graph in subject.graphs]
    return next((folder for folder in shipped if has_tokenizer(folder)), base.stored.folder)


def _input_maker(tokenizer: Path, settings: RunSettings) -> InputMaker:
    """What makes the inputs for a loaded model. The user's files are read now, before a model is."""
    if settings.inputs is not None:
        given = read_inputs(settings.inputs)
        return InputMaker(lambda _: given)
    if settings.text is not None:
        texts = read_texts(settings.text, tokenizer)
        return InputMaker(lambda model: [fit_text(case, model) for case in texts])
    reader = find_tokenizer(tokenizer)
    return InputMaker(
        lambda model: make_cases(model, seed=settings.seed, tokenizer=reader), sampled=reader is not None
    )


def _sentence_head(base: Base, graphs: Sequence[tuple[str, Graph]]) -> SentenceHead | None:
    wanted = any("sentence_embedding" in graph.outputs for _, graph in graphs)
    return read_sentence_head(base.stored.folder) if wanted else None


def _run_graph(name: str, graph: Graph, written: str, device: str, unmerged: UnmergedRuns) -> Artifact:
    model = open_model(graph.paths, device=device, adapters=graph.adapters, task=graph.task)
    usable = [i for i, case in enumerate(unmerged.cases) if model.cached or not case.past]
    outputs = run_onnx(model, [unmerged.cases[i] for i in usable])
    decoded = None
    if unmerged.decoded is not None:
        decoded = decode_onnx(model, prompts(unmerged.cases), unmerged.special)
    return Artifact(
        name=name,
        kind="onnx",
        file=graph.file,
        precision=graph.precision,
        weights=written,
        runs_on=f"ONNX Runtime, {model.provider}",
        outputs=outputs,
        cases=usable,
        decoded=decoded,
    )


def _after(before: Outputs, artifact: Artifact) -> list[dict[str, Array]]:
    """What the next step is compared with: the outputs of `artifact`, and on inputs it was not run on those
    `before` it.
    """
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


def _run_device(
    dense: Checkpoint, device: str, scratch: Path, max_memory: int | None, warnings: list[str]
) -> RunDevice:
    """In memory if it fits in float64; with less, float32 and layer by layer."""
    import psutil

    free = psutil.virtual_memory().available
    if device != "cpu" and max_memory is None:
        import torch

        free = torch.cuda.mem_get_info(torch.device(device))[0]
    limit = free if max_memory is None else max_memory
    elements = sum(tensor.size for tensor in dense.tensors.values())
    if 8 * elements * _HEADROOM <= limit:
        return RunDevice(device)
    if 4 * elements * _HEADROOM <= limit:
        warnings.append("the reference is float32: float64 does not fit into memory")
        return RunDevice(device, None, 0, "float32")
    warnings.append(
        "the model does not fit into memory: it ran layer by layer, the reference in float32, "
        "without greedy decoding"
    )
    return RunDevice(device, scratch / "offload", int(limit / _HEADROOM), "float32")


def _reference_device(where: RunDevice, judged: Sequence[str]) -> RunDevice:
    """Where the reference runs: in float32 if all that is `judged` by it has 16 bits, ten thousand times as
    coarse; it takes half the memory and half the time of float64."""
    coarse = all(EPSILON[dtype] > EPSILON["float32"] for dtype in judged)
    return replace(where, precision="float32") if coarse else where


def _reference(unmerged: UnmergedRuns, dtype: str, device: str) -> Reference:
    outputs = unmerged.reference.outputs
    effect = distance_between(unmerged.plain.outputs, outputs, "float64").max_error
    return Reference(
        applied_by=unmerged.applied_by,
        model_class=unmerged.class_name,
        precision=unmerged.precision,
        dtype=dtype,
        runs_on=_torch_on(device),
        inputs=tuple(case.name for case in unmerged.cases),
        origin=", ".join(dict.fromkeys(case.origin for case in unmerged.cases)),
        unmerged=unmerged_distance(unmerged, dtype),
        effect=effect,
        scale=largest_magnitude(outputs),
    )


def _weak(steps: Sequence[Step]) -> list[str]:
    """Where the forwards could hardly have told an artifact from a wrong one."""
    return [
        f"the forwards of {step.name} could not tell it from {name}, only the weights proof can"
        if factor < 1
        else f"the forwards of {step.name} would tell it from {name} by {factor:.1f} times the gates only"
        for step in steps
        for name, factor in untold(step)
    ]
