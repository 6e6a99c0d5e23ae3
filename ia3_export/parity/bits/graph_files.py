"""The ONNX files of one model as the proof of weights reads them: without torch, external data mapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.folder import read_config
from ia3_export.checkpoint.manifest import MANIFEST
from ia3_export.errors import DamagedFile, NotFound, Refused, first_line
from ia3_export.onnx.exported import SUFFIXES, plain_stem
from ia3_export.onnx.weights import SHAPING, is_weight, looks_up_task
from ia3_export.words import CODED_PRECISIONS, ONNX_FLOATS, TORCH_NAMES


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Graph:
    """The ONNX files of one model.

    Initializers by name (lazy), operators by count, names of all nodes and values, and of the outputs beside
    the cache. `precision` is float64, float32, float16, bfloat16, int8, int4 or keep: what the weights that
    reach the outputs are held in, or that they are the codes of a quantized base, as the file's name says.
    `kept`: that is what the folder was exported for, whatever is in this file. `origins` maps initializers to
    the stored tensors that they were made of, where the folder's manifest says so; `shaped` are the values
    (of onnx_ir) that may be weights on their way to a reader: cut, turned or reshaped. `overridable` are the
    defaults of what a run may give, which are no `initializers` here, and `adapters` the ``.onnx_adapter``
    files, by graph file, that it shall be run with. `tables` are looked up by the input ``task``, and no
    `initializers` either; `task` is the row that it shall be run with.
    """

    paths: tuple[Path, ...]
    initializers: Mapping[str, Any]
    operators: Counter[str]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str
    origins: Mapping[str, str]
    shaped: Mapping[str, Any]
    kept: bool
    overridable: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    task: int = 0

    @property
    def file(self) -> str:
        """The file names."""
        return " + ".join(path.name for path in self.paths)


def read_graphs(paths: Sequence[Path]) -> Graph:
    """Read the files of one model (`find_onnx`), without external data.

    The initializers of each of several files carry its name.

    Raises `DamagedFile`, and `Refused` for external data outside a file's folder.
    """
    parts = [_read_graph(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    stems = [plain_stem(path) or path.stem for path in paths]

    def joined(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = zip(stems, tables, strict=True)
        return {f"{stem}.{name}": value for stem, table in pairs for name, value in table.items()}

    operators: Counter[str] = sum((part.operators for part in parts), Counter())
    names = tuple(name for part in parts for name in part.names)
    quantized = [part.precision for part in parts if part.precision in CODED_PRECISIONS]
    precision = min(quantized, default=parts[-1].precision)
    return Graph(
        paths=tuple(paths),
        initializers=joined(part.initializers for part in parts),
        operators=operators,
        names=names,
        outputs=parts[-1].outputs,
        precision=precision,
        origins=joined(part.origins for part in parts),
        shaped=joined(part.shaped for part in parts),
        kept=any(part.kept for part in parts),
        overridable=joined(part.overridable for part in parts),
        tables=joined(part.tables for part in parts),
    )


def _read_graph(path: Path) -> Graph:
    import onnx_ir

    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors share no base class
        raise DamagedFile(
            f"{path} is not readable ONNX: {first_line(error)}",
            hint="export the model again",
        ) from None
    initializers: dict[str, Any] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                initializers[name] = value.const_value
    nodes, held = list(model.graph.all_nodes()), []
    for node in nodes:  # some tools keep weights in constants
        tensors = [a for a in node.attributes.values() if a.type.name == "TENSOR" and not a.is_ref()]
        held += [attribute.as_tensor() for attribute in tensors]
        if node.op_type == "Constant" and tensors and node.outputs:
            initializers[node.outputs[0].name or ""] = tensors[0].as_tensor()
    for tensor in (*initializers.values(), *held):
        if isinstance(tensor, onnx_ir.ExternalTensor):
            _check_external(tensor, path)
    shaped = {out.name or "": out for node in nodes if node.op_type in SHAPING for out in node.outputs}
    manifest = _manifest(path)
    given = _overridable(manifest) & {value.name for value in model.graph.inputs}
    overridable = {name: initializers.pop(name) for name in given & initializers.keys()}
    tables = {name: initializers.pop(name) for name in _tables(nodes) & initializers.keys()}
    names = [*initializers, *(node.name or "" for node in nodes)]
    names += [output.name or "" for node in nodes for output in node.outputs]
    outputs = tuple(o.name or "" for o in model.graph.outputs if not (o.name or "").startswith("present."))
    operators = Counter(node.op_type for node in nodes)
    precision = _precision(model, initializers)
    if precision in CODED_PRECISIONS and path.stem.endswith(SUFFIXES["keep"]):
        precision = "keep"
    return Graph(
        paths=(path,),
        initializers=initializers,
        operators=operators,
        names=tuple(names),
        outputs=outputs,
        precision=precision,
        origins=_origins(manifest, path),
        shaped=shaped,
        kept=precision == "keep" or _keeps(manifest),
        overridable=overridable,
        tables=tables,
    )


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of the exported folder that a graph lies in; ``{}`` where there is none."""
    for folder in (path.parent.parent, path.parent):
        try:
            return dict(read_config(folder / MANIFEST))
        except (NotFound, DamagedFile):
            continue
    return {}


