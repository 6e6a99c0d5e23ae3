"""``export_onnx``: a merged model as an ONNX folder, proven in ONNX Runtime before it is put in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ia3_export.adapters.model import Adapter
from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.manifest import MANIFEST
from ia3_export.checkpoint.ranges import hash_file
from ia3_export.commands.calibrating import mix_bits
from ia3_export.commands.export_source import ExportSource, fold, read_apart, read_model
from ia3_export.commands.export_verdict import lost, require
from ia3_export.commands.keeping import OTHER_FORM, KeptBase, find_codes, without_codes
from ia3_export.commands.moving import move_to_rows
from ia3_export.commands.swapping import prove_apart, write_apart
from ia3_export.commands.verify import Shipped, prove, read_exported
from ia3_export.drawing.files import write_whole
from ia3_export.errors import UsageError
from ia3_export.libraries import forget_graphs
from ia3_export.models.model_class import quiet
from ia3_export.onnx.blocks import Codes
from ia3_export.onnx.contract import plan_graphs
from ia3_export.onnx.export import TracedGraph, export_graphs
from ia3_export.onnx.exported import TASK, file_name
from ia3_export.onnx.files import size_of
from ia3_export.onnx.mix_page import mix_page
from ia3_export.onnx.mixing import Mix
from ia3_export.onnx.options import DEFAULT_GRAPHS, GraphOptions
from ia3_export.onnx.package import package
from ia3_export.onnx.precision import Coverage, convert_precision
from ia3_export.onnx.swap import attach_vectors, fill
from ia3_export.onnx.task_table import attach_tables, task_rows
from ia3_export.onnx.tasks import Task, choose_task, load_model, sentence_head
from ia3_export.parity.facts import model_id
from ia3_export.parity.runs.hooks import named_as_in
from ia3_export.parity.runs.inputs import Case, make_cases, sample_inputs
from ia3_export.parity.runs.own_inputs import find_tokenizer
from ia3_export.parity.runs.run_torch import exact_matmul
from ia3_export.parity.settings import RunSettings
from ia3_export.report.model import Report
from ia3_export.writing.card import BASE_CARD
from ia3_export.writing.manifest import as_folded, list_files, tool
from ia3_export.writing.stage import check_target, copy_file, scratch_folder, staged

SCHEMA = "ia3-export/onnx/2"
#: Bytes of weights in float32.
_LARGE = 200_000_000
#: Precisions whose codes are made here.
_ENCODED = frozenset({"int8", "q8", "int4"})
_NOT_COPIED = ("README.md", BASE_CARD, MANIFEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFile:
    """A graph that was written.

    Its path in the folder, its size with external data in bytes, and how many of its weights (bytes in
    float32) its precision reached. `left` names the weights it did not, and of ``keep`` `reasons` says why
    they are no codes of the base.
    """

    path: str
    precision: str
    size: int
    weight_bytes: int
    converted_bytes: int
    left: tuple[str, ...]
    reasons: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExport:
    """What `export_onnx` wrote.

    `report` compares every graph with the live adapters (or, without adapters, with the model). `bits` says
    which weights of int4 have 4 bits, and what each would cost. Of swappable graphs, and of those with a
    table, `report` is about runs without an adapter, `adapters` about those with each; `rows` says which row
    of the table is whose.
    """

    folder: Path
    task: str
    opset: int
    files: tuple[OnnxFile, ...]
    report: Report | None
    bits: Mix | None = None
    adapters: Mapping[str, Report] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def losses(self) -> tuple[str, ...]:
        """Quantized files that lose more than `verify` lets them, each with how much, and what is too
        much."""
        reports = [self.report, *self.adapters.values()]
        steps = [step for report in reports if report is not None for step in report.steps]
        return tuple(f"{lost(step)} ({step.finding})" for step in steps if not step.passed)

    @property
    def verdict(self) -> str:
        """``in parity``, ``written with a loss``, or ``not verified``."""
        if self.report is None:
            return "not verified"
        return "written with a loss" if self.losses else "in parity"

    def to_json(self) -> dict[str, Any]:
        """The JSON document of ``onnx --json``."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "opset": self.opset,
            "verdict": self.verdict,
            "files": [asdict(f) for f in self.files],
            "losses": list(self.losses),
            "bits": None if self.bits is None else self.bits.to_json(),
            "report": None if self.report is None else self.report.to_json(),
            "rows": dict(self.rows),
            "adapters": {name: report.to_json() for name, report in self.adapters.items()},
        }


