"""``verify``: does the shipped artifact compute what was trained?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter
from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.folder import Checkpoint, read_config
from ia3_export.checkpoint.manifest import MANIFEST
from ia3_export.commands.keeping import plan_kept
from ia3_export.commands.merge import write_merges
from ia3_export.errors import DamagedFile, UsageError
from ia3_export.onnx.exported import find_onnx
from ia3_export.onnx.swap import files_of
from ia3_export.onnx.task_table import row_of
from ia3_export.parity.bits.folder import prove_folder
from ia3_export.parity.bits.graph import prove_graph
from ia3_export.parity.bits.graph_files import Graph, read_graphs
from ia3_export.parity.facts import (
    digests,
    environment,
    model_id,
    sites_of,
    summarize_sites,
)
from ia3_export.parity.settings import DEFAULT_SETTINGS, RunSettings
from ia3_export.planning.merged_recipe import find_recipe
from ia3_export.planning.moved_inputs import all_moved
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.planning.recipe import DEFAULT_RECIPE, Recipe
from ia3_export.quantization.base import Base, read_base
from ia3_export.report.model import Reference, Report, Step, WeightsProof
from ia3_export.words import INTEGER_PRECISIONS, TORCH_NAMES
from ia3_export.writing.dense import dense_base
from ia3_export.writing.execute import Progress
from ia3_export.writing.options import OutputOptions
from ia3_export.writing.stage import scratch_folder

#: Kinds of change by which an output has other values than the base's.
_VALUES = ("fold", "replace", "add", "untie")


def verify(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    *,
    merged: str | Path | None = None,
    onnx: Sequence[str | Path] = (),
    base_onnx: str | Path | None = None,
    recipe: Recipe | None = None,
    settings: RunSettings | None = DEFAULT_SETTINGS,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Prove a merged folder and/or ONNX files equal to base + live adapters.

    First the weights: every changed tensor must be the fold of base and adapters bit for bit, every other the
    base's bytes. Then the forwards: the reference is the unmerged forward in float64 (float32 where all that
    is judged has 16 bits), and an artifact is in parity when ``err(artifact) <= k * err(unmerged) + eps``
    (docs/parity.md derives k and eps); quantized ONNX files have gates of their own. The control is the
    adapters' whole effect on the base.

    Args:
        base, adapters: as in `merge`. Without an adapter an ONNX file is compared with the model
            `base` itself.
        merged: folder that `merge` wrote. Of another tool's dense merge into a quantized base only the
            forwards are compared: its rounding is its own. With neither `merged` nor `onnx`, a merge into a
            temporary folder is verified.
        onnx: folders that `export_onnx` wrote (all precisions in them), or ``.onnx`` files, in the order of
            the chain.
        base_onnx: the base's own export, whose operators the graphs must then have.
        recipe: how several adapters act together (``combine`` and ``weights``); by default what the manifest
            of `merged` says, as it does of everything else in a recipe.
        settings: how the forwards run. None: no forward at all; streaming, in little memory, without torch
            unless a head or renamed tensors need it.
        on_progress: told how much of the weights has been compared.

    More than seven parameters: each is an input of its own; all that are settings are in two records.

    Raises `IA3ExportError` for inputs that cannot be read; a failed comparison is a `Report`, not an error.
    """
    check_arguments(verify, locals())
    onnx, adapters = tuple(onnx), tuple(adapters)
    if settings is None and merged is None and not onnx:
        raise UsageError("--weights-only needs --merged or --onnx", hint="give the folder that merge wrote")
    if not adapters and (merged is not None or not onnx):
        raise UsageError("no adapter given", hint="give at least one --adapter")
    whole = read_base(base)
    read = [read_adapter(source) for source in adapters]
    other = read_base(merged) if merged is not None else None
    how, said = find_recipe(whole, other, len(read), recipe, "the manifest, or from the weights' dtype")
    base_graph = read_graphs(find_onnx(base_onnx)[0]) if base_onnx is not None else None
    shipped = Shipped(
        other, tuple(graph for location in onnx for graph in read_exported(location)), base_graph
    )
    if any(graph.overridable or graph.tables for graph in shipped.graphs):
        return _verify_swappable(whole, read, shipped, settings)
    with scratch_folder() as scratch:
        if merged is None and whole.is_quantized and any(graph.kept for graph in shipped.graphs):
            whole.raise_problems()
            plan = plan_kept(whole, read, how, scratch / "dense").plan
        else:
            plan = make_plan(whole, read, how)
            plan.raise_problems()  # what is refused has no unmerged forward either
        report = prove(plan, shipped, settings, named=whole.stored, on_progress=on_progress)
    return replace(report, warnings=tuple(dict.fromkeys([*said, *report.warnings])))


