"""Where an ONNX graph that exists already holds the weights of a model.

By name where names survive: our manifest says what every initializer was made of, PyTorch's older exporter
names nodes after the module that they come from (``/encoder/layer.0/attention/self/key/MatMul``), and biases
keep their own. Else by content, beside a checkpoint (`onnx.content`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.side_files import mapping
from ia3_export.errors import DamagedFile
from ia3_export.fold import FLOAT_DTYPES
from ia3_export.models.modules import in_layer_stack
from ia3_export.onnx.exported import plain_stem, precision_of
from ia3_export.onnx.files import walk_nodes
from ia3_export.onnx.spans import Span, initializers, read_light, span_of

#: What quantizers put after the name of a weight: ours, and those of ONNX Runtime.
CODES = ("_Q4", "_Q8", "_quantized", "_q4", "_weight_quantized")
_CODED = re.compile(rf"({'|'.join(CODES)})_*$")
PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "MatMulNBits")
#: What may lie between a weight and its product.
PASSED = ("Cast", "DequantizeLinear", "Identity", "Transpose")
_OPERATOR = re.compile(r"/(MatMul|Gemm|Conv)(_\d+)?(_quant|_Q4|_Q8|_q4)?$")


@dataclass(frozen=True, eq=False)
class GraphFile:
    """A graph whose tensors stay on disk: `model` is its ``onnx.ModelProto`` with all of them external."""

    path: Path
    model: Any

    @cached_property
    def spans(self) -> Mapping[str, Span]:
        """Where the bytes of its initializers lie, by name."""
        found = (span_of(tensor, self.path) for tensor in initializers(self.model.graph))
        return {span.name: span for span in found if span is not None}

    @cached_property
    def constants(self) -> frozenset[str]:
        """The names of all initializers, and of what is left out in a list of inputs."""
        return frozenset(("", *(tensor.name for tensor in initializers(self.model.graph))))

    @cached_property
    def readers(self) -> Mapping[str, Sequence[Any]]:
        """The nodes that take a value, by its name; those in bodies, too."""
        found: dict[str, list[Any]] = {}
        for node in walk_nodes(self.model.graph):
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def makers(self) -> Mapping[str, Any]:
        """The node that gives a value, by its name."""
        return {name: node for node in walk_nodes(self.model.graph) for name in node.output}

    @cached_property
    def coded(self) -> Mapping[str, str]:
        """The initializer of codes of each weight that has some, by the weight's own name."""
        return {_CODED.sub("", name): name for name in self.spans if _CODED.search(name)}

    @property
    def precision(self) -> str:
        """What its name or its weights say it is held in: fp32, fp16, int8, q8, int4 or keep."""
        named = precision_of(self.path)
        if named != "fp32":
            return named
        if self.coded:
            nodes = [node for node in walk_nodes(self.model.graph) if node.op_type == "MatMulNBits"]
            bits = {a.i for node in nodes for a in node.attribute if a.name == "bits"}
            return "int4" if 4 in bits else "int8"
        halves = sum(s.nbytes if s.dtype == "FLOAT16" else -s.nbytes for s in self.spans.values())
        return "fp16" if halves > 0 else "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A stored tensor in a graph: the initializer `name` (of codes: the weight's own name), `transposed` or
    as it is stored. Where it lies beside others in one initializer, its outputs are the `count` from `first`
    on. `dtype` and `shape` are the stored ones, where our manifest says so."""

    name: str
    transposed: bool
    first: int = 0
    count: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] = ()


def read_graph_file(path: Path) -> GraphFile:
    """Raises what `spans.read_light` does, and `DamagedFile` for nodes that give nothing."""
    model = read_light(path)
    for node in walk_nodes(model.graph):
        if not node.output:
            raise DamagedFile(
                f"{path} holds {node.op_type} {node.name}, a node without outputs", hint="export it again"
            )
    return GraphFile(path, model)


def named_places(
    graph: GraphFile, manifest: Mapping[str, Any], *, conv1d: bool = False
) -> dict[str, list[Place]]:
    """The places of stored tensors, by their names, as far as names tell. `conv1d`: the model's layers store
    weights as inputs x outputs."""
    found: dict[str, list[Place]] = {}
    known = set[str]()
    for place, tensor in _recorded(graph, manifest):
        known.add(place.name)
        found.setdefault(tensor, []).append(place)
    for name in (*graph.spans, *graph.coded):
        if name not in known and name.endswith((".weight", ".bias")):
            known.add(name)
            turned = outputs_last(graph, name) != (conv1d and in_layer_stack(name.rpartition(".")[0]))
            found.setdefault(name, []).append(
                Place(name=name, transposed=turned and name.endswith(".weight"))
            )
    for node in graph.makers.values():
        weight = _weight_of(graph, node)
        operator = _OPERATOR.search(node.name)
        if weight is not None and operator is not None and weight not in known:
            module = node.name[: operator.start()].strip("/").replace("/", ".")
            known.add(weight)
            found.setdefault(f"{module}.weight", []).append(
                Place(name=weight, transposed=outputs_last(graph, weight))
            )
    return found


def _recorded(graph: GraphFile, manifest: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """What our manifest says of initializers that are there, in whatever precision."""
    rows = mapping(mapping(manifest.get("provenance")).get(plain_stem(graph.path) or graph.path.stem))
    for name, row in rows.items():
        origin = mapping(row)
        tensor, dtype, shape = origin.get("tensor"), origin.get("dtype"), origin.get("shape")
        if not isinstance(tensor, str) or (name not in graph.spans and name not in graph.coded):
            continue
        place = Place(
            name=name,
            transposed=bool(origin.get("transposed")),
            dtype=dtype if dtype in FLOAT_DTYPES else None,
            shape=tuple(shape) if isinstance(shape, list) and all(type(n) is int for n in shape) else (),
        )
        yield place, tensor


def _weight_of(graph: GraphFile, node: Any) -> str | None:
    """The own name of the weight that a product multiplies with."""
    if len(node.input) < 2 or node.op_type not in PRODUCTS:
        return None
    name, seen = node.input[1], set[str]()
    while name not in graph.spans:
        maker = graph.makers.get(name)
        if maker is None or maker.op_type not in PASSED or not maker.input or name in seen:
            return None
        seen.add(name)
        name = maker.input[0]
    own = _CODED.sub("", name)
    return own if own in graph.coded else name


def outputs_last(graph: GraphFile, name: str) -> bool:
    """Whether the weight `name` (or its codes) lies as the second factor of a product: inputs x outputs."""
    waiting, seen = [(graph.coded.get(name, name), False)], set[str]()
    while waiting:
        value, turned = waiting.pop()
        for node in graph.readers.get(value, ()):
            if node.op_type in ("MatMul", "MatMulInteger"):
                return (len(node.input) > 1 and value == node.input[1]) != turned
            if node.op_type == "Gemm" and value == node.input[1]:
                return any(a.name == "transB" and a.i for a in node.attribute) == turned
            if node.op_type in PASSED and node.output and node.output[0] not in seen:
                seen.add(node.output[0])
                waiting.append((node.output[0], turned != (node.op_type == "Transpose")))
    return False