def export_onnx(
    output: str | Path,
    *,
    model: str | Path | None = None,
    base: str | Path | None = None,
    adapters: Sequence[str | Path | Adapter] = (),
    graphs: GraphOptions = DEFAULT_GRAPHS,
    check: bool = True,
    overwrite: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> OnnxExport:
    """Export a model to an ONNX folder in the layout of optimum and transformers.js.

    Graphs in ``onnx/``, configuration, tokenizer and the like beside it. More than seven parameters: there
    are two ways in, `model` or `base` with `adapters`.

    Args:
        output: folder to create.
        model: folder that `merge` wrote (or any checkpoint folder). One that stays quantized is exported as
            the dense model that it stands for.
        base, adapters: instead of `model`; merged into a temporary folder first, compared with
            the live adapters.
        graphs: task, precisions, targets, form of the decoder, operator set.
        check: `verify` every graph through ONNX Runtime before the folder is put in place.
        overwrite: replace an output folder that a command of ours wrote, and in which nothing else lies.
        on_step: told what is being done.

    Weights are traced in float32 (those of 16-bit checkpoints are widened exactly).

    A graph of int8 or int4 weights whose codes are right but whose quantization costs more than `verify`
    allows is written all the same, and named in `OnnxExport.losses`, unless it is more than
    `GraphOptions.max_loss`.

    Raises `UsageError`, `InputError` and its kinds, `OutputError`, and `CheckFailed` when a graph is not in
    parity; the folder is then kept aside as ``<output>.failed``.
    """
    check_arguments(export_onnx, locals())
    adapters = tuple(adapters)
    _check_sources(model, base, adapters, graphs)
    say = on_step or (lambda _: None)
    target, keep = Path(output), "keep" in graphs.precisions
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(exact_matmul())
        scratch = stack.enter_context(scratch_folder())
        given = [Path(s) for s in (model, base, *adapters) if s is not None and not isinstance(s, Adapter)]
        given += [path for a in adapters if isinstance(a, Adapter) for path in a.location.inputs]
        check_target(target, [path for path in given if path.exists()], overwrite=overwrite)
        if graphs.apart and base is not None:
            source = read_apart(base, adapters, scratch, say)
        elif base is not None:
            source = fold(base, adapters, scratch, say, keep=keep)
        else:
            assert model is not None
            source = read_model(model, scratch, say, keep=keep)
        checkpoint = source.checkpoint
        task = _task(checkpoint, graphs)
        stage = stack.enter_context(staged(target, overwrite=overwrite))
        plain = stage / "onnx" if "fp32" in graphs.precisions else scratch / "onnx"
        traced, cases, swapped = _export(source, task, graphs, plain, say)
        files = [_describe(graph.path, "fp32") for graph in traced if "fp32" in graphs.precisions]
        coded, plan = traced, source.plan
        if source.moves and not _ENCODED.isdisjoint(graphs.precisions):
            coded, plan = move_to_rows(traced, plan, scratch / "rows")
        mix = None
        if "int4" in graphs.precisions:
            mix = mix_bits(coded, cases, plan, graphs, say)
            write_whole(stage / "bits.html", mix_page(mix))
        made_of = _Given(traced, coded, mix, source.kept)
        files += _convert(made_of, graphs.precisions, stage / "onnx", say)
        _copy_side_files(checkpoint, stage)
        apart = write_apart(stage, swapped, traced, graphs)
        package(stage, graphs.precisions, graphs.targets)
        done = OnnxExport(
            folder=target,
            task=task.name,
            opset=graphs.opset,
            files=tuple(files),
            report=None,
            bits=mix,
            rows=task_rows(swapped) if graphs.task_table else {},
        )
        _write_manifest(source, stage, done, traced, apart)
        if check:
            say("verifying")
            # the float32 graphs are proven even where only other precisions of them were asked for
            places = [stage] if "fp32" in graphs.precisions else [plain, stage]
            reports = _proven(source, places, say)
            for report in reports.values():
                require(report, graphs.max_loss, stage, target)
            done = replace(done, report=reports.pop(""), adapters=reports)
        return done


def _check_sources(model: object, base: object, adapters: Sequence[object], graphs: GraphOptions) -> None:
    """Raise `UsageError` unless there is one way in."""
    if graphs.apart and base is None:
        raise UsageError(
            f"{graphs.apart} keeps adapters apart from their base, and a merged model has none",
            hint="give --base, and each --adapter",
        )
    if (model is None) == (base is None) or (base is None) == bool(adapters):
        raise UsageError(
            "give either --model, or --base with --adapter", hint="--model takes the folder that merge wrote"
        )


def _proven(source: ExportSource, places: Sequence[Path], say: Callable[[str], None]) -> dict[str, Report]:
    """The report of the graphs in all `places`, under an empty name; where adapters stay apart, of those in
    the last of them also that of each adapter."""
    settings = RunSettings(device="cpu", max_memory=_limit(source.checkpoint))
    if source.swapped:
        return prove_apart(source, places[-1], settings, say)
    shipped = Shipped(None, tuple(graph for place in places for graph in read_exported(place)))
    return {"": replace(prove(source.plan, shipped, settings), base=model_id(source.named))}


def _task(checkpoint: Checkpoint, graphs: GraphOptions) -> Task:
    if checkpoint.config is None:
        raise UsageError("the model has no config.json", hint="give the folder that merge wrote")
    sentence_model = (checkpoint.folder / "modules.json").is_file()
    return choose_task(checkpoint.config, asked=graphs.task, sentence=sentence_model)


def _export(
    source: ExportSource, task: Task, graphs: GraphOptions, folder: Path, say: Callable[[str], None]
) -> tuple[list[TracedGraph], list[Case], list[Adapter]]:
    """The graphs in float32, inputs to choose bits on if they are to be chosen, and the adapters to swap by
    the class's names. No more of the model: the proof loads it again, in float64."""
    say("loading the model")
    checkpoint = source.checkpoint
    model = load_model(checkpoint.folder, task, checkpoint.config or {})
    sentence = sentence_head(checkpoint.folder, task)
    cases = (
        make_cases(model, tokenizer=find_tokenizer(checkpoint.folder)) if "int4" in graphs.precisions else []
    )
    swapped = named_as_in(model, source.swapped) if source.swapped else []
    attach = attach_tables if graphs.task_table else attach_vectors
    live = attach(model, swapped)
    specs = plan_graphs(model, task, sample_inputs(model), graphs.decoder, sentence)
    specs = [live.planned(spec) for spec in specs]
    traced = export_graphs(model, specs, folder, graphs, stored=checkpoint.tensors, say=say)
    del model, specs
    forget_graphs()
    for graph in traced if swapped else ():
        fill(graph.path, live.values, unread=[TASK])
    if graphs.swappable:  # what adapters bring takes the place of numbers, not of codes
        traced = [replace(graph, left=frozenset(swapped[0].extras)) for graph in traced]
    return traced, cases, swapped


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """What is there before graphs are converted: the float32 graphs `traced`, those that codes are made of
    (`coded`), a `mix` for int4, the codes of a base that is `kept`."""

    traced: Sequence[TracedGraph]
    coded: Sequence[TracedGraph]
    mix: Mix | None
    kept: KeptBase | None

    def graphs(self, precision: str) -> Sequence[TracedGraph]:
        """Those that are converted to `precision`."""
        return self.coded if precision in _ENCODED else self.traced

    def codes(self, graph: TracedGraph, precision: str) -> tuple[Mapping[str, Codes] | None, dict[str, str]]:
        """Those for `graph`, None if they are to be made; and why initializers have none, where that is
        known."""
        if precision == "keep" and self.kept is not None:
            return find_codes(self.kept, graph)
        if precision == "int4":
            return ({} if self.mix is None else self.mix.codes.get(graph.path.stem, {})), {}
        return None, {}


def _convert(
    given: _Given, precisions: Sequence[str], folder: Path, say: Callable[[str], None]
) -> list[OnnxFile]:
    """The graphs in their further `precisions`."""
    files = []
    for precision in precisions:
        if precision == "fp32":
            continue
        say(f"converting to {precision}")
        for graph in given.graphs(precision):
            path = folder / file_name(graph.path.stem, precision)
            codes, reasons = given.codes(graph, precision)
            coverage = convert_precision(graph.path, path, precision, codes, graph.left)
            if precision == "keep":
                reasons = {name: reasons.get(name, OTHER_FORM) for name in coverage.left}
            files.append(_describe(path, precision, coverage, reasons))
    _require_codes(files, given.kept)
    return files


def _require_codes(files: Sequence[OnnxFile], kept: KeptBase | None) -> None:
    """Raise `Refused` where no graph that should hold the codes of a base holds any."""
    named = [file for file in files if file.precision == "keep"]
    if kept is not None and not any(file.converted_bytes for file in named):
        reasons = [reason for file in named for reason in file.reasons.values()]
        raise without_codes(kept.quantized, next(iter(reasons), OTHER_FORM))


def _describe(
    path: Path,
    precision: str,
    coverage: Coverage | None = None,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> OnnxFile:
    reached = coverage or Coverage(0, 0, ())
    return OnnxFile(
        path=f"onnx/{path.name}",
        precision=precision,
        size=size_of(path),
        weight_bytes=reached.weight_bytes,
        converted_bytes=reached.converted_bytes,
        left=reached.left,
        reasons=dict(reasons),
    )


def _limit(checkpoint: Checkpoint) -> int | None:
    """Bytes that the proof's models may take.

    Of models above `_LARGE` the reference is float32, which needs half: the proof then takes no more than the
    export, and the rounding noise of the reference is measured instead.
    """
    import psutil

    elements = sum(tensor.size for tensor in checkpoint.tensors.values())
    if 4 * elements < _LARGE:
        return None
    return min(10 * elements, psutil.virtual_memory().available)


def _copy_side_files(checkpoint: Checkpoint, stage: Path) -> None:
    for name in checkpoint.side_files:
        if name not in _NOT_COPIED:
            copy_file(checkpoint.folder / name, stage / name)


def _write_manifest(
    source: ExportSource,
    stage: Path,
    done: OnnxExport,
    traced: Sequence[TracedGraph],
    apart: Mapping[str, Any],
) -> None:
    merged = source.checkpoint.folder / MANIFEST
    folded = [as_folded(adapter) for adapter in source.plan.adapters] or source.checkpoint.folded
    libraries = ("torch", "transformers", "onnx", "onnxscript")
    content = {
        "schema": SCHEMA,
        "tool": tool(),
        "libraries": {name: metadata.version(name) for name in libraries},
        "task": done.task,
        "opset": done.opset,
        "graphs": [asdict(file) for file in done.files],
        "provenance": {
            graph.path.stem: {name: asdict(origin) for name, origin in sorted(graph.origins.items())}
            for graph in traced
        },
        "folded": [row.to_json() for row in folded],
        "merge_manifest_sha256": hash_file(merged) if merged.is_file() else None,
        "files": list_files(stage, known={}, hashed=True),
        **apart,
    }
    (stage / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
