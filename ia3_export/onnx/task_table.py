"""One graph with a table of tasks: the vectors of all adapters stacked, looked up by an input ``task``.

``Gather(table, task)`` gives every text of a batch the vectors of its own task, and ``Mul`` applies them:
standard operators (ONNX operator specification, "Gather"), for runtimes that cannot swap adapters. Row 0
changes nothing, row ``i`` is the ``i``-th adapter. Heads that adapters bring are looked up the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.header import read_values
from ia3_export.errors import DamagedFile, NotFound, Unsupported, kind_and_line
from ia3_export.fold import Array
from ia3_export.libraries import private
from ia3_export.onnx.contract import GraphSpec, Port
from ia3_export.onnx.exported import TASK
from ia3_export.onnx.swap import Live, LiveVector, live_vectors, multiplied, vector_name

#: What the tables of a module are called after it: ``...k_proj.task_table.output``.
HOLDER = "task_table"
#: Tables of vectors; those of a head are called after its parameters.
_VECTORS = (f".{HOLDER}.input", f".{HOLDER}.output")


class _Batch:
    """The input ``task`` of the graph that is being traced; None at other times, when modules compute the
    base."""

    ids: Any = None


def is_vector_table(name: str) -> bool:
    """Whether a table of this name holds vectors, not parameters of a head."""
    return name.endswith(_VECTORS)


def task_rows(adapters: Sequence[Adapter]) -> dict[str, int]:
    """The row of each adapter, by name."""
    return {adapter.name: row for row, adapter in enumerate(adapters, start=1)}


def describe_rows(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the manifest says of the table: its input, the base's row, and of each adapter the row and the
    digest."""
    rows = task_rows(adapters)
    owned = {a.name: {"row": rows[a.name], "digest": a.digest} for a in adapters}
    return {"input": TASK, "base": 0, "adapters": owned}


def attach_tables(model: Any, adapters: Sequence[Adapter]) -> Live:
    """Let `model` take vectors and heads of `adapters` (by the class's names) from tables, by the input
    ``task`` of a traced graph.

    While tracing the tables have random values: equal initializers would be kept once.

    Raises `Unsupported` for vectors of different lengths, for modules that the model has not, and for a
    tensor of an adapter that no table can hold.
    """
    import torch

    batch, modules = _Batch(), dict(model.named_modules())
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Array] = {}

    def hold(module: str, name: str, table: Array) -> None:
        values[f"{module}.{HOLDER}.{name}"] = table
        target = modules[module]
        if not hasattr(target, HOLDER):
            setattr(target, HOLDER, torch.nn.ParameterDict())
        random = 1 + torch.rand(table.shape, generator=generator)
        getattr(target, HOLDER)[name] = torch.nn.Parameter(random, requires_grad=False)

    for module, names in _heads(adapters, modules).items():
        for name in names:
            hold(module, name, _head_table(modules[module], f"{module}.{name}", adapters))
        modules[module].register_forward_hook(_head_hook(batch, module))
    given = [{vector_name(site): site.vector for site in adapter.sites.values()} for adapter in adapters]
    for vector in live_vectors(adapters):
        target = multiplied(model, modules, vector.module)
        rows = [vectors.get(vector.name) for vectors in given]
        hold(vector.module, f"{vector.direction}put", _vector_table(vector.size, target.weight.dim(), rows))
        _multiply(batch, target, vector)
    return Live(values, lambda spec: _with_task(spec, batch, len(adapters) + 1))


def _vector_table(size: int, dimensions: int, vectors: Sequence[Array | None]) -> Array:
    """Ones, and below them the `vectors` of all adapters (None: ones); in the shape in which they multiply
    activations whose rank is the usual one: (rows, 1, size), a convolution's (rows, size, 1, ...)."""
    ones = np.ones(size, "<f4")
    table = np.stack([ones, *(ones if vector is None else vector for vector in vectors)]).astype("<f4")
    trailing = (1,) * (dimensions - 2)
    return table.reshape(len(table), *((size, *trailing) if trailing else (1, size)))


