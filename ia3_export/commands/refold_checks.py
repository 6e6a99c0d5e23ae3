"""Whether a graph holds each tensor that a refolding changes, and for itself alone.

Tensors that are equal in a base can be one initializer in a graph: exporters keep equal ones once, and merge
products of them with the same value. What is multiplied into it reaches them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor, read_values, same_bytes
from ia3_export.errors import Refused, Unsupported
from ia3_export.onnx.content import content_places, elements, probe_of
from ia3_export.onnx.decoded import products_of, values_of
from ia3_export.onnx.files import bodies
from ia3_export.onnx.places import GraphFile, Place
from ia3_export.planning.changes import Change
from ia3_export.planning.plan import Plan
from ia3_export.words import ONNX_FLOATS

BROUGHT = ("replace", "add")
#: Elements by which tensors are sorted before whole ones are compared.
_START = 16
_MERGED = "export the merged model instead"
Places = Mapping[str, Sequence[Place]]


def require_held(model: Sequence[GraphFile], places: Iterable[Places], plan: Plan) -> None:
    """Raise `Unsupported` for tensors that change and that no graph of a `model` holds.

    A head may be in none where the graphs end in hidden states.
    """
    held = {name for each in places for name in each}
    outputs = [port.name for graph in model for port in graph.model.graph.output]
    headless = not any("logits" in name for name in outputs)
    for name, change in plan.changes.items():
        if name in held or change.how in ("cast", "dequantize") or (change.how in BROUGHT and headless):
            continue
        if change.how not in BROUGHT and name.endswith(".bias") and _is_zero(plan.base.dense.tensors[name]):
            continue  # equal small tensors are kept once; zeros stay zeros
        raise Unsupported(
            f"{' + '.join(graph.path.name for graph in model)} holds {name} under no name that tells it: the "
            "graph was optimized, quantized or exported so that the site is gone",
            hint=_MERGED
            if plan.base.stored.shards
            else f"give --base to find it by its values, or {_MERGED}",
        )


def _is_zero(tensor: StoredTensor) -> bool:
    return tensor.computed is None and not np.any(read_values(tensor))


def require_alone(graph: GraphFile, places: Places, changes: Mapping[str, Change]) -> None:
    """Raise `Unsupported` for a changed tensor that more nodes read than others of its layer.

    Names do not say whether its module runs more often, or whether another tensor is equal and is kept in it.
    """
    for name in changes.keys() & places.keys():
        uses = max(_uses(graph, place) for place in places[name])
        if uses < 2 or (changes[name].how not in BROUGHT and _all_zero(graph, places[name])):
            continue
        layer = _layer(name)
        fewest = min(
            _uses(graph, place)
            for other, found in places.items()
            if _layer(other) == layer
            for place in found
        )
        if uses > max(fewest, 1):
            raise Unsupported(
                f"{graph.path.name} reads {name} at {uses} places, other tensors of its layer at {fewest}: "
                "tensors that are equal in the base may have been kept once",
                hint="give --base too, whose values tell whether there are others",
            )


def require_told_apart(
    graph: GraphFile, named: Places, wanted: Collection[str], tensors: Mapping[str, StoredTensor]
) -> None:
    """Raise `Unsupported` for a `wanted` tensor that equals another one, unless names tell the two apart.

    By their values each would be found at both places, and exporters keep equal ones once.
    """
    for name, twin in _twins(tensors, wanted):
        if name not in named or twin not in named:
            raise Unsupported(
                f"{name} and {twin} are equal in the base, and {graph.path.name} does not tell one from the "
                "other",
                hint=_MERGED,
            )


def require_same_values(
    graph: GraphFile, named: Places, wanted: Collection[str], tensors: Mapping[str, StoredTensor]
) -> None:
    """Raise `Refused` where a name leads to floats that are not those of the base.

    Codes are not compared: quantizers may move weights by more than a step.
    """
    for name in sorted(named.keys() & wanted):
        tensor = tensors[name]
        spots = {
            p.name for p in named[name] if p.name in graph.spans and graph.spans[p.name].dtype in ONNX_FLOATS
        }
        if not spots or tensor.computed is not None or probe_of(tensor) is None:
            continue
        taken = (graph.spans.keys() | graph.coded.keys()) - spots
        found = content_places(graph, {name: tensor}, taken).get(name, ())
        if {place.name for place in found} != spots:
            raise Refused(
                f"{graph.path.name} holds other values under the name of {name} than the base",
                hint="give the checkpoint that the graph was made of; or its manifest is another export's",
            )


def _twins(tensors: Mapping[str, StoredTensor], wanted: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each wanted tensor with others that hold the same numbers, not all of them zeros."""
    alike: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in ("F64", "F32", "F16", "BF16") and tensor.size:
            start = elements(tensor, 0, min(tensor.size, _START))
            alike.setdefault((tensor.dtype, tensor.shape, start.tobytes()), []).append(name)
    for names in alike.values():
        for name in [name for name in names if name in wanted and len(names) > 1]:
            if tensors[name].computed is None and not np.any(read_values(tensors[name])):
                continue
            others = (other for other in names if other != name)
            yield from ((name, other) for other in others if same_bytes(tensors[name], tensors[other]))


def _layer(name: str) -> str:
    """The name up to its last number; its first part where it has none."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[: last + 1])


def _uses(graph: GraphFile, place: Place) -> int:
    """How many nodes of one graph or body read a tensor.

    Whatever adds a bias; the products of a matrix, and the biases after one that was merged with its equal.
    """
    name = graph.coded.get(place.name, place.name)
    if name not in graph.spans:
        return 0
    uses = dict.fromkeys((node.output[0] for node in graph.readers.get(name, ())), 1)
    if len(graph.spans[name].shape) > 1:
        with suppress(Unsupported):  # what looks rows up, or an operator that is refused by its name later
            uses = {node.output[0]: max(1, _biases(graph, node)) for node, _ in products_of(graph, name)}
    inside = (
        sum(uses.get(node.output[0], 0) for node in body.node if node.output)
        for body in bodies(graph.model.graph)
    )
    return max(inside)


def _biases(graph: GraphFile, product: Any) -> int:
    """The initializers that are added to what a product gives."""
    readers = graph.readers.get(product.output[0], ())
    return sum(node.op_type == "Add" and any(n in graph.spans for n in node.input) for node in readers)


def _all_zero(graph: GraphFile, places: Sequence[Place]) -> bool:
    return not any(
        np.any(values_of(graph, place.name)) if place.name in graph.spans else True for place in places
    )
