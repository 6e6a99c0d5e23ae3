"""``export_onnx``: a merged model as an ONNX folder, proven through ONNX Runtime before it is put in place."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ia3_export.adapters.model import Adapter
from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.folder import ADAPTER_CONFIG, Checkpoint, read_checkpoint
from ia3_export.commands.merge import merge
from ia3_export.commands.verify import verify
from ia3_export.errors import CheckFailed, Refused, UsageError
from ia3_export.models.model_class import quiet
from ia3_export.models.sentence import read_sentence_head
from ia3_export.onnx.contract import DecoderForm, plan_graphs
from ia3_export.onnx.files import external_files, save_model
from ia3_export.onnx.package import PRECISIONS, TARGETS, file_name, package, precision_list
from ia3_export.onnx.precision import Coverage, convert
from ia3_export.onnx.provenance import Origin, trace_origins
from ia3_export.onnx.tasks import Task, choose_task, load_model
from ia3_export.onnx.trace import OPSETS, trace
from ia3_export.parity.facts import model_id
from ia3_export.parity.runs.inputs import make_cases
from ia3_export.parity.runs.run_torch import exact_matmul
from ia3_export.parity.settings import RunSettings
from ia3_export.report.model import Report, Step
from ia3_export.writing.card import BASE_CARD
from ia3_export.writing.dense import is_quantized, write_dense
from ia3_export.writing.execute import hash_file
from ia3_export.writing.manifest import NAME, list_files, tool
from ia3_export.writing.options import OutputOptions
from ia3_export.writing.stage import check_target, copy_file, scratch_folder, set_aside, staged

SCHEMA = "ia3-export/onnx/2"
#: Float32 graphs above this many bytes get external data, which are streamed: a protobuf is held in memory twice while it is written.
_STREAMED = 500_000_000
#: Bytes of weights in float32.
_LARGE = 200_000_000
_NOT_COPIED = ("README.md", BASE_CARD, NAME)


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A graph that was written: its path in the folder, its size with external data in bytes, and how many of its weights
    (bytes in float32) its precision reached. `left` names the float32 weights it did not."""

    path: str
    precision: str
    size: int
    weight_bytes: int
    converted_bytes: int
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """What `export_onnx` wrote. `report` compares every graph with the live adapters (or, without adapters, with the model)."""

    folder: Path
    task: str
    opset: int
    files: tuple[OnnxFile, ...]
    report: Report | None

    @property
    def losses(self) -> tuple[str, ...]:
        """Quantized files that lose more than `verify` lets them, each with what is too much."""
        steps = self.report.steps if self.report is not None else ()
        return tuple(f"{step.file}: {step.finding}" for step in steps if not step.passed)

    def to_json(self) -> dict[str, Any]:
        """The JSON document of ``onnx --json``."""
        return {
            "schema": SCHEMA, "task": self.task, "opset": self.opset, "files": [asdict(f) for f in self.files],
            "losses": list(self.losses),
            "report": None if self.report is None else self.report.to_json(),
        }  # fmt: skip