def _heads(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parameters that `adapters` bring (all the same), by those of `modules` that have them: a graph of
    hidden states has no head."""
    found: dict[str, list[str]] = {}
    for name in sorted(adapters[0].extras):
        module, _, parameter = name.rpartition(".")
        if module in modules:
            found.setdefault(module, []).append(parameter)
    return found


def _head_table(target: Any, name: str, adapters: Sequence[Adapter]) -> Array:
    """The tensor `name` of the model itself, and below it those of `adapters`: the weight of a ``Linear`` as
    (rows, inputs, outputs), a bias as (rows, 1, outputs)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    own = getattr(target, name.rpartition(".")[2], None)
    linear = isinstance(target, torch.nn.Linear | Conv1D)
    if own is None or not (linear or (isinstance(target, torch.nn.LayerNorm) and own.dim() == 1)):
        raise Unsupported(
            f"{adapters[0].name} brings {name}, of a module {type(target).__name__}: no table of tasks can "
            "hold it",
            hint="tables hold parameters of Linear and LayerNorm; use --swappable, or fold the adapters",
        )
    held = [own.detach().numpy(), *(read_values(adapter.extras[name]) for adapter in adapters)]
    if own.dim() == 1:
        return np.stack(held)[:, None].astype("<f4")
    turned = isinstance(target, torch.nn.Linear)
    return np.stack([value.T if turned else value for value in held]).astype("<f4")


def _multiply(batch: _Batch, target: Any, vector: LiveVector) -> None:
    """Multiply inputs or outputs of the module `target` with its rows, while there is a `batch`."""
    convolution = target.weight.dim() > 2

    def scaled(module: Any, values: Any) -> Any:
        rows = _looked_up(batch, module.task_table[f"{vector.direction}put"], values, vector.module)
        return values * (rows if convolution else _beside(rows, values))

    def after(module: Any, _inputs: Any, output: Any) -> Any:
        return None if batch.ids is None else scaled(module, output)

    def before(module: Any, inputs: Any) -> Any:
        return None if batch.ids is None else (scaled(module, inputs[0]), *inputs[1:])

    if vector.direction == "out":
        target.register_forward_hook(after)
    else:
        target.register_forward_pre_hook(before)


def _head_hook(batch: _Batch, path: str) -> Callable[[Any, Any, Any], Any]:
    """A forward hook of the ``Linear`` or ``LayerNorm`` at `path` that computes with rows of its tables; what
    the module itself has computed is dropped, and with it the nodes."""
    import torch

    def replaced(module: Any, inputs: Any, _output: Any) -> Any:
        if batch.ids is None:
            return None
        flat = inputs[0].dim() == 2
        values = inputs[0].unsqueeze(1) if flat else inputs[0]  # one row a text is a matrix of one row
        parts = {name: getattr(module, name) for name in ("weight", "bias")}
        if isinstance(module, torch.nn.Linear):
            parts["weight"] = parts["weight"].t()
        for name, table in module.task_table.items():
            if name in parts:
                parts[name] = _beside(_looked_up(batch, table, values, path), values)
        if isinstance(module, torch.nn.LayerNorm):
            result = torch.nn.functional.layer_norm(values, module.normalized_shape, None, None, module.eps)
            result = result * parts["weight"]
        else:
            result = torch.matmul(values, parts["weight"])
        result = result if parts["bias"] is None else result + parts["bias"]
        return result.squeeze(1) if flat else result

    return replaced


def _looked_up(batch: _Batch, table: Any, values: Any, module: str) -> Any:
    """The rows of `table` for the first axis of `values`: the texts of the batch, or one text after the other
    cut into equally many pieces (tokens, windows of an image).

    Raises `Unsupported` where that axis is anything else.
    """
    import torch

    known = private("torch.fx.experimental.symbolic_shapes:statically_known_true")
    ids, texts, lines = batch.ids, batch.ids.shape[0], values.shape[0]
    if not known(lines == texts):
        # known for all sizes: a length that is a multiple of this batch by chance is none
        if not known(lines % texts == 0):
            raise Unsupported(
                f"{module} gets {tuple(values.shape)}, whose first axis is not the batch, so that no table "
                "can give each text its own task",
                hint="use --swappable, or fold the adapters",
            )
        ids = ids.unsqueeze(1).expand(texts, lines // texts).reshape(lines)
    return torch.index_select(table, 0, ids)


def _beside(rows: Any, values: Any) -> Any:
    """`rows` (batch, 1, size) or (batch, inputs, outputs) in the rank of `values`: without the second axis,
    which is one, or with more of them."""
    if values.dim() == 2:
        return rows.squeeze(1)
    for _ in range(values.dim() - 3):
        rows = rows.unsqueeze(1)
    return rows


def _with_task(spec: GraphSpec, batch: _Batch, rows: int) -> GraphSpec:
    """`spec` with the further input ``task``."""
    import torch

    def function(traced: Any, named: dict[str, Any]) -> tuple[Any, ...]:
        batch.ids = named.pop(TASK)
        sizes = [named[port.name].shape[0] for port in spec.inputs if port.shape[0] == "batch_size"]
        if any(size != batch.ids.shape[0] for size in sizes):  # torch then knows that they are equal
            raise ValueError("as many tasks as texts")
        try:
            return spec.function(traced, named)
        finally:
            batch.ids = None

    ids = torch.arange(spec.samples[0].shape[0]) % rows
    port = Port(TASK, ("batch_size",))
    return replace(spec, function=function, inputs=(*spec.inputs, port), samples=(*spec.samples, ids))


def row_of(folder: Path, manifest: Mapping[str, Any], digest: str) -> int:
    """The row of the adapter of this `digest` (`Adapter.digest`), as the `manifest` of `folder` names it.

    Raises `NotFound` where it has none, `DamagedFile` for a manifest that is none.
    """
    try:
        rows = {name: (row["digest"], int(row["row"])) for name, row in manifest["tasks"]["adapters"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(
            f"the manifest of {folder} does not say which row is whose: {kind_and_line(error)}",
            hint="export the model again",
        ) from error
    row = next((row for own, row in rows.values() if own == digest), None)
    if row is None:
        raise NotFound(
            f"the folder has no row of this adapter, but of {', '.join(sorted(rows)) or 'none'}",
            hint="export it again with this --adapter; an adapter that was trained further is another one",
        )
    return row
