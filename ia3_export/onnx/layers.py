"""Layers of one kind are traced once: the time of a trace then grows little with depth.

``torch.export`` reasons about symbolic shapes in every layer anew, seconds for each. Layers that do the same
with other parameters need that once. A forward in eager mode is recorded first, operator by operator; layers
with equal records are of one kind. While tracing, only the first of a kind runs; each other is one symbolic
operator (``torch.onnx.ops.symbolic_multi_out``), for which the nodes of the first are copied afterwards,
with the other layer's initializers.

Nothing is assumed of names or configurations. What cannot be told to be equal is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from ia3_export.onnx.eager import (
    Call,
    cache_slots,
    forward_replaced,
    leaves_of,
    named_tensors,
    put_together,
    recorded,
)

#: In the ``meta`` of an initializer that holds the transpose of its parameter.
TRANSPOSED = "transposed"
_DOMAIN = "ia3_export"
_ENTER, _LEAVE, _LAYER = "Enter", "Leave", "Layer"


@dataclass(frozen=True, slots=True)
class RepeatedLayers:
    """Layers of one kind, by module path and index of their entry in the cache (None without one)."""

    first: tuple[str, int | None]
    others: tuple[tuple[str, int | None], ...]


def find_repeated(model: Any, forward: Callable[[], Any]) -> list[RepeatedLayers]:
    """The layers of `model` of which several do the same in `forward`, which runs `model` eagerly.

    Two are of one kind when they are elements of one ``ModuleList`` or ``Sequential``, are called once, run
    the same operators with the same numbers on the same of their arguments and parameters and on the same
    tensors from elsewhere, and differ in no attribute but their own index. Layers inside of such ones are
    not listed.
    """
    import torch

    lists = [
        [(f"{name}.{i}" if name else i, layer) for i, layer in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) and len(module) > 1
    ]
    calls = recorded(model, [pair for layers in lists for pair in layers], forward)
    found: list[RepeatedLayers] = []
    inside: tuple[str, ...] = ()
    for layers in lists:  # outer ones come before those inside of them
        kinds: dict[Any, list[tuple[int, str, Call]]] = {}
        for i, (path, _) in enumerate(layers):
            if len(calls[path]) == 1 and not calls[path][0].writes and not path.startswith(inside):
                kinds.setdefault(tuple(calls[path][0].steps), []).append((i, path, calls[path][0]))
        for members in kinds.values():
            while members:
                i, first, call = members[0]
                same = [m for m in members if _same_attributes(layers[i][1], i, layers[m[0]][1], m[0])]
                members = [m for m in members if m not in same]
                if len(same) > 1:
                    others = tuple((path, call.slot) for _, path, call in same[1:])
                    found.append(RepeatedLayers((first, call.slot), others))
                    inside += tuple(f"{path}." for _, path, _ in same)
    return found


def _same_attributes(first: Any, i: int, other: Any, j: int) -> bool:
    """Whether the plain attributes of two layers, their `i`-th and `j`-th of a list, are equal, or those
    numbers."""
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    for one, two in zip(first.modules(), other.modules(), strict=True):
        mine, theirs = (
            {k: v for k, v in vars(m).items() if not k.startswith("_") and isinstance(v, plain)}
            for m in (one, two)
        )
        differing = [k for k in mine.keys() | theirs.keys() if repr(mine.get(k)) != repr(theirs.get(k))]
        if any((mine.get(k), theirs.get(k)) != (i, j) for k in differing):
            return False
    return True


@contextmanager
def traced_once(model: Any, repeated: Sequence[RepeatedLayers]) -> Iterator[None]:
    """While this is entered, `model` runs the first layer of each kind, between two markers, and a
    placeholder for each other."""
    with ExitStack() as stack:
        for layers in repeated:
            result: list[Any] = []
            path, slot = layers.first
            layer = model.get_submodule(path)
            stack.enter_context(forward_replaced(layer, _marked(layer, path, slot, result)))
            for path, slot in layers.others:
                layer = model.get_submodule(path)
                stack.enter_context(forward_replaced(layer, _placeholder(layer, path, slot, result)))
        yield


def _marked(layer: Any, path: str, slot: int | None, result: list[Any]) -> Callable[..., Any]:
    """The forward of `layer` between two markers, of all tensors that it is given and of all that it gives;
    those go into `result`."""
    forward = layer.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = leaves_of((args, kwargs))
        entry = cache_slots(leaves, slot)
        tensors, give = _tensors(leaves, entry)
        args, kwargs = put_together(give(_operator(_ENTER, path, tensors, tensors)), spec)
        leaves, spec = leaves_of(forward(*args, **kwargs))
        tensors, give = _tensors(leaves, entry)
        result[:] = (tensors, leaves, spec)
        return put_together(give(_operator(_LEAVE, path, tensors, tensors)), spec)

    return run


def _placeholder(layer: Any, path: str, slot: int | None, result: list[Any]) -> Callable[..., Any]:
    """One operator in place of the forward of `layer`, that gives what the first of its kind gave."""

    @wraps(layer.forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = leaves_of((args, kwargs))
        entry = cache_slots(leaves, slot)
        tensors, _ = _tensors(leaves, entry)
        like, leaves, spec = result
        _, give = _tensors(leaves, entry)
        return put_together(give(_operator(_LAYER, path, tensors, like)), spec)

    return run


def _tensors(
    leaves: Sequence[Any], entry: Sequence[tuple[Any, str]]
) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """The tensors among `leaves` and those of a cache's `entry`, and a function that puts others in their
    places: into the cache, and into the list that it returns."""
    import torch

    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def give(tensors: Sequence[Any]) -> list[Any]:
        for (layer, name), tensor in zip(entry, tensors[len(places) :], strict=True):
            setattr(layer, name, tensor)
        given = dict(zip(places, tensors, strict=False))
        return [given.get(i, leaf) for i, leaf in enumerate(leaves)]

    return [*(leaves[i] for i in places), *(getattr(layer, name) for layer, name in entry)], give


def _operator(op_type: str, path: str, inputs: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """A symbolic operator of the layer at `path` whose outputs have the shapes and dtypes of `like`."""
    import torch

    outputs: list[Any] = torch.onnx.ops.symbolic_multi_out(
        f"{_DOMAIN}::{op_type}",
        inputs,
        {"path": path},
        dtypes=[t.dtype for t in like],
        shapes=[t.shape for t in like],
        version=1,
    )
    return outputs


def copy_layers(traced: Any, model: Any, repeated: Sequence[RepeatedLayers]) -> Any:
    """A pass over `traced`, the ``onnx_ir.Model`` of `model` under `traced_once`: the nodes of each kind's
    first layer are copied to where the others stand. Initializers bear the names of parameters, or hold their
    transpose.

    Raises `LookupError` for what cannot be copied: a node with a graph in it.
    """
    import onnx_ir

    graph = traced.graph
    markers = {
        (node.op_type, node.attributes["path"].as_string()): node for node in graph if node.domain == _DOMAIN
    }
    for layers in repeated:
        first, _ = layers.first
        enter, leave = markers[_ENTER, first], markers[_LEAVE, first]
        body = _body(graph, enter, leave, f"{first}.")
        for path, _ in layers.others:
            placeholder = markers[_LAYER, path]
            values = dict(zip(enter.outputs, placeholder.inputs, strict=True))
            values |= _initializers(graph, body, model, (first, path))
            graph.insert_before(placeholder, [_copied(node, values, path) for node in body])
            _replace(graph, placeholder, [values.get(v, v) for v in leave.inputs])
        for marker in (enter, leave):
            _replace(graph, marker, marker.inputs)
    traced.opset_imports.pop(_DOMAIN, None)
    return onnx_ir.passes.PassResult(traced, modified=bool(markers))


def _body(graph: Any, enter: Any, leave: Any, prefix: str) -> list[Any]:
    """The nodes of `graph`, in order, that `leave` needs and that compute with what a layer is given or with
    its own initializers, whose names start with `prefix`. The rest, constants and sizes, is the same for all
    layers."""
    needed: set[Any] = set()
    left = [leave]
    while left:
        nodes = {value.producer() for value in left.pop().inputs if value is not None}
        nodes -= {None, enter, *needed}
        needed |= nodes
        left.extend(nodes)
    own = set(enter.outputs)
    body = []
    for node in graph:
        if node in needed and any(
            v in own or (v is not None and v.is_initializer() and v.name.startswith(prefix))
            for v in node.inputs
        ):
            body.append(node)
            own.update(node.outputs)
    return body


def _initializers(graph: Any, body: Sequence[Any], model: Any, paths: tuple[str, str]) -> dict[Any, Any]:
    """For each initializer that `body` reads of the layer of `model` at the first of `paths` that of the
    layer at the second, new in `graph`."""
    import onnx_ir

    theirs, tensors = (dict(named_tensors(model.get_submodule(path))) for path in paths)
    found = {}
    for value in dict.fromkeys(
        v for node in body for v in node.inputs if v is not None and v.is_initializer()
    ):
        inside = value.name.removeprefix(f"{paths[0]}.")
        # constants of the code are named after the layer, too; those of all its kind are equal
        if inside in theirs and tensors[inside] is not theirs[inside]:
            name = f"{paths[1]}.{inside}"
            parameter = tensors[inside].detach()
            tensor = onnx_ir.tensor(parameter.t() if value.meta.get(TRANSPOSED) else parameter, name=name)
            found[value] = onnx_ir.Value(
                name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.register_initializer(found[value])
    return found


def _copied(node: Any, values: dict[Any, Any], path: str) -> Any:
    """A copy of `node` for the layer at `path` on other `values`, to which its outputs are added."""
    import onnx_ir

    graphs = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
    if any(attribute.type in graphs for attribute in node.attributes.values()):
        raise LookupError(f"{node.name} has a graph in it")
    copy = onnx_ir.Node(
        node.domain,
        node.op_type,
        [values.get(value, value) for value in node.inputs],
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{node.name}/{path}",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.shape, new.type = f"{old.name}/{path}", old.shape, old.type
    values.update(zip(node.outputs, copy.outputs, strict=True))
    return copy


def _replace(graph: Any, marker: Any, values: Sequence[Any]) -> None:
    """Take `marker` out, with an ``Identity`` of `values` for each of its outputs."""
    import onnx_ir

    for old, value in zip(marker.outputs, values, strict=True):
        node = onnx_ir.Node("", "Identity", [value])
        new = node.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        graph.insert_before(marker, node)
        onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(marker, safe=True)