def export_onnx(
    output: str | Path,
    *,
    model: str | Path | None = None,
    base: str | Path | None = None,
    adapters: Sequence[str | Path | Adapter] = (),
    task: str | None = None,
    precisions: Sequence[str] = ("fp32",),
    targets: Sequence[str] = (),
    decoder: DecoderForm = "merged",
    opset: int = 20,
    check: bool = True,
    overwrite: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> OnnxExport:
    """Export a model to an ONNX folder in the layout of optimum and transformers.js: graphs in ``onnx/``, configuration, tokenizer
    and the like beside it.

    Args:
        output: folder to create.
        model: folder that `merge` wrote (or any checkpoint folder). One that stays quantized is exported as the dense model that it
            stands for.
        base, adapters: instead of `model`; merged into a temporary folder first, compared with the live adapters.
        task: optimum's name or synonym (``text-generation``, ``fill-mask``, ...); inferred from the checkpoint by default.
        precisions: of ``fp32``, ``fp16``, ``int8``, ``int4``, all from one trace.
        targets: beside transformers.js and optimum also ``genai`` (``genai_config.json``) and ``mobile`` (``.ort`` files).
        decoder: form of an encoder-decoder's decoder: ``merged`` (one file that is its own first step), ``separate`` (optimum's
            decoder and decoder with past) or ``if`` (those two as branches of one ``If``, as optimum merges them).
        opset: ONNX operator set.
        check: `verify` every graph through ONNX Runtime before the folder is put in place.
        overwrite: replace an output folder that a command of ours wrote, and in which nothing else lies.
        on_step: told what is being done.

    Weights are traced in float32 (those of 16-bit checkpoints are widened exactly).

    A graph of int8 or int4 weights whose codes are right but whose quantization costs more than `verify` allows is written all the
    same, and named in `OnnxExport.losses`.

    Raises `UsageError`, `InputError` and its kinds, `OutputError`, and `CheckFailed` when a graph is not in parity; the folder is
    then kept aside as ``<output>.failed``.
    """
    check_arguments(export_onnx, locals())
    adapters, precisions, targets, opset = tuple(adapters), tuple(precisions), tuple(targets), int(opset)
    if (model is None) == (base is None) or (base is None) == bool(adapters):
        raise UsageError(
            "give either --model, or --base with --adapter", hint="--model takes the folder that merge wrote"
        )
    if opset not in OPSETS:
        raise UsageError(
            f"--opset {opset} is not offered",
            hint=f"there are {OPSETS[0]} to {OPSETS[-1]}; every runtime has 20",
        )
    wanted = precision_list(precisions)
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise UsageError(f"--target {unknown[0]} is not offered", hint=f"there are {', '.join(TARGETS)}")
    say = on_step or (lambda _: None)
    target = Path(output)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(exact_matmul())
        scratch = stack.enter_context(scratch_folder())
        given = [Path(s) for s in (model, base, *adapters) if s is not None and not isinstance(s, Adapter)]
        given += [path for a in adapters if isinstance(a, Adapter) for path in a.location.inputs]
        check_target(target, [path for path in given if path.exists()], overwrite=overwrite)
        named = read_checkpoint(base) if base is not None else None
        if named is not None and named.is_gguf:
            say("dequantizing")
            base = write_dense(named, scratch / "dense")
        source: str | Path = model or ""
        if base is not None:
            say("merging")
            options = OutputOptions(digests="none", reload_check=False)
            merge(base, adapters, scratch / "merged", options=options)
            source = scratch / "merged"
        checkpoint = read_checkpoint(source)
        location = (named or checkpoint).location  # what the user gave, not a copy in scratch
        if checkpoint.holds_adapter:
            raise Refused(
                f"{source} holds a model and an adapter ({ADAPTER_CONFIG}): transformers would apply it to these weights",
                hint=f"to fold it, --base {source} --adapter {source}; for the model alone, move {ADAPTER_CONFIG} away",
            )
        if model is not None and is_quantized(checkpoint):
            say("dequantizing")
            source = write_dense(checkpoint, scratch / "dense")
            checkpoint = read_checkpoint(source)
        if checkpoint.config is None:
            raise UsageError("the model has no config.json", hint="give the folder that merge wrote")
        sentence_model = (checkpoint.folder / "modules.json").is_file()
        chosen = choose_task(checkpoint.config, asked=task, sentence=sentence_model)
        stage = stack.enter_context(staged(target, overwrite=overwrite))
        plain = stage / "onnx" if "fp32" in wanted else scratch / "onnx"
        graphs, origins = _export(checkpoint, plain, chosen, decoder, opset, say)
        files = [_describe(graph, "fp32") for graph in graphs if "fp32" in wanted]
        for precision in (p for p in wanted if p != "fp32"):
            say(f"converting to {precision}")
            for graph in graphs:
                path = stage / "onnx" / file_name(graph.stem, precision)
                path.parent.mkdir(parents=True, exist_ok=True)
                files.append(_describe(path, precision, convert(graph, path, PRECISIONS[precision].kind)))
        _copy_side_files(checkpoint, stage)
        package(stage, wanted, targets)
        _write_manifest(checkpoint, stage, chosen, opset, files, origins)
        report = None
        if check:
            say("verifying")
            # the float32 graphs are proven even where only other precisions of them were asked for
            places = [stage] if "fp32" in wanted else [plain, stage]
            settings = RunSettings(device="cpu", max_memory=_limit(checkpoint))
            report = verify(base or source, adapters, onnx=places, settings=settings)
            report = replace(report, base=model_id(location))
            _require(report, stage, target)
        return OnnxExport(target, chosen.name, opset, tuple(files), report)


def _export(
    checkpoint: Checkpoint,
    folder: Path,
    task: Task,
    decoder: DecoderForm,
    opset: int,
    say: Callable[[str], None],
) -> tuple[list[Path], Mapping[str, Mapping[str, Origin]]]:
    """Write the float32 graphs into `folder`: their paths, and where the initializers of each come from."""
    say("loading the model")
    model = load_model(checkpoint.folder, task, checkpoint.config or {})
    # none of the shapes that the proof runs
    sample = {name: tensor[:2] for name, tensor in make_cases(model)[1].tensors.items()}
    sentence = read_sentence_head(checkpoint.folder) if task.name == "sentence-similarity" else None
    paths, origins = [], {}
    for spec in plan_graphs(model, task, sample, decoder, sentence):
        say(f"tracing {spec.file}")
        traced = trace(model, spec, opset)
        path = folder / f"{spec.file}.onnx"
        say(f"writing {path.name}")
        save_model(traced, path, external_above=_STREAMED)
        paths.append(path)
        origins[spec.file] = trace_origins(traced, model, checkpoint.tensors)
        del traced
    if decoder == "if" and len(paths) == 3:
        from ia3_export.onnx.conditional import merge_decoders

        merged = folder / "decoder_model_merged.onnx"
        merge_decoders(paths[1], paths[2], merged)
        origins[merged.stem] = origins.pop(paths[1].stem) | origins.pop(paths[2].stem)
        for path in (file for graph in paths[1:] for file in (graph, *external_files(graph))):
            path.unlink()
        paths = [paths[0], merged]
    del model
    gc.collect()  # the proof loads the model again, in float64
    return paths, origins


def _describe(path: Path, precision: str, coverage: Coverage | None = None) -> OnnxFile:
    size = sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*") if not f.name.endswith(".ort"))
    converted = (coverage.weight_bytes, coverage.converted_bytes, coverage.left) if coverage else (0, 0, ())
    return OnnxFile(f"onnx/{path.name}", precision, size, *converted)


def _limit(checkpoint: Checkpoint) -> int | None:
    """Bytes that the proof's models may take. Of models above `_LARGE` the reference is float32, which needs half: the proof then
    takes no more than the export, and the rounding noise of the reference is measured instead."""
    import psutil

    elements = sum(tensor.size for tensor in checkpoint.tensors.values())
    if 4 * elements < _LARGE:
        return None
    return min(10 * elements, psutil.virtual_memory().available)


def _require(report: Report, stage: Path, target: Path) -> None:
    findings = [f"{f.tensor}: {f.what}" for proof in report.weights for f in proof.findings]
    findings += [f"{s.file}: {s.finding}" for s in report.steps if not s.passed and not _only_loses(s)]
    if not findings:
        return
    (stage / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    aside = set_aside(stage, target)
    raise CheckFailed(
        f"the exported graph does not compute what was trained: {findings[0]}",
        hint=f"the files and report.json are kept in {aside}, {target} was not written; try another --precision or "
        "--opset, and please report the architecture",
    )


def _only_loses(step: Step) -> bool:
    """Whether a quantized graph is wrong by nothing but its quantization: its codes are those of the weights (the proof of the
    weights says so), and it gives numbers. How much may be lost is the user's choice, and `verify`'s gate."""
    error = step.distance.max_error if step.distance is not None else math.inf
    return step.precision in ("int8", "int4") and math.isfinite(error)


def _copy_side_files(checkpoint: Checkpoint, stage: Path) -> None:
    for name in checkpoint.side_files:
        if name not in _NOT_COPIED:
            copy_file(checkpoint.folder / name, stage / name)


def _write_manifest(
    checkpoint: Checkpoint,
    stage: Path,
    task: Task,
    opset: int,
    files: Sequence[OnnxFile],
    origins: Mapping[str, Mapping[str, Origin]],
) -> None:
    merged = checkpoint.folder / NAME
    libraries = ("torch", "transformers", "onnx", "onnxscript")
    content = {
        "schema": SCHEMA,
        "tool": tool(),
        "libraries": {name: metadata.version(name) for name in libraries},
        "task": task.name,
        "opset": opset,
        "graphs": [asdict(file) for file in files],
        "provenance": {
            graph: {name: asdict(origin) for name, origin in sorted(rows.items())}
            for graph, rows in origins.items()
        },
        "merge_manifest_sha256": hash_file(merged) if merged.is_file() else None,
        "files": list_files(stage, known={}, hashed=True),
    }
    (stage / NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