def _origins(manifest: Mapping[str, Any], path: Path) -> dict[str, str]:
    """What `manifest` says of the initializers of a graph. It says it of the float32 names."""
    try:
        rows = manifest.get("provenance", {}).get(plain_stem(path) or path.stem, {})
        return {name: row["tensor"] for name, row in rows.items() if isinstance(row["tensor"], str)}
    except (AttributeError, KeyError, TypeError):
        return {}


def _overridable(manifest: Mapping[str, Any]) -> set[str]:
    """The initializers whose values a run may give, in all graphs of the folder."""
    try:
        return set(manifest.get("swappable", {}).get("initializers", ()))
    except (AttributeError, TypeError):
        return set()


def _tables(nodes: Sequence[Any]) -> set[str]:
    """The initializers that are read by nothing but a ``Gather`` of rows for the input ``task``."""
    found, others = set[str](), set[str]()
    for node in nodes:
        by_task = looks_up_task(node)
        for i, value in enumerate(node.inputs):
            if value is not None:
                (found if by_task and i == 0 else others).add(value.name or "")
    return found - others


def _keeps(manifest: Mapping[str, Any]) -> bool:
    """Whether the codes of a quantized base are in a graph of the folder."""
    try:
        return any(graph["precision"] == "keep" for graph in manifest.get("graphs", ()))
    except (KeyError, TypeError):
        return False


def _check_external(tensor: Any, path: Path) -> None:
    folder, data = path.resolve().parent, Path(tensor.path)
    if data.resolve().is_relative_to(folder):
        size = data.stat().st_size if data.is_file() else -1
        if size < (tensor.offset or 0) + tensor.nbytes:
            raise DamagedFile(
                f"{path} keeps {tensor.name} in {data.name}, which "
                f"{'is too short' if size >= 0 else 'is missing'}",
                hint="the external data belong beside the .onnx file; copy or fetch both again",
            )
    if not data.resolve().is_relative_to(folder):
        raise Refused(
            f"{path} names the external data file {data}, which lies outside its folder",
            hint="do not use this file; tell whoever published it",
        )


def _precision(model: Any, initializers: Mapping[str, Any]) -> str:
    """What the weights that reach the outputs are held in."""
    nodes, values = _reachable(model)
    used = [tensor for name, tensor in initializers.items() if name in values]
    held = {tensor.dtype.name for tensor in used if is_weight(tensor)}
    in_blocks = {n.attributes["bits"].value for n in nodes if n.op_type == "MatMulNBits"}
    if 4 in in_blocks or held & {"INT4", "UINT4"} or any(n.op_type == "MatMulBnb4" for n in nodes):
        return "int4"
    if in_blocks or held & {"INT8", "UINT8"}:
        return "int8"
    sizes: Counter[str] = Counter()
    for tensor in used:
        sizes[tensor.dtype.name] += tensor.nbytes if tensor.dtype.name in ONNX_FLOATS else 0
    kind = sizes.most_common(1)[0][0] if sizes else "FLOAT"
    return TORCH_NAMES[ONNX_FLOATS.get(kind, "F32")]


def _reachable(model: Any) -> tuple[list[Any], set[str]]:
    """The nodes that the outputs depend on, and the names of their inputs.

    Bodies of ``If`` and ``Loop`` belong to them.
    """
    waiting = [value.producer() for value in model.graph.outputs]
    values = {value.name for value in model.graph.outputs}
    nodes: dict[int, Any] = {}
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in nodes:
            continue
        nodes[id(node)] = node
        inside = [
            n for a in node.attributes.values() if a.type.name == "GRAPH" for n in a.as_graph().all_nodes()
        ]
        waiting += inside
        for value in node.inputs:
            if value is not None:
                values.add(value.name)
                waiting.append(value.producer())
    return list(nodes.values()), values
