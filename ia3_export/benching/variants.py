"""The jobs of a benchmark: adapters folded, graphs exported, inputs written."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter
from ia3_export.benching.jobs import Job, Sources, Variant
from ia3_export.benching.settings import FORMS, BenchSettings
from ia3_export.benching.torch_side import load_variant
from ia3_export.checkpoint.folder import Checkpoint, read_checkpoint
from ia3_export.checkpoint.manifest import read_manifest
from ia3_export.commands.export_onnx import export_onnx
from ia3_export.commands.merge import merge
from ia3_export.errors import UsageError
from ia3_export.fold import Array
from ia3_export.models.model_class import load_runtime_model, make_config
from ia3_export.onnx.contract import input_names, plan_graphs
from ia3_export.onnx.export import export_graphs
from ia3_export.onnx.files import size_of, walk_nodes
from ia3_export.onnx.options import DEFAULT_GRAPHS, GraphOptions
from ia3_export.onnx.swap import files_of
from ia3_export.onnx.tasks import Task, choose_task, sentence_head
from ia3_export.parity.runs.greedy import special_tokens
from ia3_export.parity.runs.inputs import make_cases, sample_inputs
from ia3_export.writing.options import OutputOptions

_TRACED: tuple[Variant, ...] = ("base", "unmerged")
_GENERATED = ("input_ids", "attention_mask")
#: Bytes of a process before it loads anything, and copies of the weights that it holds at most; with a margin
#: over what a model of 250 MB took.
_TORCH, _ONNX = (900_000_000, 1.5), (200_000_000, 2.5)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job, the bytes of its files, the memory it may take, and the operators of its graphs."""

    job: Job
    files: int
    memory: int
    operators: int | None


