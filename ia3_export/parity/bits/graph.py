"""The weights proof of an ONNX graph: its initializers are the folded tensors, nothing of an adapter is left.

Exporters transpose weights and lose their names (``MatMul`` takes the transpose of a Linear's weight), so
initializers are found by content: widened exactly or rounded to the graph's dtype, as they are or transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ia3_export.fold import FLOAT_DTYPES, Array, from_float, to_float
from ia3_export.onnx.decoded import DENSE
from ia3_export.onnx.weights import constant
from ia3_export.parity.bits.codes import CODES, check_codes
from ia3_export.parity.bits.diagnosis import left_out
from ia3_export.parity.bits.expected import Expected, Reader, expected_blocks, expected_tensors
from ia3_export.parity.bits.graph_files import Graph
from ia3_export.planning.plan import Plan
from ia3_export.report.model import TensorFinding, WeightsProof
from ia3_export.words import CODED_PRECISIONS, ONNX_FLOATS

#: Scales and offsets of codes.
_SCALE = re.compile(r"_(scales?|offsets)_*$")
_REPARAMETRIZED = re.compile(r"\.parametrizations\.|weight_(g|v|orig)$")
_ADAPTER_WORDS = ("ia3_l", "lora_", "base_layer", ".adapter_", "modules_to_save")
#: Elements of the first row by which an initializer is looked up before all of it is compared.
_START = 4


def prove_graph(
    plan: Plan,
    graph: Graph,
    name: str,
    base_graph: Graph | None = None,
    *,
    float_graph: Graph | None = None,
    alone: bool = False,
) -> WeightsProof:
    """Compare the initializers of `graph` with what `plan` makes of base and adapters.

    `base_graph` is the base's own export, whose operators must then be the same. Codes cannot be compared bit
    for bit: they must be within a step of their tensor, or of the weight of their name in `float_graph`, if
    that is the float32 graph of the same export. `alone`: no forward will judge what the bits leave open, so
    a changed tensor that is nowhere in the graph, and codes, are findings.
    """
    rows = {
        row.name: row
        for row in expected_tensors(plan).values()
        if row.source.dtype in FLOAT_DTYPES and row.source.size > 1
    }
    floats = {n: t for n, t in graph.initializers.items() if t.dtype.name in ONNX_FLOATS and t.size > 1}
    matches = _match(rows, floats)
    computed = sorted(floats.keys() - matches.keys())
    quantized = graph.precision in CODED_PRECISIONS
    widened = [name for name in computed if quantized and name.endswith(DENSE)]
    weights = [name for name in computed if not _scales_codes(name, graph) and name not in widened]
    found = {row.name for row in matches.values()}
    found |= {row.name for name, row in rows.items() if name not in found and _is_held(row, floats)}
    findings = [*_left_behind(graph, plan, matches)]
    findings += _wrong_values(rows, floats, weights, found)
    findings += _twice(rows, matches, found)
    notes: list[str] = []
    unproven, coded = 0, set[str]()
    if quantized:
        made_of = _made_of(graph, float_graph, matches)
        unproven, coded = _prove_codes(rows, graph, made_of, findings, notes, alone=alone)
        found |= coded
        unproven += _leave_widened(widened, findings, notes, alone=alone)
    # a graph that gives hidden states has no head
    headless = graph.outputs == ("last_hidden_state",)
    absent = sorted(
        n
        for n, row in rows.items()
        if row.changed and n not in found and not (headless and row.how in ("replace", "add"))
    )
    if alone:
        detail = "no initializer holds it as it must be; without a forward it is not proven"
        findings += [TensorFinding(n, "not found", detail) for n in absent]
    elif unseen := [name for name in absent if not quantized or len(rows[name].source.shape) < 2]:
        notes.append(f"not found as they are: {_listed(unseen)}; the forwards judge")
    different = [n for n, row in matches.items() if row.changed]
    proven = [*matches.values(), *(rows[of] for of in coded)]
    if different:
        notes.append(
            f"{len(different)} of {len(graph.initializers)} initializers differ from the base's: "
            f"{_listed(different)}"
        )
    if base_graph is not None:
        _compare_operators(graph, base_graph, findings, notes)
    return WeightsProof(
        name=name,
        kind="onnx",
        file=graph.file,
        passed=not findings,
        changed=sum(row.changed for row in proven),
        unchanged=sum(not row.changed for row in proven),
        computed=len(computed),
        nbytes=sum(tensor.nbytes for tensor in graph.initializers.values()),
        findings=tuple(findings),
        notes=tuple(notes),
        unproven=unproven,
    )


def _leave_widened(
    names: Sequence[str], findings: list[TensorFinding], notes: list[str], *, alone: bool
) -> int:
    """How many weights refolding made float32 of codes: they are as far from the tensor as these were."""
    if names:
        notes.append(f"made float32 of codes: {_listed(names)}; the forwards judge")
    if alone:
        findings += [TensorFinding(n, "not compared", "it was made float32 of codes") for n in names]
    return len(names)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"


def _prove_codes(
    rows: Mapping[str, Expected],
    graph: Graph,
    made_of: Callable[[str], Array | None],
    findings: list[TensorFinding],
    notes: list[str],
    *,
    alone: bool,
) -> tuple[int, set[str]]:
    """Add what is found of initializers that hold codes; how many were compared with nothing, and the rows
    that kept ones are equal to."""
    kept = graph.precision == "keep"
    checks = list(check_codes(rows, graph.initializers, graph.origins, made_of))
    compared = [check for check in checks if check.of is not None]
    for check in compared:
        if not (check.equal if kept else check.within_a_step):
            explained = "they must be the base's own" if kept else "rounding explains one"
            detail = f"its codes are up to {check.error:.3g} steps from {check.of}, {explained}"
            findings.append(TensorFinding(check.name, "differs", detail))
    unproven = [check.name for check in checks if check.of is None]
    notes.append(
        f"{len(checks)} initializers hold codes of a quantized base; {len(compared)} of them were compared, "
        f"{sum(check.equal for check in compared)} are what they must be but for the rounding of float32"
        if kept
        else f"quantized: {len(checks)} initializers hold codes, which bits cannot prove; {len(compared)} of "
        "them were compared, within one step of their tensor"
    )
    if alone:
        detail = "no tensor was found that its codes stand for"
        findings += [TensorFinding(name, "not compared", detail) for name in unproven]
    elif unproven:
        notes.append(f"compared with nothing: {_listed(unproven)}; the forwards judge")
    equal = {check.of for check in checks if kept and check.equal and check.of is not None}
    return len(unproven), equal & rows.keys()


def _compare_operators(
    graph: Graph, base_graph: Graph, findings: list[TensorFinding], notes: list[str]
) -> None:
    if base_graph.precision != graph.precision:
        notes.append(f"the base's export is {base_graph.precision}: operators are not compared")
        return
    other = list(_other_operators(graph, base_graph))
    findings += other
    if not other:
        notes.append(f"the {sum(graph.operators.values())} operators are those of the base's export")


def _scales_codes(name: str, graph: Graph) -> bool:
    """Whether an initializer has the scales of codes.

    Of whatever shape it is, it is no weight, and judged with its codes.
    """
    own = _SCALE.sub("_", name)
    return own != name and any(
        other.startswith(own) and tensor.dtype.name in CODES for other, tensor in graph.initializers.items()
    )


def _made_of(
    graph: Graph, float_graph: Graph | None, proven: Collection[str]
) -> Callable[[str], Array | None]:
    """The weights of `float_graph` by name, if `graph` was made of it.

    What both hold in float32 under one name is the same, but for what is `proven`: a bias with a vector that
    was moved to it.
    """
    if float_graph is None:
        return lambda _: None
    theirs = float_graph.initializers
    kept = [
        (tensor, theirs.get(name))
        for name, tensor in graph.initializers.items()
        if tensor.dtype.name == "FLOAT" and tensor.size > 1 and not _SCALE.search(name)
        if name not in proven
    ]
    same = all(other is not None and np.array_equal(tensor.numpy(), other.numpy()) for tensor, other in kept)
    shaped = float_graph.shaped

    def weight(name: str) -> Array | None:
        if not same:
            return None
        if name in theirs:
            values: Array = theirs[name].numpy()
            return values
        return constant(shaped[name]) if name in shaped else None

    return weight


def _left_behind(graph: Graph, plan: Plan, proven: Collection[str]) -> Iterator[TensorFinding]:
    """Nodes named after adapter modules, and initializers that hold a vector, and are not `proven` to be a
    tensor of the merged model: a bias of ones is one with a vector folded in."""
    # X-MOD and others have adapters of their own
    words = [word for word in _ADAPTER_WORDS if not any(word in name for name in plan.base.stored.tensors)]
    for name in dict.fromkeys(graph.names):
        if any(word in name for word in words):
            yield TensorFinding(name, "adapter node", "the graph still applies an adapter at run time")
    vectors = [(s.module, s.vector) for a in plan.adapters for s in a.sites.values() if np.any(s.vector != 1)]
    for name, tensor in graph.initializers.items():
        dtype = ONNX_FLOATS.get(tensor.dtype.name)
        if dtype is None or name in proven or sum(extent > 1 for extent in tensor.shape) > 1:
            continue
        values = None
        for module, vector in vectors:
            if tensor.size != len(vector):
                continue
            values = tensor.numpy().astype("<f8").reshape(-1) if values is None else values
            if np.array_equal(values, to_float(from_float(vector.astype("<f4"), dtype), dtype)):
                yield TensorFinding(
                    name, "adapter vector", f"it holds the vector of {module}, which is not folded"
                )


def _match(rows: Mapping[str, Expected], floats: Mapping[str, Any]) -> dict[str, Expected]:
    """Initializers that are a tensor of the merged model, as it is or transposed.

    Equal names first, then any.
    """
    by_start: dict[tuple[Any, ...], list[tuple[Expected, bool]]] = {}
    for dtype in {ONNX_FLOATS[tensor.dtype.name] for tensor in floats.values()}:
        for row in rows.values():
            start = _bits(_expected_start(row), row.dtype, dtype).tobytes()
            by_start.setdefault((dtype, row.source.shape, start), []).append((row, False))
            if len(row.source.shape) == 2:
                by_start.setdefault((dtype, row.source.shape[::-1], start), []).append((row, True))
    matches: dict[str, Expected] = {}
    for name, tensor in floats.items():
        dtype, values = ONNX_FLOATS[tensor.dtype.name], _raw(tensor)
        ways = [values, values.T] if values.ndim == 2 else [values]
        starts = [np.ascontiguousarray(way[(0,) * (way.ndim - 1)][:_START]).tobytes() for way in ways]
        candidates = [
            (row, turned)
            for start in dict.fromkeys(starts)
            for row, turned in by_start.get((dtype, values.shape, start), [])
        ]
        named = [row.name for row in rows.values() if _same_name(row.name, name)]
        if named:  # what has a tensor's name must hold that tensor
            candidates = [candidate for candidate in candidates if candidate[0].name in named]
        taken = {row.name for row in matches.values()}
        candidates.sort(key=lambda candidate: candidate[0].name in taken)
        for row, turned in candidates:
            if _holds(values.T if turned else values, row, dtype):
                matches[name] = row
                break
    return matches


def _is_held(row: Expected, floats: Mapping[str, Any]) -> bool:
    """Whether any initializer holds `row`, which has none of its own.

    Exporters keep equal tensors (biases of zeros) once.
    """
    if any(_same_name(row.name, name) for name in floats):
        return False
    for tensor in floats.values():
        dtype, values = ONNX_FLOATS[tensor.dtype.name], _raw(tensor)
        ways = [values, values.T] if values.ndim == 2 else [values]
        if any(way.shape == row.source.shape and _holds(way, row, dtype) for way in ways):
            return True
    return False


def _same_name(stored: str, initializer: str) -> bool:
    """Whether the names are equal but for a prefix that one of them lacks."""
    return stored == initializer or stored.endswith(f".{initializer}") or initializer.endswith(f".{stored}")


def _expected_start(row: Expected) -> Array:
    """The first elements of the first row."""
    count = min(_START, row.source.shape[-1])
    with (reader := Reader()).stack:
        return next(expected_blocks(row, reader, 0, count))[0].copy()


def _raw(tensor: Any) -> Array:
    """The initializer's bits, as unsigned numbers of the element's size."""
    values: Array = tensor.numpy()
    return values.view(f"<u{values.dtype.itemsize}")


def _bits(stored: Array, dtype: str, wanted: str) -> Array:
    """Stored bits of `dtype` as bits of the dtype `wanted`: widened exactly, or rounded to nearest even."""
    if dtype == wanted:
        return stored.view(f"<u{stored.dtype.itemsize}")
    values = to_float(stored.copy(), dtype)
    bits = from_float(values.astype("<f8") if wanted == "F64" else values, wanted)
    return bits.view(f"<u{bits.dtype.itemsize}")


def _holds(values: Array, row: Expected, dtype: str) -> bool:
    """Whether `values`, bits in the shape of `row`, are what `row` must be."""
    columns = values.shape[-1]
    lines = values.reshape(-1, columns) if values.flags.c_contiguous else values
    with (reader := Reader()).stack:
        for wanted, first in expected_blocks(row, reader):
            line = first // columns
            some = np.ascontiguousarray(lines[line : -(-(first + len(wanted)) // columns)]).reshape(-1)
            start = first - line * columns
            if not np.array_equal(some[start : start + len(wanted)], _bits(wanted, row.dtype, dtype)):
                return False
    return True


def _wrong_values(
    rows: Mapping[str, Expected], floats: Mapping[str, Any], computed: Sequence[str], found: set[str]
) -> Iterator[TensorFinding]:
    """Initializers that are no tensor of the merged model, but take the place of one."""
    # a parametrized weight (weight norm) is computed from what is stored
    absent = [row for name, row in rows.items() if name not in found and not _REPARAMETRIZED.search(name)]
    # exporters fold a batch normalization into the convolution before it: such weights are computed
    fuses = any(row.name.endswith("running_var") for row in absent)
    for name in computed:
        values = _raw(floats[name])
        dtype = ONNX_FLOATS[floats[name].dtype.name]
        named = [row for row in absent if _same_name(row.name, name)]
        shapes = (values.shape, values.shape[::-1] if values.ndim == 2 else None)
        alike = named or [r for r in absent if values.ndim > 1 and r.source.shape in shapes]
        if not alike or (fuses and (values.ndim > 2 or named)):
            continue
        for row in alike:
            if row.changed and row.base is not None and row.base.shape == row.source.shape:
                base = replace(row, source=row.base, scales=(), dtype=row.base.dtype)
                ways = [v for v in (values, values.T) if v.shape == row.source.shape]
                if any(_holds(way, base, dtype) for way in ways):
                    what, why = left_out(row)
                    yield TensorFinding(name, what, f"{row.name}: {why}")
                    break
        else:
            places = ", ".join(row.name for row in alike[:4])
            yield TensorFinding(
                name,
                "differs",
                f"{dtype} {list(values.shape)} in the place of {places}, but with other values",
            )


def _twice(
    rows: Mapping[str, Expected], matches: Mapping[str, Expected], found: set[str]
) -> Iterator[TensorFinding]:
    """Tensors that several initializers hold while another of their shape is held by none."""
    holders: dict[str, list[str]] = {}
    for name, row in matches.items():
        holders.setdefault(row.name, []).append(name)
    for stored, names in holders.items():
        shape = rows[stored].source.shape
        absent = [row.name for row in rows.values() if row.name not in found and row.source.shape == shape]
        if len(names) > 1 and absent:
            detail = f"it holds {stored} a second time, and nothing holds {', '.join(absent[:4])}"
            yield TensorFinding(names[-1], "differs", detail)


def _other_operators(graph: Graph, base: Graph) -> Iterator[TensorFinding]:
    for kind in sorted({*graph.operators, *base.operators}):
        here, there = graph.operators[kind], base.operators[kind]
        if here != there:
            yield TensorFinding(kind, "other operators", f"{here} nodes, the base's export has {there}")
