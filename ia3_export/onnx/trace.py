"""From a torch function to a clean ONNX model, by ``torch.onnx.export`` with transformers' own patches.

``transformers.exporters`` knows which torch functions, FX nodes and translations ONNX gets wrong; its
patches, fixes and table are used as they are. Its exporter class is not: names, one graph for prefill and
decoding, and packaging are other here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ia3_export.errors import Unsupported, first_line
from ia3_export.libraries import private
from ia3_export.onnx.contract import GraphSpec
from ia3_export.onnx.decompose import decomposed_by_node
from ia3_export.onnx.layers import TRANSPOSED, RepeatedLayers, copy_layers, find_repeated, traced_once
from ia3_export.onnx.passes import run_passes

_log = logging.getLogger(__name__)
_PREFIX = "model."
#: Equal initializers of at most so many elements are kept once, under the name of one of them.
SHARED = 1024


def trace(model: Any, spec: GraphSpec, opset: int) -> Any:
    """Trace the function of `spec` to an ``onnx_ir.Model``.

    Parameters are initializers under their own names (a weight that is only used transposed is stored so),
    and nothing in it belongs to this machine. Weights are not copied.

    `model` is expected in float32 and eval mode. Raises `Unsupported` when torch cannot trace it.
    """
    import torch

    apply_patches = private("transformers.exporters.utils:apply_patches")
    reset_model_state = private("transformers.exporters.exporter_dynamo:reset_model_state")
    to_onnx = _exporter(spec, opset)  # imports the module that registers what apply_patches applies
    try:
        with (
            apply_patches("dynamo"),
            apply_patches("onnx"),
            reset_model_state(model),
            _patched(model),
            torch.no_grad(),
        ):
            return _trace(model, spec, to_onnx)
    except Unsupported:
        raise
    except Exception as error:  # torch.export and torch.onnx fail in many ways, without a common base
        cause = error.__cause__ or error
        raise Unsupported(
            f"torch cannot export {type(model).__name__} to ONNX: {first_line(cause)}",
            hint="try another --task or --opset, and please report the architecture",
        ) from error


def _trace(model: Any, spec: GraphSpec, to_onnx: Callable[[Any], Any]) -> Any:
    """Layers of one kind traced once; where that cannot be done, all of them."""
    wrapped = _wrap(model, spec)
    repeated = _repeated(model, lambda: wrapped(*spec.samples))
    if repeated:
        try:
            with traced_once(model, repeated):
                traced = to_onnx(wrapped)
            return _finish(traced, spec, model, repeated)
        except Unsupported:
            raise
        except Exception as error:  # as in `trace`; what fails again is told
            _log.debug("every layer is traced", exc_info=error)
    return _finish(to_onnx(wrapped), spec, model, [])


def _repeated(model: Any, forward: Callable[[], Any]) -> list[RepeatedLayers]:
    try:
        return find_repeated(model, forward)
    except Exception as error:  # samples that do not fit one another, as a filled cache of another length
        _log.debug("every layer is traced", exc_info=error)
        return []


def _exporter(spec: GraphSpec, opset: int) -> Callable[[Any], Any]:
    """``torch.export`` and ``torch.onnx.export`` of a wrapped model, as transformers' exporter calls them."""
    import torch

    apply_fx_node_fixes = private("transformers.exporters.utils:apply_fx_node_fixes")
    apply_onnx_ir_fixes = private("transformers.exporters.exporter_onnx:apply_onnx_ir_fixes")
    translations = private("transformers.exporters.exporter_onnx:_ONNX_TRANSLATION_TABLE")
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(port.shape) if isinstance(axis, str)}
        for port in spec.inputs
    )

    def program_of(wrapped: Any) -> Any:
        program = torch.export.export(
            wrapped,
            spec.samples,
            dynamic_shapes=(dynamic,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        apply_fx_node_fixes("onnx", program.graph_module)
        return program

    def translated(program: Any) -> Any:
        exported = torch.onnx.export(
            program,
            args=(),
            dynamo=True,
            opset_version=opset,
            verbose=False,
            optimize=False,
            input_names=[port.name for port in spec.inputs],
            output_names=[port.name for port in spec.outputs],
            custom_translation_table=translations,
        )
        apply_onnx_ir_fixes(exported)
        return exported.model

    def to_onnx(wrapped: Any) -> Any:
        program = program_of(wrapped)
        try:
            return translated(decomposed_by_node(program))
        except Exception as error:  # as in `trace`
            _log.debug("decomposed as torch does it", exc_info=error)
        return translated(program_of(wrapped))

    return to_onnx


def _finish(traced: Any, spec: GraphSpec, model: Any, repeated: Sequence[RepeatedLayers]) -> Any:
    """Optimize the graph, copy its repeated layers, give weights and axes their names, and remove what
    belongs to this machine."""
    import onnx_ir.passes.common as common

    run_passes(
        traced,
        _name_parameters,
        _transpose_weights,
        partial(_optimize, kept=[layers.first[0] for layers in repeated]),
        _transpose_weights,
        partial(copy_layers, model=model, repeated=repeated),
        _state_sizes,
        common.IdentityEliminationPass(),
        _fold_constants,
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=SHARED),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),
        _forget_machine,
        partial(_declare_ports, spec=spec),
    )
    return traced


