"""One graph for many adapters: its vectors are live multiplications whose values a run may override.

An initializer that is listed as a graph input too is a default (ONNX IR specification, "Graphs"): a run may
give another value. ONNX Runtime takes such values from ``.onnx_adapter`` files
(``onnxruntime.AdapterFormat``, ``LoraAdapter``, ``RunOptions.add_active_adapter``), or as inputs by name. The
default of a vector is ones, so that a run without an adapter computes the base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.adapters.model import Adapter, Site
from ia3_export.checkpoint.header import read_values
from ia3_export.errors import DamagedFile, NotFound, Refused, Unsupported, first_line, kind_and_line
from ia3_export.fold import Array, Direction
from ia3_export.onnx.contract import GraphSpec
from ia3_export.onnx.exported import TASK

#: Folder of the adapter files in an exported one.
ADAPTERS = "adapters"
#: Tokens of made-up texts, samples of made-up sounds.
_LENGTH, _SAMPLES = 5, 4000
#: What lies between a vector, or a table of them, and its Mul.
_LOOKING_UP = ("Cast", "Gather", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, slots=True)
class Slot:
    """What a run may give a graph, in float32: its shape, and whether that is `transposed` beside the class's
    own tensor."""

    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class LiveVector:
    """A vector of so many elements (`size`) on one side of a module, for all adapters; `name` is its
    initializer's."""

    name: str
    module: str
    direction: Direction
    size: int


def live_vectors(adapters: Sequence[Adapter]) -> tuple[LiveVector, ...]:
    """One for every site that any of `adapters` has, whose names are those of the class.

    Raises `Unsupported` where two adapters have vectors of different lengths for one site.
    """
    found: dict[str, LiveVector] = {}
    for adapter in adapters:
        for site in adapter.sites.values():
            vector = LiveVector(vector_name(site), site.module, site.direction, len(site.vector))
            if found.setdefault(vector.name, vector) != vector:
                raise Unsupported(
                    f"{adapter.name} has {len(site.vector)} elements for {site.module}, another adapter "
                    f"{found[vector.name].size}: they were trained on models of different widths",
                    hint="export each beside its own base",
                )
    return tuple(found.values())


def vector_name(site: Site) -> str:
    """The initializer of a site's vector: PEFT's name for it, with the side, since some formats have two."""
    return f"{site.module}.ia3_l.{site.direction}put"


def is_vector(name: str) -> bool:
    """Whether an initializer of this name is a vector (`vector_name`)."""
    return ".ia3_l." in name


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """What `fill` is to give the initializers of vectors once a graph is traced, and the function that makes
    of the plan of a graph the one that is traced."""

    values: Mapping[str, Array]
    planned: Callable[[GraphSpec], GraphSpec]


def attach_vectors(model: Any, adapters: Sequence[Adapter]) -> Live:
    """Multiply the activations of `model` with parameters of its own, one for each vector of `adapters` (by
    the class's names), which a trace then holds as initializers.

    Their values are random: equal ones would be kept once, and ones be optimized away. So are, until `fill`
    gives them back, those of the biases and norms among the parameters that the adapters bring.
    """
    import torch

    modules, generator = dict(model.named_modules()), torch.Generator().manual_seed(0)
    vectors = live_vectors(adapters)
    for vector in vectors:
        target = multiplied(model, modules, vector.module)
        trailing = (1,) * max(0, target.weight.dim() - 2)  # a convolution's channels come before its axes
        random = 1 + torch.rand((vector.size, *trailing), generator=generator)
        holder = torch.nn.ParameterDict() if not hasattr(target, "ia3_l") else target.ia3_l
        holder[f"{vector.direction}put"] = torch.nn.Parameter(random, requires_grad=False)
        target.ia3_l = holder
        _multiply(target, vector.direction)
    values = {vector.name: np.ones((), "<f4") for vector in vectors}
    brought = adapters[0].extras if adapters else ()
    return Live(values | _hidden(model, brought, generator), lambda spec: spec)


def _hidden(model: Any, names: Collection[str], generator: Any) -> dict[str, Array]:
    """Replace the numbers of the parameters `names` that have one axis by random ones; what they were, by
    every name that the model has for them."""
    import torch

    state, kept = model.state_dict(keep_vars=True), dict[str, Array]()
    for name in names:
        parameter = state.get(name)
        if name not in kept and parameter is not None and parameter.dim() == 1:
            values = parameter.detach().numpy().copy()
            same = [n for n, other in state.items() if other.data_ptr() == parameter.data_ptr()]
            kept |= dict.fromkeys(same, values)
            with torch.no_grad():
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return kept


