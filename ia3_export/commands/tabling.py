"""The proof of tables of tasks: the rows bit for bit, and batches that mix tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.header import read_values
from ia3_export.fold import Array
from ia3_export.onnx.exported import TASK, plain_stem
from ia3_export.onnx.runtime import OnnxGraph, call, open_model
from ia3_export.onnx.swap import made_up
from ia3_export.onnx.task_table import HOLDER, is_vector_table
from ia3_export.parity.bits.graph_files import Graph
from ia3_export.report.model import TensorFinding, WeightsProof

#: Texts of a batch that mixes tasks.
_TEXTS = 4
#: Most that other kernels (for another size of batch, of fused nodes) may change, beside the largest value.
LAST_PLACES = {"float32": 1e-5, "float16": 1e-2}
#: How many times as near to another task's run as to its own a row may be where activations are rounded to
#: 8 bits: the noise of that may be larger than what tells two tasks apart.
_MARGIN = 2.0


def prove_rows(adapter: Adapter, graph: Graph) -> WeightsProof:
    """Whether the rows of `graph` that it is run with are the vectors and the head of `adapter`, bit for bit
    in the tables' type, or ones; and rows 0 ones.

    By value, since the class may have other names than the adapter. What no table has a name for (a decoder's
    vectors, of an encoder alone) is noted, and the forwards judge.
    """
    tables = _tables(graph)
    rows = {name: table[graph.task] for name, table in tables.items()}
    left = Counter(_bits(row) for row in rows.values())
    findings = [
        TensorFinding(tensor=name, what="row 0 is not one", detail="a run of task 0 is no base")
        for name, table in tables.items()
        if is_vector_table(name) and (table[0] != 1).any()
    ]
    missing = []
    for name, values in _brought(adapter):
        ways = {_bits(way.astype(t.dtype)) for t in tables.values() for way in (values, values.T)}
        held = next((way for way in ways if left[way]), None)
        if held is None:
            missing.append(name)
        else:
            left[held] -= 1
    proven = len(rows) - left.total()
    lost = [name for name in missing if any(_same_site(name, table) for table in tables)]
    detail = f"row {graph.task} does not hold it in any of {len(tables)} tables"
    findings += [TensorFinding(tensor=name, what="not found", detail=detail) for name in lost]
    for name, row in rows.items():
        if left[_bits(row)] and not (is_vector_table(name) and (row == 1).all()):
            detail = f"row {graph.task} holds what is not {adapter.name}'s"
            findings.append(TensorFinding(tensor=name, what="differs", detail=detail))
    unseen = sorted(set(missing) - set(lost))
    return WeightsProof(
        name=f"{adapter.name} in {graph.file}",
        kind="onnx",
        file=graph.file,
        passed=not findings,
        changed=proven,
        unchanged=len(rows) - proven,
        nbytes=sum(row.nbytes for row in rows.values()),
        findings=tuple(findings),
        notes=(f"no table has a name like {', '.join(unseen[:4])}; the forwards judge",) if unseen else (),
    )


def _brought(adapter: Adapter) -> Iterator[tuple[str, Array]]:
    """The vectors of `adapter`, those that are not all ones, and the tensors that it brings."""
    for site in adapter.sites.values():
        if (site.vector != 1).any():
            yield f"{site.module}.{site.direction}put", site.vector.astype("<f4")
    for name, tensor in adapter.extras.items():
        yield name, read_values(tensor).astype("<f4")


def _same_site(name: str, table: str) -> bool:
    """Whether `table` is called after a module and side, or a parameter, but for a prefix."""
    plain = table.replace(f".{HOLDER}.", ".")
    return plain == name or plain.endswith(f".{name}") or name.endswith(f".{plain}")


def _tables(graph: Graph) -> dict[str, Array]:
    """The tables of all files of `graph`; equal ones of two decoders once."""
    found: dict[str, Array] = {}
    for name, tensor in graph.tables.items():
        plain, table = _plain(name, graph), tensor.numpy()
        same = plain not in found or np.array_equal(found[plain], table)
        found[plain if same else name] = table
    return found


def _plain(name: str, graph: Graph) -> str:
    """The name of an initializer without that of its file, which it has where there are several."""
    stems = [plain_stem(path) or path.stem for path in graph.paths if len(graph.paths) > 1]
    return next((name.removeprefix(f"{s}.") for s in stems if name.startswith(f"{s}.")), name)


def _bits(row: Array) -> bytes:
    """In the order of a matrix without axes of one."""
    return row.squeeze().tobytes()


def prove_mixed(graph: Graph) -> Iterator[WeightsProof]:
    """Whether in batches of texts of several tasks every row is what a run of that text and task alone gives:
    for each file of `graph` that has tables, on made-up inputs.

    Bit for bit, or where ONNX Runtime has other kernels for another size of batch to the last places. Beside
    codes activations are rounded to 8 bits, so that a last place may become a step: there each must be about
    as near to its own run as to any other.
    """
    for path in graph.paths:
        (opened,) = open_model([path]).graphs.values()
        if TASK in opened.inputs:
            rows = next(table.shape[0] for table in graph.tables.values())
            yield _mixed(path, opened, rows, graph.precision)


def _mixed(path: Path, graph: OnnxGraph, rows: int, precision: str) -> WeightsProof:
    apart, findings, alike = 0.0, [], 0
    for first in range(0, rows, _TEXTS):
        # one after the other, and again from row 0 on where these are fewer
        tasks = [(first + i) % rows for i in range(_TEXTS)]
        together, alone = _run(graph, tasks), {task: _run(graph, [task]) for task in tasks}
        scale = max(float(np.abs(output).max(initial=0)) for output in together) or 1.0
        for place, task in enumerate(tasks):
            mine = [output[place : place + 1] for output in together]
            own, *others = (_distance(mine, alone[t]) / scale for t in (task, *alone.keys() - {task}))
            other, apart = min(others), max(apart, own)
            allowed = LAST_PLACES.get(precision, other * _MARGIN)
            alike += other <= allowed
            if own > allowed:
                detail = f"beside others it is {own:.1e} of the largest output from its own run, {other:.1e} "
                detail += "from that of another task"
                findings.append(TensorFinding(tensor=f"{TASK} {task}", what="differs", detail=detail))
    note = f"in batches of {_TEXTS} tasks every row "
    note += f"is {apart:.1e} of the largest from its own run" if apart else "has the bits of its own run"
    if alike and precision in LAST_PLACES:
        note += f"; {alike} times another task gave the same"
    return WeightsProof(
        name=f"{path.name} with mixed tasks",
        kind="onnx",
        file=path.name,
        passed=not findings,
        changed=0,
        unchanged=rows,
        nbytes=0,
        findings=tuple(findings),
        notes=(note,),
    )


def _distance(some: Sequence[Array], others: Sequence[Array]) -> float:
    pairs = zip(some, others, strict=True)
    return max(float(np.abs(one.astype("<f8") - other).max(initial=0)) for one, other in pairs)


def _run(graph: OnnxGraph, tasks: Sequence[int]) -> list[Array]:
    """All outputs for one made-up text, once for each of `tasks` in one batch."""
    whole = {
        name: np.repeat(value, len(tasks), axis=0) if graph.inputs[name][:1] == ("batch_size",) else value
        for name, value in made_up(graph.session, 1).items()
    }
    outputs = call(graph, {**whole, TASK: np.array(tasks)})
    return [value.numpy() for value in outputs.values()]