def _optimize(model: Any, *, kept: Sequence[str]) -> Any:
    """Run the optimizer of onnxscript.

    Initializers of the layers at `kept` stay as they are: for it they are inputs. It would merge them with
    equal ones and with constants, and other layers' differ.
    """
    from onnx_ir.passes import PassResult
    from onnxscript import optimizer

    graph = model.graph
    prefixes = tuple(f"{path}." for path in kept)
    tensors = {
        value: value.const_value for name, value in graph.initializers.items() if name.startswith(prefixes)
    }
    for value in tensors:
        graph.initializers.pop(value.name)
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize(model)
    for value, tensor in tensors.items():
        graph.inputs.remove(value)
        value.const_value = tensor
        graph.register_initializer(value)
    return PassResult(model, modified=True)  # it does not say


def _fold_constants(model: Any) -> Any:
    from onnx_ir.passes import PassResult
    from onnxscript import optimizer

    return PassResult(model, modified=bool(optimizer.fold_constants(model, onnx_shape_inference=False)))


def _forget_machine(model: Any) -> Any:
    """Take away what tells of this machine and of the samples, and is no part of the model: versions, notes,
    inferred shapes."""
    from onnx_ir.passes import PassResult

    model.producer_version = ""
    model.metadata_props.clear()
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
    for value in (v for node in graph.all_nodes() for v in node.outputs):
        if not value.is_graph_output():  # shapes that were inferred for the samples
            value.shape = value.type = None
    return PassResult(model, modified=True)


def _declare_ports(model: Any, *, spec: GraphSpec) -> Any:
    """Give inputs and outputs the names of their free axes."""
    import onnx_ir

    graph = model.graph
    for values, ports in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, port in zip(values, ports, strict=True):
            value.shape = onnx_ir.Shape(port.shape)
    return onnx_ir.passes.PassResult(model, modified=True)