def multiplied(model: Any, modules: Mapping[str, Any], path: str) -> Any:
    """The module at `path`, whose activations are to be multiplied. Raises `Unsupported` where none is
    there."""
    target = modules.get(path)
    if target is None or getattr(target, "weight", None) is None:
        raise Unsupported(
            f"{type(model).__name__} has no module {path} to multiply",
            hint="its weight is fused at run time (experts of a mixture); fold the adapter instead",
        )
    return target


def _multiply(target: Any, direction: Direction) -> None:
    if direction == "out":
        target.register_forward_hook(lambda module, _inputs, output: output * module.ia3_l["output"])
    else:
        target.register_forward_pre_hook(
            lambda module, inputs: (inputs[0] * module.ia3_l["input"], *inputs[1:])
        )


def fill(path: Path, values: Mapping[str, Array], unread: Collection[str] = ()) -> None:
    """Give initializers of a graph their `values`, by name, in their own shapes, and take away those inputs
    among `unread` that no node reads. Values that lie in external data stay there, but for single numbers."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in values:
            whole = np.ascontiguousarray(np.broadcast_to(values[tensor.name], tuple(tensor.dims)), "<f4")
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place and values[tensor.name].ndim:
                with path.with_name(place["location"]).open("rb+") as data:
                    data.seek(int(place.get("offset", 0)))
                    data.write(whole.tobytes())
            else:
                tensor.CopyFrom(onnx.numpy_helper.from_array(whole, tensor.name))
    read = {name for node in model.graph.node for name in node.input}
    for port in [port for port in model.graph.input if port.name in set(unread) - read]:
        model.graph.input.remove(port)
    path.write_bytes(model.SerializeToString(deterministic=True))


def make_overridable(path: Path, names: Collection[str]) -> dict[str, Slot]:
    """List the initializers `names` of a graph as inputs, which a run may give; those that it has.

    All are float32, and cast where a graph computes in float16: one file serves every precision, and ONNX
    Runtime 1.23 crashes on float16 ones. Raises `Unsupported` for codes of a quantizer.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph, slots = model.graph, dict[str, Slot]()
    for tensor in [tensor for tensor in graph.initializer if tensor.name in names]:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            _cast_to_half(graph, tensor, path.parent)
        elif tensor.data_type != onnx.TensorProto.FLOAT:
            raise Unsupported(f"{path.name} holds {tensor.name} in no type that an adapter can have")
        slots[tensor.name] = Slot(tuple(tensor.dims))
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    path.write_bytes(model.SerializeToString(deterministic=True))
    return slots


def _cast_to_half(graph: Any, tensor: Any, folder: Path) -> None:
    """Hold the float16 initializer `tensor` in float32, and read it through a ``Cast``."""
    import onnx

    values = onnx.numpy_helper.to_array(tensor, str(folder)).astype("<f4")
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    half = tensor.name.replace(".ia3_l.", ".vector.") + ".float16"
    for node in graph.node:
        node.input[:] = [half if name == tensor.name else name for name in node.input]
    cast = onnx.helper.make_node("Cast", [tensor.name], [half], name=half, to=onnx.TensorProto.FLOAT16)
    graph.node.insert(0, cast)


def adapter_values(adapter: Adapter, slots: Mapping[str, Slot]) -> dict[str, Array]:
    """What a run with `adapter`, whose names are those of the class, gives the `slots` of a graph: its
    vectors, and the tensors that it brings. Slots that it has nothing for keep their defaults."""
    values = {vector_name(site): site.vector for site in adapter.sites.values()}
    given = {}
    for name, slot in slots.items():
        if name in values:
            given[name] = np.ascontiguousarray(values[name].reshape(slot.shape), "<f4")
        elif name in adapter.extras:
            brought = read_values(adapter.extras[name])
            given[name] = np.ascontiguousarray(brought.T if slot.transposed else brought, "<f4")
    return given


def distance_to_base(path: Path, names: Collection[str]) -> float:
    """How far a run without an adapter is from the graph without the multiplications with `names`, the base's
    own: the largest difference beside the largest value, zero where all is equal bit for bit. On small inputs
    made up for its ports."""
    import onnxruntime

    bare = path.with_name(f".bare-{path.name}")  # beside it, where its external data are
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        _write_bare(path, bare, names)
        with_ones = onnxruntime.InferenceSession(str(path), options)
        without = onnxruntime.InferenceSession(str(bare), options)
        feeds = made_up(without)
        pairs = list(zip(with_ones.run(None, feeds), without.run(None, feeds), strict=True))
        unlike = [pair for pair in pairs if pair[0].tobytes() != pair[1].tobytes()]
        return max((_apart(one, other) for one, other in unlike), default=0.0)
    finally:
        bare.unlink(missing_ok=True)