def _verify_swappable(
    whole: Base, adapters: Sequence[Adapter], shipped: Shipped, settings: RunSettings | None
) -> Report:
    """`verify` of graphs that are run with one adapter, or with none."""
    from ia3_export.commands.swapping import prove_active

    if shipped.merged is not None or len(adapters) > 1:
        raise UsageError(
            "the graphs are proven with one adapter at a time",
            hint="give one --adapter, and --merged in a run of its own",
        )
    with scratch_folder() as scratch:
        # the graphs were made of what a quantized base stands for
        held = make_plan(dense_base(whole, scratch / "dense"), (), DEFAULT_RECIPE)
        held.raise_problems()
        if adapters:
            return prove_active(held, adapters[0], shipped.graphs, (), settings, named=whole.stored)
        return prove(held, replace(shipped, weights=held), settings, named=whole.stored)


@dataclass(frozen=True, slots=True, eq=False)
class Shipped:
    """What shall compute what was trained.

    A `merged` folder, `graphs` in the order of the chain, and the base's own export. `weights`: the graphs
    hold what this plan makes, and their vectors apart from them. `controls` are graphs by name that must not
    be in parity.
    """

    merged: Base | None
    graphs: tuple[Graph, ...]
    base_graph: Graph | None = None
    weights: Plan | None = None
    controls: tuple[tuple[str, Graph], ...] = ()


def activated(graph: Graph, adapter: Adapter) -> Graph:
    """A swappable `graph`, or one with tables, to be run with `adapter`. Raises `NotFound` where its folder
    has no file of it, or no row."""
    folder = graph.paths[0].parent.parent
    manifest = read_config(folder / MANIFEST)
    if graph.tables:
        row = row_of(folder, manifest, adapter.digest)
        if not all(0 < row < table.shape[0] for table in graph.tables.values()):
            raise DamagedFile(
                f"the manifest of {folder} says that {adapter.name} is row {row}, which {graph.file} has not",
                hint="export the model again",
            )
        return replace(graph, task=row)
    files = files_of(folder, manifest, adapter.digest)
    return replace(
        graph, adapters={path.name: files[path.name] for path in graph.paths if path.name in files}
    )


def read_exported(location: str | Path) -> list[Graph]:
    """The graphs of an exported folder, the plain one first, or of one file.

    Raises what reading them raises.
    """
    return [read_graphs(paths) for paths in find_onnx(location)]


