"""The graph of a base with the vectors of adapters as live multiplications: what a refolded one must compute.

A vector on inputs multiplies what a product takes, one on outputs what it gives, and its bias by itself,
where that is added later. Made of the graph alone; whatever the folding does has no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.fold import Array
from ia3_export.onnx.decoded import around, products_of, values_of
from ia3_export.onnx.files import bodies, walk_bodies
from ia3_export.onnx.places import GraphFile, Place, outputs_last, read_graph_file
from ia3_export.onnx.refold import PlacedVector, Rewriting
from ia3_export.onnx.rewrite import write_graph


@dataclass(frozen=True, slots=True)
class LiveFold:
    """A vector on a tensor at a place of a graph."""

    place: Place
    laid: PlacedVector


def write_live(
    path: Path, folds: Sequence[LiveFold], target: Path, brought: Sequence[tuple[Place, StoredTensor]] = ()
) -> None:
    """Write the graph `path` with `folds` as multiplications to `target`, with external data beside it, and
    with the tensors that adapters have `brought`.

    Raises `Unsupported` for a place that no product reads.
    """
    graph = read_graph_file(path)
    biases = frozenset(fold.place.name for fold in folds if len(fold.laid.shape) == 1)
    heads, writer = Rewriting(graph=graph), _Writer(graph=graph, biases=biases)
    for place, tensor in brought:
        heads.replace(place, tensor)
    for fold in folds:
        writer.add(fold)
    writer.finish()
    write_graph(graph, heads.new, target, changed=True)


@dataclass(slots=True, eq=False, kw_only=True)
class _Writer:
    """`biases` are those with vectors. `half`: what is multiplied next is float16. `latest`: what readers of
    a value read in its place so far. `homes`: the graph or body that makes or holds a value."""

    graph: GraphFile
    biases: frozenset[str]
    count: int = 0
    half: bool = False
    latest: dict[str, str] = field(default_factory=dict)
    homes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for body in bodies(self.graph.model.graph):
            made = (name for node in body.node for name in node.output)
            held = (tensor.name for tensor in body.initializer)
            self.homes.update(dict.fromkeys((*made, *held), body))

    def add(self, fold: LiveFold) -> None:
        place, laid = fold.place, fold.laid
        name = self.graph.coded.get(place.name, place.name)
        self.half = self.graph.spans[name].dtype == "FLOAT16"
        if len(laid.shape) == 1:
            self._multiply_bias(name, self._spread(fold, self.graph.spans[name].shape[0]))
            return
        found = products_of(self.graph, name)
        if not found:
            raise Unsupported(
                f"{self.graph.path.name} multiplies with {place.name} in no operator that is known",
                hint="export the merged model instead",
            )
        for node, _ in found:
            if node.op_type == "MatMulNBits":  # its scales are of the type of what it multiplies
                scales = self.graph.spans.get(node.input[2])  # none where they are widened before
                self.half = scales is not None and scales.dtype == "FLOAT16"
            if laid.direction == "in":
                self._before(node, fold)
            else:
                self._after(node, fold)

    def _spread(self, fold: LiveFold, size: int) -> Array:
        """The factors of one side, ones for what lies beside the tensor."""
        factors = fold.laid.scale.factors.astype("<f4")
        if fold.place.count is None:
            return factors
        whole = np.ones(size, "<f4")
        whole[fold.place.first :][: fold.place.count] = factors
        return whole

    def _before(self, node: Any, fold: LiveFold) -> None:
        value = around(self.graph, node)[0] if node.op_type == "MatMulInteger" else node.input[0]
        value = next((old for old, new in self.latest.items() if new == value), value)
        maker = self.graph.makers.get(value)
        factors = fold.laid.scale.factors.astype("<f4")
        if maker is not None and maker.op_type == "Gather" and maker.input[1].rstrip("_").endswith("_order"):
            value = maker.input[0]
        trailing = (1,) * max(0, len(fold.laid.shape) - 2)
        self._put_before(self.graph.readers[value], value, factors.reshape(-1, *trailing))

    def _after(self, node: Any, fold: LiveFold) -> None:
        last = around(self.graph, node)[1] if node.op_type == "MatMulInteger" else node
        offsets = self._added_offsets(node) if node.op_type == "MatMulNBits" else None
        last = offsets or last
        shape = self._spread(fold, self._outputs(fold))
        trailing = (1,) * max(0, len(fold.laid.shape) - 2)
        old = last.output[0]
        bare = f"{old}.bare"
        last.output[0] = bare
        if old in self.homes:
            self.homes[bare] = self.homes[old]
        out = old
        if node.op_type in ("Gemm", "Conv") and len(node.input) > 2 and node.input[2] not in self.biases:
            out = f"{old}.unbiased"  # made by the exporter, of a normalization that comes after the vector
            self._add_bias(node, out, old, trailing)
        self._insert(bare, shape.reshape(-1, *trailing), out)

    def _add_bias(self, node: Any, value: str, out: str, trailing: tuple[int, ...]) -> None:
        """Let what `node` adds be added to `value`, after it."""
        import onnx

        bias = values_of(self.graph, node.input[2]).reshape(-1, *trailing)
        del node.input[2:]
        self.count += 1
        name = f"ia3.bias.{self.count}"
        self.graph.model.graph.initializer.append(onnx.numpy_helper.from_array(bias, name))
        self._put(onnx.helper.make_node("Add", [value, name], [out], name=name))

    def _outputs(self, fold: LiveFold) -> int:
        name = self.graph.coded.get(fold.place.name, fold.place.name)
        shape = self.graph.spans[name].shape
        return shape[-1] if outputs_last(self.graph, fold.place.name) else shape[0]

    def _added_offsets(self, node: Any) -> Any | None:
        """The ``Add`` after a product of codes that adds what the offsets of its blocks give."""
        own = node.input[1].rstrip("_").removesuffix("_Q4").removesuffix("_Q8")
        if not any(name.rstrip("_") == f"{own}_offsets" for name in self.graph.spans):
            return None
        readers = self.graph.readers.get(node.output[0], ())
        return readers[0] if len(readers) == 1 and readers[0].op_type == "Add" else None

    def _multiply_bias(self, name: str, factors: Array) -> None:
        """A bias that is added on its own; those of ``Gemm`` and ``Conv`` are multiplied with the product."""
        readers = [n for n in self.graph.readers.get(name, ()) if n.op_type not in ("Gemm", "Conv")]
        if readers:
            self._put_before(readers, name, factors)

    def _put_before(self, readers: Sequence[Any], value: str, factors: Array) -> None:
        """Let `readers` of `value` read its product with `factors`, after those that there are."""
        old = self.latest.get(value, value)
        live = self.latest[value] = f"{value}.live.{self.count}"
        self._insert(old, factors, live)
        for reader in readers:
            reader.input[:] = [live if name == old else name for name in reader.input]

    def _insert(self, value: str, factors: Array, out: str) -> None:
        """``out = value * factors``, in the type of the graph."""
        import onnx

        self.count += 1
        vector = f"ia3.vector.{self.count}"
        kept = factors.astype("<f2" if self.half else "<f4")
        self.graph.model.graph.initializer.append(onnx.numpy_helper.from_array(kept, vector))
        name = f"ia3.live.{self.count}"
        self._put(onnx.helper.make_node("Mul", [value, vector], [out], name=name))

    def _put(self, node: Any) -> None:
        """Put a node into the graph or body that makes its first input."""
        home = self.homes.get(node.input[0], self.graph.model.graph)
        home.node.append(node)
        self.homes[node.output[0]] = home

    def finish(self) -> None:
        """Put the nodes of the graph and of its bodies in an order in which each has its inputs."""
        # inner ones first: they are copied with the outer
        for body in reversed(list(bodies(self.graph.model.graph))):
            _sort(body, self.graph.path)


def _sort(graph: Any, path: Path) -> None:
    made = {name for node in graph.node for name in node.output if name}  # left out ones have none
    known, waiting, ordered = set[str](), list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            read = [*node.input, *(name for inner in walk_bodies(node) for name in inner.input)]
            if all(name in known or name not in made for name in read):
                ordered.append(node)
                known.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise DamagedFile(f"{path} has nodes that wait for each other", hint="export it again")
        waiting = later
    copied = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copied)
