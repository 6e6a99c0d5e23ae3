"""Adapters that stay apart from the weights of an export, in files or in tables: their files, and the proof
of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.commands.export_source import ExportSource
from ia3_export.commands.tabling import LAST_PLACES, prove_mixed, prove_rows
from ia3_export.commands.verify import Shipped, activated, prove, read_exported
from ia3_export.errors import Unsupported, UsageError
from ia3_export.onnx.export import TracedGraph
from ia3_export.onnx.exported import plain_stem
from ia3_export.onnx.options import GraphOptions
from ia3_export.onnx.swap import (
    ADAPTERS,
    Slot,
    adapter_values,
    distance_to_base,
    is_vector,
    live_vectors,
    make_overridable,
    read_adapter_file,
    write_adapter,
)
from ia3_export.onnx.task_table import describe_rows, is_vector_table
from ia3_export.parity.bits.graph_files import Graph
from ia3_export.parity.facts import model_id
from ia3_export.parity.settings import RunSettings
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.planning.recipe import DEFAULT_RECIPE
from ia3_export.report.model import Report, TensorFinding, WeightsProof


def write_apart(
    folder: Path, adapters: Sequence[Adapter], traced: Sequence[TracedGraph], graphs: GraphOptions
) -> dict[str, Any]:
    """What the manifest of `folder` says of adapters that stay apart from the weights, by the option that was
    given; their files are written here.

    Raises what `write_swappable` raises.
    """
    if graphs.swappable:
        return {"swappable": write_swappable(folder, adapters, traced)}
    return {"tasks": describe_rows(adapters)} if graphs.task_table else {}


def write_swappable(
    folder: Path, adapters: Sequence[Adapter], traced: Sequence[TracedGraph]
) -> dict[str, Any]:
    """Let runs give the graphs in `folder` the vectors of `adapters` (by the class's names), write these into
    ``adapters/``, and return what the manifest says of it.

    Raises `Unsupported` where a quantizer made codes of a tensor that adapters bring, and `UsageError` where
    two files would have one name.
    """
    names = {vector.name for vector in live_vectors(adapters)} | set(adapters[0].extras)
    turned = {name for graph in traced for name, origin in graph.origins.items() if origin.transposed}
    slots: dict[Path, dict[str, Slot]] = {}
    for path in sorted((folder / "onnx").glob("*.onnx")):
        found = make_overridable(path, names)
        slots[path] = {name: replace(slot, transposed=name in turned) for name, slot in found.items()}
    held = {graph.path.stem: graph.origins.keys() & names for graph in traced}
    known = set[str]().union(*held.values())
    for path, found in slots.items():
        lost = held[plain_stem(path) or path.stem] - found.keys()
        if lost:
            raise Unsupported(
                f"{path.name} holds codes instead of {min(lost)}, which every adapter brings",
                hint="leave out that --precision, or fold the adapters",
            )
    rows = {}
    owners: dict[str, str] = {}
    for adapter in adapters:
        files = {}
        for path, own_slots in slots.items():
            values = adapter_values(adapter, own_slots)
            if values:
                file = folder / ADAPTERS / _file(adapter, path, several=len(traced) > 1)
                # some file systems do not tell letters of two cases apart
                if owners.setdefault(file.name.lower(), adapter.name) != adapter.name:
                    raise UsageError(
                        f"the files of two adapters would both be called {file.name}",
                        hint="rename one of them",
                    )
                write_adapter(file, values)
                files[path.name] = f"{ADAPTERS}/{file.name}"
        rows[adapter.name] = {"digest": adapter.digest, "files": files}
    return {"initializers": sorted(known), "adapters": rows}


def _file(adapter: Adapter, graph: Path, *, several: bool) -> str:
    """``NAME.onnx_adapter``, with the graph's name where there are several."""
    return f"{adapter.name}{f'.{plain_stem(graph)}' if several else ''}.onnx_adapter"


def prove_apart(
    source: ExportSource, folder: Path, settings: RunSettings, say: Callable[[str], None]
) -> dict[str, Report]:
    """Prove the graphs in `folder`: without an adapter (under an empty name) equal to the base, and with each
    equal to the base with that adapter live; with another, or none, not equal to it."""
    graphs, held = read_exported(folder), source.plan
    plain = prove(held, Shipped(None, tuple(graphs), weights=held), settings)
    bits = [_prove_defaults(path, graph) for graph in graphs for path in graph.paths]
    bits += [proof for graph in graphs if graph.tables for proof in prove_mixed(graph)]
    proven = plain.in_parity and all(proof.passed for proof in bits)
    reports = {"": replace(plain, weights=(*plain.weights, *bits), in_parity=proven)}
    tabled = any(graph.tables for graph in graphs)
    for i, adapter in enumerate(source.swapped):
        say(f"verifying {adapter.name}")
        others = [other for other in source.swapped if other is not adapter]
        if tabled:  # which may have a hundred rows: the one before it, to which all others are alike
            others = [source.swapped[i - 1]] if others else []
        reports[adapter.name] = prove_active(held, adapter, graphs, others, settings)
    return {name: replace(report, base=model_id(source.named)) for name, report in reports.items()}


def prove_active(
    held: Plan,
    adapter: Adapter,
    graphs: Sequence[Graph],
    others: Sequence[Adapter],
    settings: RunSettings | None,
    *,
    named: Checkpoint | None = None,
) -> Report:
    """Prove `graphs`, swappable ones or with tables, which hold the tensors of the plan `held`, with
    `adapter` active; `named` as for `prove`.

    The `controls` are the float32 (or else float16) graph without an adapter and with `others`: they must not
    be in parity.
    """
    plan = make_plan(held.base, [adapter], DEFAULT_RECIPE)
    plan.raise_problems()
    active = tuple(activated(graph, adapter) for graph in graphs)
    exact = next((g for g in graphs if g.precision in ("float32", "float16")), None)
    controls: list[tuple[str, Graph]] = []
    if exact is not None and settings is not None:
        controls = [(f"{exact.file} without an adapter", exact)]
        controls += [(f"{exact.file} with {other.name}", activated(exact, other)) for other in others]
    shipped = Shipped(None, active, weights=held, controls=tuple(controls))
    report = prove(plan, shipped, settings, named=named)
    brought = plan.adapters[0]
    files = [prove_rows(brought, g) if g.tables else _prove_files(adapter, g) for g in active]
    return replace(
        report,
        weights=(*report.weights, *files),
        in_parity=report.in_parity and all(proof.passed for proof in files),
    )


def _prove_defaults(path: Path, graph: Graph) -> WeightsProof:
    """Whether a graph without an adapter is the one without the vectors' multiplications: bit for bit, or
    where ONNX Runtime then fuses other nodes (convolutions) to the last places."""
    held = [name for name in (*graph.overridable, *graph.tables) if is_vector(name) or is_vector_table(name)]
    names = {name.removeprefix(f"{plain_stem(path)}.") for name in held}
    apart = distance_to_base(path, names)
    passed = apart <= LAST_PLACES.get(graph.precision, LAST_PLACES["float32"])
    note = f"without an adapter its outputs are {apart:.1e} of the largest from the base's, not bit for bit"
    finding = TensorFinding(tensor=min(names, default=path.name), what="it is not the base", detail=note)
    return WeightsProof(
        name=f"{path.name} without an adapter",
        kind="onnx",
        file=path.name,
        passed=passed,
        changed=0,
        unchanged=len(names),
        nbytes=0,
        findings=() if passed else (finding,),
        notes=(note,) if apart else (),
    )


def _prove_files(adapter: Adapter, graph: Graph) -> WeightsProof:
    """Whether the files that a graph is run with hold `adapter`'s vectors, bit for bit in float32, and the
    graph ones."""
    read = {file.name: read_adapter_file(file) for file in dict.fromkeys(graph.adapters.values())}
    pairs = [pair for tensors in read.values() for pair in tensors.items()]
    # optimum's two decoders hold the same vectors
    held = {(name, values.tobytes()) for name, values in pairs if is_vector(name)}
    wanted = Counter(site.vector.astype("<f4").tobytes() for site in adapter.sites.values())
    missing = wanted - Counter(values for _, values in held)
    findings = [
        TensorFinding(
            tensor=name, what="the default is not one", detail="a run without an adapter is no base"
        )
        for name, tensor in graph.overridable.items()
        if is_vector(name) and (tensor.numpy() != 1).any()
    ]
    if missing or len(held) != len(adapter.sites):
        lost = [s.module for s in adapter.sites.values() if s.vector.astype("<f4").tobytes() in missing]
        findings.append(
            TensorFinding(
                tensor=min(lost, default=adapter.name),
                what="the adapter's file does not hold its vector",
                detail=f"{len(held)} vectors in {', '.join(read) or 'no file'}, {len(adapter.sites)} trained",
            )
        )
    return WeightsProof(
        name=f"{adapter.name} for {graph.file}",
        kind="onnx",
        file=", ".join(read),
        passed=not findings,
        changed=len(held),
        unchanged=0,
        nbytes=sum(values.nbytes for _, values in pairs),
        findings=tuple(findings),
    )
