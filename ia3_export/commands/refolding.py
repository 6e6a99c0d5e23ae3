"""``onnx --onnx-base``: adapters folded into an ONNX folder that exists already, without a trace and without
torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter
from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.folder import Checkpoint, read_config
from ia3_export.checkpoint.header import Computed, StoredTensor, count_elements
from ia3_export.checkpoint.hub import lies_within, locate
from ia3_export.checkpoint.manifest import MANIFEST, read_folded, read_record
from ia3_export.checkpoint.ranges import hash_file
from ia3_export.commands.export_onnx import SCHEMA, OnnxExport, OnnxFile
from ia3_export.commands.refold_checks import (
    BROUGHT,
    require_alone,
    require_held,
    require_same_values,
    require_told_apart,
)
from ia3_export.errors import MissingVector, NotFound, Refused, Unsupported, UnusedVector, UsageError
from ia3_export.fold import DTYPE_BITS
from ia3_export.models.modules import CONV1D_MODEL_TYPES, model_types
from ia3_export.onnx.content import content_places
from ia3_export.onnx.decoded import in_blocks
from ia3_export.onnx.exported import find_onnx, plain_stem
from ia3_export.onnx.files import size_of
from ia3_export.onnx.places import GraphFile, Place, named_places, read_graph_file
from ia3_export.onnx.refold import PlacedVector, Rewriting
from ia3_export.onnx.rewrite import write_graph
from ia3_export.planning.changes import Change
from ia3_export.planning.moved_inputs import move_inputs
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.planning.recipe import DEFAULT_RECIPE
from ia3_export.quantization.base import Base, make_base, read_base
from ia3_export.words import ONNX_FLOATS, STORED_NAMES
from ia3_export.writing.dense import dense_base
from ia3_export.writing.manifest import as_folded, list_files, tool
from ia3_export.writing.stage import check_target, copy_file, scratch_folder, staged

#: Files of weights, which are not copied: those that belong to a graph are written with it.
_WEIGHTS = (".onnx", ".ort", ".safetensors", ".bin")


@dataclass(frozen=True, slots=True, eq=False)
class OnnxBase:
    """An ONNX folder: its `manifest` if it is ours, its configuration if there is one, its models (the files
    of each), and where each file holds which stored tensor."""

    folder: Path
    manifest: Mapping[str, Any]
    config: Mapping[str, Any] | None
    models: tuple[tuple[GraphFile, ...], ...]
    places: Mapping[Path, Mapping[str, Sequence[Place]]]

    @property
    def graphs(self) -> list[GraphFile]:
        """All files."""
        return [graph for model in self.models for graph in model]


def read_onnx_base(location: str | Path) -> OnnxBase:
    """Raises `NotFound`, `DamagedFile`, and `Refused` for graphs whose vectors are apart from them."""
    folder = locate(location).path
    if not folder.is_dir():
        raise NotFound(f"{location} is no folder", hint="give the folder that holds onnx/model.onnx")
    manifest = read_record(folder) or {}
    for key, option in (("swappable", "--swappable"), ("tasks", "--task-table")):
        if key in manifest:
            raise Refused(
                f"{location} was exported with {option}: its adapters are apart from its weights",
                hint="give the plain export of the base",
            )
    models = tuple(tuple(read_graph_file(path) for path in paths) for paths in find_onnx(folder))
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else None
    conv1d = _is_conv1d(config)
    places = {graph.path: named_places(graph, manifest, conv1d=conv1d) for model in models for graph in model}
    return OnnxBase(folder, manifest, config, models, places)


def _is_conv1d(config: Mapping[str, Any] | None) -> bool:
    """Whether the layers of a model store weights as inputs x outputs."""
    return not CONV1D_MODEL_TYPES.isdisjoint(model_types(config))


def checkpoint_of(onnx_base: OnnxBase) -> Checkpoint:
    """The tensors of the model that an ONNX folder was exported from, as far as its names tell, in their
    stored shapes; their values are not read."""
    folder, config = onnx_base.folder, onnx_base.config
    stated = STORED_NAMES.get(str((config or {}).get("dtype") or (config or {}).get("torch_dtype")), "F32")
    tensors: dict[str, StoredTensor] = {}
    for graph in onnx_base.graphs:
        for name, places in onnx_base.places[graph.path].items():
            shape = places[0].shape or _stored_shape(graph, places[0], config)
            if name not in tensors and shape is not None:
                tensors[name] = _nowhere(name, shape, places[0].dtype or stated, graph.path)
    return Checkpoint(
        location=locate(folder),
        shards=(),
        tensors=tensors,
        index_name=None,
        index=None,
        config=config,
        side_files=(),
        left_out=(),
        folded=read_folded(folder),
    )


def _stored_shape(graph: GraphFile, place: Place, config: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    if place.name not in graph.coded:
        span = graph.spans[place.name]
        return span.shape[::-1] if place.transposed else span.shape if span.dtype in ONNX_FLOATS else None
    codes = graph.coded[place.name]
    shape = graph.spans[codes].shape
    if not in_blocks(codes, shape):
        return shape[::-1] if place.transposed else shape
    for node in graph.readers.get(codes, ()):
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            turned = not place.transposed and _is_conv1d(config)
            return (sizes["K"], sizes["N"]) if turned else (sizes["N"], sizes["K"])
    return None


def _nowhere(name: str, shape: tuple[int, ...], dtype: str, file: Path) -> StoredTensor:
    """A tensor of which names and sizes are known."""

    def read(*_: int) -> Any:
        raise Unsupported(f"{name} is in a graph, not in a checkpoint", hint="give --base")

    size = count_elements(shape) * DTYPE_BITS[dtype] // 8
    return StoredTensor(
        name=name,
        dtype=dtype,
        shape=shape,
        file=file,
        offset=0,
        nbytes=size,
        computed=Computed(1, read, dtype),
    )


def refold(
    output: str | Path,
    onnx_base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    *,
    base: str | Path | None = None,
    check: bool = True,
    overwrite: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> OnnxExport:
    """Fold adapters into the graphs of an ONNX folder by rewriting their initializers; every other byte is
    copied.

    Graphs of floats, of our codes and ``MatMulNBits``, of ``quantize_dynamic`` and with weights behind
    ``DequantizeLinear``. Vectors on outputs go into floats and into scales of codes, vectors on inputs into
    floats, to the rows that feed codes where that is exact, else into a weight that becomes float32.

    Args:
        output: folder to create.
        onnx_base: folder that `export_onnx`, optimum or the builder of onnxruntime-genai wrote of the base.
        adapters: folded one after the other.
        base: the checkpoint, to find weights whose names did not survive the export by their content.
        check: prove the result: initializers bit for bit, and in ONNX Runtime beside the base's graph with
            live multiplications.
        overwrite: replace an output folder that a command of ours wrote, and in which nothing else lies.
        on_step: told what is being done.

    Raises `UsageError`, `InputError` and its kinds (`Unsupported` for a vector whose weight is not there any
    more, by name), `OutputError`, and `CheckFailed`; the folder is then kept aside as ``<output>.failed``.
    """
    check_arguments(refold, locals())
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one --adapter")
    say, target = on_step or (lambda _: None), Path(output)
    read = [read_adapter(adapter) for adapter in adapters]
    held = read_onnx_base(onnx_base)
    inputs = [held.folder, *(path for adapter in read for path in adapter.location.inputs)]
    inputs += [Path(base)] if base is not None and Path(base).exists() else []
    check_target(target, inputs, overwrite=overwrite)
    with ExitStack() as stack:
        plan, held = _plan(held, read, base, stack.enter_context(scratch_folder()))
        say("folding")
        stage = stack.enter_context(staged(target, overwrite=overwrite))
        written = [list(_fold(held, model, plan, named=base is None)) for model in held.models]
        each = [rewriting for model in written for rewriting in model]
        files = _write(held, each, stage)
        left = _copy_rest(held, plan, stage)
        if left:
            say(f"not copied: {', '.join(left)}")
        done = _describe(held, each, files, target)
        _write_manifest(held, plan, done, stage, hashed=check)
        if check:
            from ia3_export.commands.refold_proof import prove_refold

            say("verifying")
            report = prove_refold(held, plan, written, stage, target)
            done = replace(done, report=report)
        return done


def _plan(
    held: OnnxBase, adapters: Sequence[Adapter], base: str | Path | None, scratch: Path
) -> tuple[Plan, OnnxBase]:
    """The plan of a merge, and the places of what it changes."""
    if base is None:
        plan = make_plan(make_base(checkpoint_of(held)), adapters, DEFAULT_RECIPE)
        _raise_unnamed(plan, held)
        # what a checkpoint would lack besides, equal small tensors are kept once in a graph
        plan = replace(plan, warnings=tuple(w for adapter in plan.adapters for w in adapter.warnings))
    else:
        whole = read_base(base)
        if whole.stored.is_gguf:  # a merge of it keeps its codes; graphs hold what they stand for
            whole = dense_base(whole, scratch / "dense")
        stored = replace(whole.stored, folded=(*whole.stored.folded, *read_folded(held.folder)))
        plan = make_plan(Base(stored, whole.dense, whole.quantization), adapters, DEFAULT_RECIPE)
    plan.raise_problems()
    if base is not None:
        held = replace(held, places=_found(held, plan))
    return plan, held


def _raise_unnamed(plan: Plan, held: OnnxBase) -> None:
    """Raise `UnusedVector` where the graphs' names may be why a vector finds no weight."""
    nameless = (UnusedVector, MissingVector)
    if any(isinstance(p, nameless) or "not in the base" in str(p) for p in plan.problems):
        raise UnusedVector(
            f"{plan.problems[0]}; the names in {held.graphs[0].path.name} may not be the model's",
            hint="give --base too, the checkpoint that the graphs were made of: weights are then found by "
            "their values",
        )


