"""Decompose the operators that ONNX does not have, node by node.

``torch.onnx.export`` calls ``ExportedProgram.run_decompositions``, which traces the whole program a second
time and takes longer than the first; of a transformer's few hundred nodes some ten are in need of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ia3_export.libraries import private

_log = logging.getLogger(__name__)


def decomposed_by_node(program: Any) -> Any:
    """`program`, a ``torch.export.ExportedProgram``, whose ``run_decompositions`` changes single nodes."""
    program.run_decompositions = partial(_decompose, program, program.run_decompositions)
    return program


def _decompose(program: Any, whole: Any, table: Mapping[Any, Any]) -> Any:
    """Replace each node whose operator is in the decomposition `table`, or is composed by torch itself, by
    what it is made of. Where a node cannot be traced alone, `whole` does it all.
    """
    import torch

    # composed operators that are neither in that table nor in this one have no translation
    translated = torch.export.default_decompositions()
    try:
        _write_elsewhere(program.graph)
        _skip_identities(program)
        composed = [node for node in program.graph.nodes if _is_composed(node, table, translated)]
        parts = [(node, _traced(node, table)) for node in composed]
    except Exception as error:  # make_fx fails in many ways; the other way does the same
        _log.debug("the whole program is decomposed", exc_info=error)
        return whole(table)
    for node, part in parts:
        _replace(program, node, part)
    return program


def _skip_identities(program: Any) -> None:
    """Remove what gives its argument to whoever does not write into it or ask for gradients. A copy of a
    constant has no shape noted beside it, which others need.
    """
    import torch

    aten = torch.ops.aten
    for operator in (aten.lift_fresh_copy.default, aten.detach.default):
        for node in program.graph.find_nodes(op="call_function", target=operator):
            _put(program, node, node.args[0])


def _write_elsewhere(graph: Any) -> None:
    """Make ``x.add_(y)`` and its like ``x.add(y)`` where x was computed for this alone. Raises `LookupError`
    where it has other readers.
    """
    for node in graph.nodes:
        if not _writes(node):
            continue
        written = node.args[0]
        plain = _functional(node.target)
        if _aliases(written) or list(written.users) != [node] or plain is None or _widens(node):
            raise LookupError(f"{node.target} writes into what others read, or in another dtype")
        node.target = plain


def _widens(node: Any) -> bool:
    """Whether a tensor that `node` reads has a dtype to which that of the first would be promoted."""
    import torch

    first, *others = (one.meta["val"].dtype for one in node.all_input_nodes if _is_tensor(one))
    return any(torch.promote_types(first, other) != first for other in others)


def _is_tensor(node: Any) -> bool:
    import torch

    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_operator(node: Any) -> bool:
    return isinstance(node.target, private("torch._ops:OpOverload"))


def _writes(node: Any) -> bool:
    """Whether `node` writes into what it reads."""
    return _is_operator(node) and node.target._schema.is_mutable


def _aliases(node: Any) -> bool:
    """Whether `node` gives what it reads, or a part of that; an input of the program does."""
    return not _is_operator(node) or any(value.alias_info for value in node.target._schema.returns)


def _functional(target: Any) -> Any:
    """The operator that gives what ``target``, one that writes, writes; None where torch has none."""
    import torch

    packet, _, overload = str(target).removeprefix("aten.").partition(".")
    return getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), overload, None)


def _is_composed(node: Any, table: Mapping[Any, Any], translated: Any) -> bool:
    """Raises `LookupError` for an operator of graphs."""
    import torch

    if node.op == "get_attr":
        raise LookupError(f"{node.target} may be a graph")
    target = node.target
    if not _is_operator(node) or target == torch.ops.aten.reshape.default:
        return False
    return target in table or (target._can_decompose() and target not in translated)


def _traced(node: Any, table: Mapping[Any, Any]) -> Any:
    """The graph of `node` alone: a placeholder for each node that it reads, in order.

    Raises `LookupError` where one of these is no tensor.
    """
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.node import map_arg

    read = node.all_input_nodes
    if not all(map(_is_tensor, read)):
        raise LookupError(f"{node.target} reads sizes")

    def run(*tensors: Any) -> Any:
        given = dict(zip(read, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)

    values = [one.meta["val"] for one in read]
    with values[0].fake_mode:  # for what it makes without reading
        return make_fx(run, decomposition_table=table)(*values).graph


def _replace(program: Any, node: Any, part: Any) -> None:
    """Put the nodes of `part` in the place of `node`."""
    placeholders = part.find_nodes(op="placeholder")
    values = dict(zip(placeholders, node.all_input_nodes, strict=True))
    for new in part.nodes:  # where in the model it is, which the exporter misses
        new.meta = node.meta | new.meta
    with program.graph.inserting_before(node):
        result = program.graph.graph_copy(part, values)
    if isinstance(result, Sequence):  # what reads it takes an item each
        for item in list(node.users):
            _put(program, item, result[item.args[1]])
        program.graph.erase_node(node)
    else:
        _put(program, node, result)


def _put(program: Any, node: Any, result: Any) -> None:
    """`result` in the place of `node`."""
    node.replace_all_uses_with(result)
    program.graph_signature.replace_all_uses(node.name, result.name)
    program.graph.erase_node(node)