def prove(
    plan: Plan,
    shipped: Shipped,
    settings: RunSettings | None,
    *,
    named: Checkpoint | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """`verify` of what is read already.

    `shipped` beside what `plan` makes, and beside the live model that it was made of. The report names the
    base that the user `named`, where that of the plan was made of it.
    """
    named = named or plan.base.stored
    graphs = _name_graphs(shipped.graphs)
    foreign = shipped.merged is not None and settings is not None and _is_foreign(plan.base, shipped.merged)
    warnings: list[str] = []
    with scratch_folder() as scratch:
        compared = _compared(plan, shipped, graphs, scratch) if settings is not None else shipped.merged
        # a merge made for an ONNX file's sake is no artifact
        judged = shipped.merged is not None or not graphs
        proofs: list[WeightsProof] = []
        if foreign:
            warnings.append(
                "the base is quantized and another tool merged into it, with roundings of its own: only "
                "forwards are compared"
            )
        else:
            warnings += plan.warnings
            if compared is not None and judged:
                proofs.append(prove_folder(plan, compared.stored, on_progress=on_progress))
            held = shipped.weights or plan
            proofs += _prove_graphs(held, graphs, shipped.base_graph, alone=settings is None)
        reference: Reference | None = None
        steps: tuple[Step, ...] = ()
        if settings is not None:
            from ia3_export.parity.chain import Subject, run_chain
            from ia3_export.parity.judging import Evidence
            from ia3_export.parity.runs.live import FineTune

            known, live = None if foreign else plan, shipped.weights is not None
            reference, steps, more = run_chain(
                FineTune(plan.base, plan.adapters, plan.recipe),
                Subject(compared, judged, _rounded(known), [*graphs, *shipped.controls], live=live),
                Evidence(proofs, sites_of(known, plan.adapters)),
                settings,
                scratch,
            )
            controls = dict(shipped.controls)
            warnings += [line for line in more if not any(name in line for name in controls)]
            steps = tuple(_without_controls(steps, controls))
    overridden = settings is not None and settings.tolerance is not None
    proven = all(proof.passed for proof in proofs)
    if overridden and not proven:
        warnings.append("the weights are not bit for bit what a merge gives; --atol and --rtol decide alone")
    merged = shipped.merged.stored if shipped.merged is not None else None
    paths = [path for graph in shipped.graphs for path in graph.paths]
    return Report(
        in_parity=(proven or overridden) and all(step.passed for step in steps),
        base=model_id(named.location),
        adapters=tuple(model_id(a.location) for a in plan.adapters),
        weights=tuple(proofs),
        reference=reference,
        steps=tuple(steps),
        sites=summarize_sites(plan.adapters),
        options=_shown_options(plan.recipe, settings),
        environment=environment(),
        digests=digests(named, plan.adapters, merged, paths),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _compared(
    plan: Plan, shipped: Shipped, graphs: Sequence[tuple[str, Graph]], scratch: Path
) -> Base | None:
    """The merged model that is run beside `graphs`, made here where there is none and one is needed."""
    wide = shipped.weights is None and _widened(plan.base.stored, graphs)
    if shipped.merged is not None or (graphs and not wide):
        return shipped.merged
    # without an adapter there is nothing to merge: the checkpoint itself is what the graphs must compute
    return _merge(plan, scratch / "merged") if plan.adapters else plan.base


def _without_controls(steps: Sequence[Step], controls: Collection[str]) -> Iterator[Step]:
    """`steps` without those of `controls` that fail, as they must; one that is in parity fails for that."""
    for step in steps:
        if step.name not in controls:
            yield step
        elif step.passed:
            yield replace(step, passed=False, finding="it is in parity too: the forwards cannot tell it")


def _prove_graphs(
    plan: Plan, graphs: Sequence[tuple[str, Graph]], base_graph: Graph | None, *, alone: bool
) -> Iterator[WeightsProof]:
    """Codes may be those of the plan, or of the one whose input vectors lie on the rows that feed them: both
    compute the same."""
    plain = next((graph for _, graph in graphs if graph.precision == "float32"), None)
    encoded = any(graph.precision in INTEGER_PRECISIONS for _, graph in graphs)
    moved = all_moved(plan) if encoded else None
    for name, graph in graphs:
        proofs: list[WeightsProof] = []
        for one in [moved, plan] if graph.precision in INTEGER_PRECISIONS else [plan]:
            if one is not None and not any(proof.passed for proof in proofs):
                proofs.append(prove_graph(one, graph, name, base_graph, float_graph=plain, alone=alone))
        yield min(proofs, key=lambda proof: len(proof.findings))


def _is_foreign(base: Base, merged: Base) -> bool:
    """Whether `merged` is a merge into a quantized base that another tool made."""
    return not (merged.stored.folder / MANIFEST).is_file() and base.is_quantized


def _rounded(plan: Plan | None) -> str | None:
    """The coarsest dtype that vectors were folded into, of a merge that stays quantized.

    GGUF's scales are float16 numbers inside the blocks of codes.
    """
    if plan is None or not plan.outcomes:
        return None
    dtypes = {change.dtype for change in plan.changes.values() if change.how in _VALUES}
    if plan.base.stored.is_gguf:
        dtypes.add("F16")
    if plan.recipe.cast == "peft-low-mem":  # the vectors themselves are rounded
        dtypes.add(plan.base.quantization.compute_dtype)
    return next((TORCH_NAMES[dtype] for dtype in ("BF16", "F16") if dtype in dtypes), "float32")


def _merge(plan: Plan, target: Path) -> Base:
    write_merges([(plan, target)], OutputOptions(digests="none", reload_check="none"))
    return read_base(target)


def _name_graphs(graphs: Sequence[Graph]) -> list[tuple[str, Graph]]:
    """``onnx float32``, ``onnx int8``, ...; the file name is added where two have the same precision."""
    names = [f"onnx {graph.precision}" for graph in graphs]
    return [
        (name if names.count(name) == 1 else f"{name} {i + 1}", graph)
        for i, (name, graph) in enumerate(zip(names, graphs, strict=True))
    ]


def _widened(base: Checkpoint, graphs: Sequence[tuple[str, Graph]]) -> bool:
    """Whether a graph computes in float32 what is stored in 16 bits."""
    return base.main_dtype in ("F16", "BF16") and any(
        graph.precision in ("float32", "keep") for _, graph in graphs
    )


def _shown_options(recipe: Recipe, settings: RunSettings | None) -> dict[str, str]:
    ran = settings or DEFAULT_SETTINGS
    options: dict[str, Any] = {
        "combine": recipe.combine,
        "weights": ",".join(map(str, recipe.weights)),
        "cast": recipe.cast,
        "dtype": recipe.dtype,
        "quantized": "" if recipe.quantized == "dequantize" else recipe.quantized,
        "allow_missing": recipe.allow_missing or "",
        "allow_unused": recipe.allow_unused or "",
        "tokenizer": "" if recipe.tokenizer == "auto" else recipe.tokenizer,
        "seed": ran.seed,
        "atol": "" if ran.atol is None else ran.atol,
        "rtol": "" if ran.rtol is None else ran.rtol,
        "tf32": "on" if ran.tf32 else "",
    }
    return {name: str(value) for name, value in options.items() if value != ""}