def _found(held: OnnxBase, plan: Plan) -> dict[Path, Mapping[str, Sequence[Place]]]:
    """The places of the tensors that `plan` changes, those by content where names do not tell."""
    wanted = {name for name, change in plan.changes.items() if change.how in ("fold", *BROUGHT)}
    moved, _ = move_inputs(plan, plan.changes)
    wanted |= {change.name for change in moved.changes.values() if change.how == "fold"}
    dense = plan.base.dense.tensors
    places: dict[Path, Mapping[str, Sequence[Place]]] = {}
    for graph in held.graphs:
        named = {name: found for name, found in held.places[graph.path].items() if name in dense}
        absent = {name: dense[name] for name in wanted - named.keys() if name in dense}
        require_told_apart(graph, named, wanted, dense)
        require_same_values(graph, named, wanted, dense)
        taken = {place.name for found in named.values() for place in found}
        places[graph.path] = {**named, **content_places(graph, absent, taken)}
    return places


def _fold(held: OnnxBase, model: Sequence[GraphFile], plan: Plan, *, named: bool) -> Iterator[Rewriting]:
    """The new initializers of the files of one model; `named`: their weights are known by names alone.

    Raises `Unsupported` for a site that is in none.
    """
    # what a base's own codes take decides for all graphs of its export
    keeping = [graph for graph in held.graphs if graph.precision == "keep"]
    coded = {
        name
        for graph in (*model, *keeping)
        for name, places in held.places[graph.path].items()
        for place in places
        if place.name in graph.coded
    }
    moved, _ = move_inputs(plan, sorted(coded & plan.changes.keys()))
    changes = {
        name: change for name, change in moved.changes.items() if change.how not in ("cast", "dequantize")
    }
    require_held(model, [held.places[graph.path] for graph in model], moved)
    if named:
        for graph in model:
            require_alone(graph, held.places[graph.path], changes)
    plain = {plain_stem(graph.path): graph for graph in held.graphs if graph.precision == "fp32"}
    for graph in model:
        rewriting = Rewriting(graph=graph, plain=plain.get(plain_stem(graph.path)))
        places = held.places[graph.path]
        for name, change in changes.items():
            for place in places.get(name, ()):
                _apply(rewriting, place, change, plan.changes.get(name))
        rewriting.finish()
        yield rewriting