def _wrap(model: Any, spec: GraphSpec) -> Any:
    """The module that is traced: positional inputs in, a tuple out."""
    import torch

    class Traced(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            named = {port.name: tensor for port, tensor in zip(spec.inputs, tensors, strict=True)}
            return spec.function(self.model, named)

    return Traced().eval()


@contextmanager
def _patched(model: Any) -> Iterator[None]:
    """Llama 4 rotates complex numbers, of which ONNX has no ``unsqueeze``.

    This does the same in pairs of real ones, as transformers itself rewrites it for OpenVINO. And no reports
    of missing vision operators (of torchvision) and of constants that are not folded.
    """
    module: Any = sys.modules[type(model).__module__]
    has_complex = model.config.model_type.startswith("llama4")
    rotate = getattr(module, "apply_rotary_emb", None)
    if has_complex:
        module.apply_rotary_emb = _rotate_pairs
    names = (
        "torch.onnx._internal.exporter._registration",
        "onnxscript.optimizer._constant_folding",
        "onnx_ir",
    )
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if has_complex:
            module.apply_rotary_emb = rotate


def _rotate_pairs(query: Any, key: Any, frequencies: Any) -> tuple[Any, Any]:
    """``apply_rotary_emb`` of Llama 4.

    Query and key (batch, length, heads, size), complex frequencies (batch, length, size / 2).
    """
    import torch

    cos, sin = torch.view_as_real(frequencies)[:, :, None].unbind(-1)

    def rotated(x: Any) -> Any:
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
        return turned.flatten(3).type_as(x)

    return rotated(query), rotated(key)


def _name_parameters(model: Any) -> Any:
    """Give parameters their names in the model that was wrapped."""
    from onnx_ir.passes import PassResult

    initializers = model.graph.initializers
    wrapped = [name for name in initializers if name.startswith(_PREFIX)]
    for name in wrapped:
        value = initializers.pop(name)
        value.name = name.removeprefix(_PREFIX)
        initializers[value.name] = value
    return PassResult(model, modified=bool(wrapped))


def _transpose_weights(model: Any) -> Any:
    """Store a weight that is only ever read through a transposition as its transpose, under its own name.

    The optimizer would do the same and lose the name. A tied embedding, which is also read as it is, stays
    one tensor.
    """
    import onnx_ir

    changed = False
    for value in list(model.graph.initializers.values()):
        readers = [node for node, _ in value.uses()]
        turned = [
            n for n in readers if n.op_type == "Transpose" and list(n.attributes["perm"].as_ints()) == [1, 0]
        ]
        if not readers or len(turned) != len(readers) or value.const_value is None:
            continue
        tensor = value.const_value
        value.const_value = (
            onnx_ir.tensor(tensor.raw.t(), name=value.name)
            if hasattr(tensor.raw, "t")
            else onnx_ir.tensor(tensor.numpy().T.copy(), name=value.name)
        )
        value.shape = value.const_value.shape
        value.meta[TRANSPOSED] = not value.meta.get(TRANSPOSED, False)
        for node in turned:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value)
            node.graph.remove(node, safe=True)
        changed = True
    return onnx_ir.passes.PassResult(model, changed)


def _state_sizes(model: Any) -> Any:
    """Write the size that the trace knows where the shape of a ``Reshape`` says -1.

    With an empty cache another axis has length 0, and ONNX Runtime before 1.30 refuses to infer a
    size beside it.
    """
    import onnx_ir

    sizes: dict[int, Any] = {}
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Concat"]:
        readers = [reader for reader, _ in node.outputs[0].uses()]
        shapes = [reader.outputs[0].shape for reader in readers if reader.op_type == "Reshape"]
        if (
            not readers
            or len(shapes) < len(readers)
            or any(s is None or len(s) != len(node.inputs) for s in shapes)
        ):
            continue
        for i, part in enumerate(node.inputs):
            constant = onnx_ir.convenience.get_const_tensor(part)
            known = {shape[i] for shape in shapes}
            size = min(known, key=str)
            if (
                constant is None
                or constant.numpy().tolist() != [-1]
                or len(known) > 1
                or not isinstance(size, int)
            ):
                continue
            if size not in sizes:
                tensor = onnx_ir.tensor([size], onnx_ir.DataType.INT64, name=f"size_{size}")
                sizes[size] = onnx_ir.Value(
                    name=tensor.name,
                    const_value=tensor,
                    shape=tensor.shape,
                    type=onnx_ir.TensorType(tensor.dtype),
                )
                model.graph.register_initializer(sizes[size])
            node.replace_input_with(i, sizes[size])
    return onnx_ir.passes.PassResult(model, modified=bool(sizes))