def _apart(one: Array, other: Array) -> float:
    scale = float(np.abs(other).max(initial=0.0)) or 1.0
    return float(np.abs(one.astype("<f8") - other).max(initial=0.0)) / scale


def _write_bare(path: Path, target: Path, names: Collection[str]) -> None:
    """Write the graph `path` without the multiplications with `names`."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph, passed, vectors = model.graph, dict[str, str](), set(names)
    for node in list(graph.node):
        node.input[:] = [passed.get(name, name) for name in node.input]
        if node.op_type in _LOOKING_UP and vectors & set(node.input):
            vectors.add(node.output[0])
            graph.node.remove(node)
        elif node.op_type == "Mul" and vectors & set(node.input):
            passed[node.output[0]] = next(name for name in node.input if name not in vectors)
            graph.node.remove(node)
        elif vectors & set(node.input):
            raise Unsupported(
                f"{path.name} reads {min(vectors & set(node.input))} in a {node.op_type}, not a Mul",
                hint="leave out that --precision, or fold the adapters",
            )
    for ports in (graph.input, graph.initializer):
        for port in [port for port in ports if port.name in names]:
            ports.remove(port)
    target.write_bytes(model.SerializeToString(deterministic=True))


def made_up(session: Any, batch: int = 2) -> dict[str, Array]:
    """Something for all inputs of a session: texts of five tokens and no past, numbers for images and sounds;
    rows of zeros for tasks. A decoder that gets no states of its encoder has them in its past."""
    ports = session.get_inputs()
    stateful = any(port.name == "encoder_hidden_states" for port in ports)
    random = np.random.default_rng(0)
    values = {}
    for port in ports:
        known = {"batch_size": batch}
        if port.name.startswith("past") and (stateful or ".encoder." not in port.name):
            known |= dict.fromkeys((axis for axis in port.shape if axis not in known), 0)
        length = _SAMPLES if port.name == "input_values" else _LENGTH
        shape = [axis if isinstance(axis, int) else known.get(axis, length) for axis in port.shape]
        if port.type == "tensor(bool)":
            values[port.name] = np.zeros(shape, bool)
        elif port.type == "tensor(int64)":
            counted = port.name in ("input_ids", "position_ids")
            value = (
                np.resize(np.arange(1, _LENGTH + 1), shape) if counted else np.full(shape, port.name != TASK)
            )
            values[port.name] = value.astype("<i8")
        else:
            kind = "<f2" if port.type == "tensor(float16)" else "<f4"
            values[port.name] = random.standard_normal(shape).astype(kind)
    return values


def write_adapter(path: Path, values: Mapping[str, Array]) -> None:
    """Write the ``.onnx_adapter`` file `path` of ONNX Runtime."""
    import onnxruntime

    path.parent.mkdir(parents=True, exist_ok=True)
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(v) for name, v in values.items()})
    file.export_adapter(str(path))


def read_adapter_file(path: Path) -> dict[str, Array]:
    """The values in an ``.onnx_adapter`` file, by initializer. Raises `DamagedFile`."""
    import onnxruntime

    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path.resolve()))
        # the values lie in the file's memory, which goes with it
        return {name: value.numpy().copy() for name, value in file.get_parameters().items()}
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DamagedFile(
            f"ONNX Runtime cannot read {path}: {first_line(error)}", hint="export the model again"
        ) from error


def files_of(folder: Path, manifest: Mapping[str, Any], digest: str) -> dict[str, Path]:
    """The files in a swappable `folder` of the adapter of this `digest` (`Adapter.digest`), by graph file, as
    its `manifest` names them.

    Raises `NotFound` where it has none of that adapter, `DamagedFile` for a manifest that is none, `Refused`
    for a file outside the folder.
    """
    try:
        rows = {
            name: (row["digest"], dict(row["files"]))
            for name, row in manifest["swappable"]["adapters"].items()
        }
        named = next((files for own, files in rows.values() if own == digest), None)
        files = None if named is None else {graph: folder / file for graph, file in named.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(
            f"the manifest of {folder} does not say where its adapters are: {kind_and_line(error)}",
            hint="export the model again",
        ) from error
    if files is None:
        raise NotFound(
            f"the folder holds no file of this adapter, but of {', '.join(sorted(rows)) or 'none'}",
            hint="export it again with this --adapter; an adapter that was trained further is another one",
        )
    outside = next((f for f in files.values() if not f.resolve().is_relative_to(folder.resolve())), None)
    if outside is not None:
        raise Refused(
            f"the manifest of {folder} names the adapter file {outside}, which lies outside of it",
            hint="do not use this folder; tell whoever published it",
        )
    return files