def _apply(rewriting: Rewriting, place: Place, change: Change, before: Change | None) -> None:
    """Note a change of a tensor; its vectors that were not there `before` were moved to its outputs."""
    own = {id(scale) for scale in before.scales} if before is not None else set()
    if change.how in BROUGHT:
        rewriting.replace(place, change.source)
    elif change.how != "fold":
        raise Unsupported(
            f"{change.name} is tied to another weight, which the graph holds once for both",
            hint="export the merged model instead: it gets a weight of its own",
        )
    for scale, fold in zip(change.scales, change.folds, strict=True):
        if fold.direction is None:
            raise Unsupported(
                f"{change.name} holds the experts of a mixture", hint="export the merged model instead"
            )
        side = fold.direction if id(scale) in own else "out"
        rewriting.fold(place, PlacedVector(scale, side, change.shape, change.source.compute_dtype))


def _write(held: OnnxBase, written: Sequence[Rewriting], stage: Path) -> list[Path]:
    """The graphs in the stage, at their places; files that are one under several names stay so."""
    files = []
    for rewriting in written:
        path = rewriting.graph.path
        target = stage / path.relative_to(held.folder)
        write_graph(rewriting.graph, rewriting.new, target, changed=rewriting.rewired)
        files.append(target)
        for other in sorted(path.parent.glob("*.onnx")):
            if other != path and other.samefile(path):
                (target.with_name(other.name)).hardlink_to(target)
    return files


