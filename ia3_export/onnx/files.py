"""Writing ONNX files: external data as in transformers.js, checked, the same bytes for the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ia3_export.errors import DamagedFile, first_line

#: Above this many bytes of weights they go into ``<name>_data``: one protobuf holds at most 2 GB.
EXTERNAL = 1_800_000_000
#: Browsers hold no buffer of more than 2 GB.
CHUNK = 1_900_000_000
#: Smaller tensors stay in the graph: ONNX Runtime's shape inference reads shape constants from there.
INLINE = 1024


def save_model(model: Any, path: Path, *, external_above: int = EXTERNAL, chunk: int = CHUNK) -> None:
    """Write an ``onnx_ir.Model``, a large one with its weights in ``<name>_data``, ``<name>_data_1``, ... of
    at most `chunk` bytes (or one tensor).

    Weights are streamed. The file passes ``onnx.checker``.
    """
    import onnx
    import onnx_ir

    path.parent.mkdir(parents=True, exist_ok=True)
    for graph in model.graphs():
        for value in graph.initializers.values():
            # the tensor has them; tools that transpose it would leave these stale
            if not value.is_graph_input():
                value.type = value.shape = None
    values = model.graph.initializers.values()
    size = sum(v.const_value.nbytes for v in values if v.const_value is not None)
    if size <= external_above:
        path.write_bytes(onnx_ir.to_proto(model).SerializeToString(deterministic=True))
    else:
        before = set(path.parent.iterdir())
        onnx_ir.save(
            model,
            path,
            external_data=f"{path.name}_data",
            size_threshold_bytes=INLINE,
            max_shard_size_bytes=chunk,
        )
        _rename_chunks(path, sorted(set(path.parent.iterdir()) - before - {path}))
    onnx.checker.check_model(str(path))


def external_files(path: Path) -> list[Path]:
    """The external data files that the .onnx file `path` names, in their order (a second chunk comes before a
    tenth).

    Raises `DamagedFile` for a file that is no graph.
    """
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's errors are of its version
        raise DamagedFile(
            f"{path} is not readable ONNX: {first_line(error)}", hint="export the model again"
        ) from error
    tensors = (*graph.initializer, *(t for node in walk_nodes(graph) for t in _held(node)))
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return [path.parent / name for name in sorted(names, key=lambda name: (len(name), name))]


def size_of(path: Path) -> int:
    """Bytes of the .onnx file `path` with its external data. Raises `DamagedFile`."""
    return sum(file.stat().st_size for file in (path, *external_files(path)))


def walk_nodes(graph: Any) -> Iterator[Any]:
    """The nodes of an ``onnx.GraphProto`` and of the bodies in it."""
    for node in graph.node:
        yield node
        yield from walk_bodies(node)


def walk_bodies(node: Any) -> Iterator[Any]:
    """The nodes of the bodies in a node."""
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            yield from walk_nodes(body)


def bodies(graph: Any) -> Iterator[Any]:
    """An ``onnx.GraphProto`` and the bodies in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g,) if attribute.HasField("g") else attribute.graphs:
                yield from bodies(body)


def _held(node: Any) -> Iterator[Any]:
    """The tensors that a node holds, in its attributes and in its bodies."""
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for body in (attribute.g, *attribute.graphs):
            yield from body.initializer


def _rename_chunks(path: Path, chunks: list[Path]) -> None:
    """From ``-00001-of-00003`` to the names that transformers.js looks for."""
    import onnx

    names = {chunk.name: f"{path.name}_data" + (f"_{i}" if i else "") for i, chunk in enumerate(chunks)}
    if all(old == new for old, new in names.items()):
        return
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = names[entry.value]
    path.write_bytes(proto.SerializeToString(deterministic=True))
    for chunk in chunks:
        chunk.rename(path.with_name(names[chunk.name]))
