"""optimum's ``decoder_model_merged.onnx``: both decoders as the branches of one ``If`` on its own input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONDITION = "use_cache_branch"


def merge_decoders(first: Any, cached: Any) -> Any:
    """The ``onnx_ir.Model`` of two, which it takes apart: that of `cached` (decoder with past) where
    ``use_cache_branch`` is true, else that of `first`.

    Inputs are those of both, outputs those of `first`; the cross-attention cache, which `cached` does not
    give, passes through it. Weights lie in the main graph, those that both branches use once.
    """
    import onnx_ir as ir

    models = {"first": first, "cached": cached}
    inputs: dict[str, Any] = {}
    for model in models.values():
        for port in model.graph.inputs:
            inputs.setdefault(port.name, ir.Value(name=port.name, shape=port.shape, type=port.type))
    condition = ir.Value(name=CONDITION, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    weights: dict[str, Any] = {}
    outputs = [(port.name, port.shape, port.type) for port in first.graph.outputs]
    names = [name for name, _, _ in outputs]
    order = [port.name for port in first.graph.inputs]
    branches = {branch: _branch(branch, model, inputs, weights, names) for branch, model in models.items()}
    choice = ir.node(
        "If",
        [condition],
        {"then_branch": branches["cached"], "else_branch": branches["first"]},
        num_outputs=len(outputs),
    )
    for value, (name, shape, kind) in zip(choice.outputs, outputs, strict=True):
        value.name, value.shape, value.type = name, shape, kind
    rest = [value for name, value in inputs.items() if name not in order]
    graph = ir.Graph(
        [*(inputs[name] for name in order), *rest, condition],
        list(choice.outputs),
        nodes=[choice],
        initializers=list(weights.values()),
        opset_imports=first.graph.opset_imports,
        name="main_graph",
    )
    return ir.Model(graph, ir_version=first.ir_version, producer_name=first.producer_name)


def _branch(
    name: str, model: Any, inputs: Mapping[str, Any], weights: dict[str, Any], outputs: list[str]
) -> Any:
    """The graph of `model` as a branch.

    Its inputs and initializers become those of the main graph (`inputs`, `weights`).
    """
    import onnx_ir as ir

    graph = model.graph
    for port in list(graph.inputs):
        ir.convenience.replace_all_uses_with(port, inputs[port.name])
    for value in list(graph.initializers.values()):
        ir.convenience.replace_all_uses_with(value, _shared(name, value, weights))
    nodes, given = list(graph), {value.name: value for value in graph.outputs}
    results = []
    for output in outputs:
        value = given.get(output)
        if value is None or value.is_initializer() or value.producer() is None:
            source = inputs[output.replace("present", "past_key_values", 1)]
            passed = ir.node("Identity", [source])
            nodes.append(passed)
            value = passed.outputs[0]
            value.type, value.shape = source.type, source.shape
        value.name = f"{name}/{output}"
        results.append(value)
    for node in nodes:
        if node.graph is not None:
            graph.remove(node)
    graph.outputs.clear()
    for node in nodes:
        for value in node.outputs:
            if value not in results:
                value.name = f"{name}/{value.name}"
    return ir.Graph([], results, nodes=nodes, name=name)


def _shared(branch: str, value: Any, weights: dict[str, Any]) -> Any:
    """The main graph's initializer for `value`: the one of its name if the bytes are equal, else one of its
    own.
    """
    import onnx_ir as ir

    for name in (value.name, f"{branch}/{value.name}"):
        there = weights.get(name)
        if there is None:
            made = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
            weights[name] = made
            return made
        mine, theirs = value.const_value, there.const_value
        if mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes():
            return there
    raise AssertionError(f"two branches have two initializers {value.name}")