@dataclass(frozen=True, slots=True)
class Setup:
    """All variants, the base first in each runtime; `inputs` are the arguments of a forward."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    task: Task
    inputs: Mapping[str, Array]
    variants: tuple[Prepared, ...]


def prepare(
    base: str | Path,
    adapters: Sequence[str | Path],
    scratch: Path,
    settings: BenchSettings,
    say: Callable[[str], None],
) -> Setup:
    """Merge and export into `scratch`.

    Nothing is compared here: ``onnx`` and ``verify`` prove what they write.

    Raises `IA3ExportError` for inputs that cannot be read, merged or exported, `UsageError` for texts longer
    than the model takes.
    """
    checkpoint, read = read_checkpoint(base), tuple(read_adapter(source) for source in adapters)
    if settings.forms and len(read) != 1:
        raise UsageError(
            f"--forms {settings.forms[0]} runs one adapter at a time",
            hint="give one --adapter, or no --forms",
        )
    say("merging")
    merge(base, adapters, scratch / "merged", options=OutputOptions(digests="none", reload_check="none"))
    merged = read_checkpoint(scratch / "merged")
    runtime = load_runtime_model(checkpoint.config or {}, read[0], checkpoint.tensors)
    # an adapter may have been trained below or above the head of the base
    config = {**(merged.config or {}), "architectures": [runtime.class_name]}
    task = choose_task(config, asked=settings.task, sentence=(merged.folder / "modules.json").is_file())
    _check_length(make_config(runtime.config), task, settings)
    sources = Sources(
        str(checkpoint.folder), tuple(str(adapter.location.path) for adapter in read), str(merged.folder)
    )
    exported = export_onnx(
        scratch / "exported",
        model=merged.folder,
        graphs=GraphOptions(task=task.name, precisions=settings.precisions),
        check=False,
        on_step=lambda step: say(f"merged: {step}"),
    )
    graphs: dict[tuple[Variant, str], list[Path]] = {}
    for variant in _TRACED:
        say(f"{variant}: tracing")
        model = load_variant(variant, sources, task)
        graphs[variant, "fp32"] = _trace(model, task, checkpoint.folder, scratch / variant)
        inputs, start = _make_inputs(model, task, settings), special_tokens(model).start
        del model
        gc.collect()
    for precision in settings.precisions:
        files = [exported.folder / file.path for file in exported.files if file.precision == precision]
        graphs["merged", precision] = files
    np.savez(scratch / "inputs.npz", **inputs)  # type: ignore[arg-type]
    first = Job(
        runtime="PyTorch",
        variant="base",
        precision="fp32",
        sources=sources,
        graphs=(),
        task=task,
        inputs=str(scratch / "inputs.npz"),
        start=start,
        threads=settings.used_threads,
        tokens=settings.tokens if task.form != "encoder" else 0,
    )
    graphs |= _forms(base, read, task, scratch, settings, say)
    stored = {"base": _weights(checkpoint), "merged": _weights(merged)}
    stored["unmerged"] = stored["base"] + [file for adapter in read for file in _vectors(adapter)]
    numbers = sum(math.prod(tensor.shape) for tensor in merged.tensors.values())
    jobs = [_with_adapter(job, read[0]) for job in _jobs(first, graphs)]
    variants = tuple(_weigh(job, stored.get(job.variant, []), numbers) for job in jobs)
    return Setup(checkpoint, read, task, inputs, variants)


def _jobs(first: Job, graphs: Mapping[tuple[Variant, str], Sequence[Path]]) -> Iterator[Job]:
    """All variants in PyTorch, of which `first` is one, then the graphs."""
    for variant in (*_TRACED, "merged"):
        yield replace(first, variant=variant)
    for (variant, precision), files in graphs.items():
        yield replace(
            first,
            runtime="ONNX Runtime",
            variant=variant,
            precision=precision,
            graphs=tuple(map(str, files)),
        )


def _forms(
    base: str | Path,
    adapters: Sequence[Adapter],
    task: Task,
    scratch: Path,
    settings: BenchSettings,
    say: Callable[[str], None],
) -> dict[tuple[Variant, str], list[Path]]:
    """The graphs of several tasks that are asked for."""
    graphs: dict[tuple[Variant, str], list[Path]] = {}
    for form in (form for form in FORMS if form in settings.forms):
        say(f"{form}: exporting")
        apart = export_onnx(
            scratch / form,
            base=base,
            adapters=adapters,
            graphs=GraphOptions(
                task=task.name,
                precisions=settings.precisions,
                swappable=form == "swappable",
                task_table=form == "task-table",
            ),
            check=False,
        )
        for precision in settings.precisions:
            files = [apart.folder / file.path for file in apart.files if file.precision == precision]
            graphs[form, precision] = files
    return graphs


def _with_adapter(job: Job, adapter: Adapter) -> Job:
    """`job` with what its graphs are told to run the adapter, where that is apart from them."""
    if job.variant == "task-table":
        return replace(job, row=1)
    if job.variant != "swappable":
        return job
    folder = Path(job.graphs[0]).parent.parent
    files = files_of(folder, read_manifest(folder), adapter.digest)
    return replace(job, active={name: str(file) for name, file in files.items()})


def _trace(model: Any, task: Task, folder: Path, target: Path) -> list[Path]:
    """The graphs of `model` as `export_onnx` makes them, in its order; live vectors become ``Mul`` nodes."""
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    sentence, decoder = sentence_head(folder, task), DEFAULT_GRAPHS.decoder
    specs = plan_graphs(model, task, sample_inputs(model), decoder, sentence)
    graphs = export_graphs(model, specs, target, DEFAULT_GRAPHS, stored=None, say=lambda _: None)
    return [graph.path for graph in graphs]


def _check_length(config: Any, task: Task, settings: BenchSettings) -> None:
    length, tokens = settings.length, settings.tokens
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    known = [size for size in (getattr(text, name, None) for name in names) if isinstance(size, int)]
    needed = {"decoder": length + tokens, "encoder-decoder": max(length, tokens + 1), "encoder": length}
    longest = max(known, default=0)
    if 0 < longest < needed[task.form]:
        raise UsageError(
            f"{needed[task.form]} positions are needed, the model has {longest}",
            hint="give a smaller --length or --tokens",
        )


def _make_inputs(model: Any, task: Task, settings: BenchSettings) -> dict[str, Array]:
    """Text of random tokens without padding; images and sound have the size that the model is made for."""
    length, batch = settings.length, settings.batch
    given = make_cases(model)[0].tensors
    if "input_ids" not in given:
        name = model.main_input_name
        return {name: given[name].expand(batch, *given[name].shape[1:]).contiguous().numpy()}
    ids = given["input_ids"][:1]
    ids = ids.repeat(batch, math.ceil(length / ids.shape[1]))[:, -length:].contiguous().numpy()
    names = [name for name in input_names(model) if task.form == "encoder" or name in _GENERATED]
    fill = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: fill.get(name, ids) for name in names}


def _weigh(job: Job, stored: Sequence[Path], numbers: int) -> Prepared:
    """`stored` are the files of the variant in PyTorch, which holds so many `numbers`."""
    if job.runtime == "PyTorch":
        fixed, copies = _TORCH
        return Prepared(job, _size(stored), fixed + int(copies * 4 * numbers), None)
    graphs = [Path(graph) for graph in job.graphs]
    size = sum(map(size_of, graphs))
    fixed, copies = _ONNX
    return Prepared(job, size, fixed + int(copies * size), sum(map(_count_operators, graphs)))


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _weights(checkpoint: Checkpoint) -> list[Path]:
    return [shard.path for shard in checkpoint.shards]


def _vectors(adapter: Adapter) -> list[Path]:
    place = adapter.location.path
    files = [place / name for name in adapter.files] if place.is_dir() else [place]
    return [file for file in files if file.suffix != ".json"]


def _count_operators(path: Path) -> int:
    """The nodes of a graph and of the bodies in it; constants are no operators."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return sum(node.op_type != "Constant" for node in walk_nodes(graph))