def _copy_rest(held: OnnxBase, plan: Plan, stage: Path) -> list[str]:
    """Configuration, tokenizer and the like; other files of weights stay behind, and are returned."""
    left = []
    for path in sorted(held.folder.rglob("*")):
        name = path.relative_to(held.folder)
        there = stage / name
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and not there.exists() and name.as_posix() != MANIFEST:
            weights = path.suffix in _WEIGHTS or ".onnx_data" in path.name
            if weights or not lies_within(path, held.folder):
                left.append(name.as_posix())
            else:
                copy_file(path, there)
    if plan.config is not None:
        (stage / "config.json").write_text(
            json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return left


def _describe(
    held: OnnxBase, written: Sequence[Rewriting], files: Sequence[Path], target: Path
) -> OnnxExport:
    why = "a vector lies on its input, and no rows that feed it can take it"
    brought = "the adapter brings it, as numbers"
    opsets = [i.version for r in written for i in r.graph.model.opset_import if i.domain in ("", "ai.onnx")]
    described = [
        OnnxFile(
            path=rewriting.graph.path.relative_to(held.folder).as_posix(),
            precision=rewriting.graph.precision,
            size=size_of(file),
            weight_bytes=0,
            converted_bytes=0,
            left=tuple(rewriting.dense),
            reasons={
                name: brought if any(name == place.name for place, _ in rewriting.heads) else why
                for name in rewriting.dense
            },
        )
        for rewriting, file in zip(written, files, strict=True)
    ]
    task = str(held.manifest.get("task", "")) or "of the folder"
    return OnnxExport(
        folder=target, task=task, opset=max(opsets, default=0), files=tuple(described), report=None
    )


def _write_manifest(held: OnnxBase, plan: Plan, done: OnnxExport, stage: Path, *, hashed: bool) -> None:
    """Digests of all files only where everything is read for the proof anyhow."""
    before = held.folder / MANIFEST
    content = {
        "schema": SCHEMA,
        "tool": tool(),
        "task": done.task,
        "opset": done.opset,
        "graphs": [asdict(file) for file in done.files],
        "provenance": held.manifest.get("provenance", {}),
        "folded": [
            row.to_json() for row in (*read_folded(held.folder), *(as_folded(a) for a in plan.adapters))
        ],
        "onnx_base_manifest_sha256": hash_file(before) if before.is_file() else None,
        "files": list_files(stage, known={}, hashed=hashed),
    }
    (stage / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
