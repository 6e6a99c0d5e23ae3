"""Writing a graph with some other initializers: what stays is copied from the file that it lies in.

Where every new tensor is as long as the old one, the files keep their layout, byte for byte. Else the
``.onnx`` file is written anew, its weights streamed, since the order of a message's fields is free
(protobuf.dev, "Encoding").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ia3_export.checkpoint import ranges
from ia3_export.errors import Unsupported
from ia3_export.onnx.files import bodies, walk_nodes
from ia3_export.onnx.places import GraphFile
from ia3_export.onnx.refold import NewTensor
from ia3_export.onnx.spans import LENGTH, Span, initializers, varint

_BUFFER = 1 << 20
#: Bytes that one thread copies at a time.
_PORTION = 64 << 20
#: External data begin at whole pages, so that they can be mapped.
_PAGE = 4096
#: A protobuf message is smaller than this.
_MESSAGE = 2**31
_RAW = 9  # TensorProto.raw_data
_GRAPH, _INITIALIZER = 7, 5  # ModelProto.graph, GraphProto.initializer


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """New bytes for a range of a file."""

    offset: int
    nbytes: int
    blocks: Callable[[], Iterator[Any]]


def write_graph(graph: GraphFile, new: Mapping[str, NewTensor], target: Path, *, changed: bool) -> list[Path]:
    """Write `graph` with the `new` initializers to `target`, its external data beside it; returns the files.

    `changed`: nodes are others than in the file. Raises `Unsupported` where a message would be too large.
    """
    spans, folder = graph.spans, target.parent

    def there(file: Path) -> Path:
        return folder / file.relative_to(graph.path.parent)

    kept = {n: t for n, t in new.items() if n in spans and _as_before(t, spans[n])}
    data = sorted({span.file for span in spans.values() if span.file != graph.path})
    folder.mkdir(parents=True, exist_ok=True)
    by_file: dict[Path, list[Patch]] = {graph.path: [], **{file: [] for file in data}}
    for name, tensor in kept.items():
        by_file[spans[name].file].append(Patch(spans[name].offset, tensor.nbytes, tensor.blocks))
    for file in data:
        copy_patched(file, there(file), by_file[file])
    if not changed and len(kept) == len(new):
        copy_patched(graph.path, target, by_file[graph.path])
        return [target, *map(there, data)]
    _edit(graph, new)
    _prune(graph.model.graph)
    moved = {n: t for n, t in new.items() if n not in kept or spans[n].file == graph.path}
    if data:
        _append(graph, {n: t for n, t in moved.items() if t.nbytes > _PAGE}, folder, there(data[-1]))
    _stream(graph, moved, target)
    return [target, *map(there, data)]


def copy_patched(source: Path, target: Path, patches: Sequence[Patch]) -> None:
    """Copy a file, with other bytes in some ranges of it that do not overlap; in several threads.

    Where it is there already, the external data of another graph as well, it only gets the ranges.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    size, there = source.stat().st_size, target.exists()
    if not there:
        with target.open("wb") as file:
            file.truncate(size)
    jobs: list[Callable[[], None]] = []
    at = 0
    for patch in (*sorted(patches, key=lambda patch: patch.offset), Patch(size, 0, lambda: iter(()))):
        for start in range(at, patch.offset, _PORTION) if not there else ():
            count = min(_PORTION, patch.offset - start)
            jobs.append(partial(_copy, source, target, start, count))
        jobs.append(partial(_write, target, patch))
        at = patch.offset + patch.nbytes
    with ThreadPoolExecutor(ranges.worker_count(len(jobs))) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


def _copy(source: Path, target: Path, offset: int, count: int) -> None:
    buffer = memoryview(bytearray(min(count, _BUFFER)))
    with (
        source.open("rb", buffering=0) as old,
        target.open("rb+", buffering=0) as new,
        ranges.reading(source, source.name),
    ):
        ranges.copy_range(old.fileno(), offset, new.fileno(), offset, count, lambda _: None, buffer)


def _write(target: Path, patch: Patch) -> None:
    at = patch.offset
    with target.open("rb+", buffering=0) as file:
        for block in patch.blocks():
            data = memoryview(block).cast("B")
            ranges.write_all(file.fileno(), data, at)
            at += len(data)


def _as_before(tensor: NewTensor, span: Span) -> bool:
    import onnx

    return tensor.shape == span.shape and onnx.TensorProto.DataType.Name(tensor.data_type) == span.dtype


def _edit(graph: GraphFile, new: Mapping[str, NewTensor]) -> None:
    """Give the initializers of the model their new types and shapes; those that are new come last."""
    there = {tensor.name: tensor for tensor in initializers(graph.model.graph)}
    for name, tensor in new.items():
        held = there.get(name)
        held = graph.model.graph.initializer.add() if held is None else held
        held.name, held.data_type = name, tensor.data_type
        held.dims[:] = tensor.shape
    del graph.model.graph.value_info[:]  # may hold the old types


def _prune(graph: Any) -> None:
    """Take out the nodes and initializers that no output needs."""
    while True:
        read = {name for node in walk_nodes(graph) for name in node.input}
        read.update(port.name for body in bodies(graph) for port in body.output)
        dead = [node for node in graph.node if not read.intersection(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _append(graph: GraphFile, new: Mapping[str, NewTensor], folder: Path, target: Path) -> None:
    """Put tensors at the end of a file of external data, and let the graph in `folder` find them there."""
    there = {tensor.name: tensor for tensor in initializers(graph.model.graph)}
    with target.open("ab") as file:
        for name, tensor in new.items():
            held = there.get(name)
            if held is None or (name in graph.spans and _is_in_place(held, graph.spans[name], tensor)):
                continue
            file.write(bytes(-file.tell() % _PAGE))
            _set_external(held, target.relative_to(folder).as_posix(), file.tell(), tensor.nbytes)
            for block in tensor.blocks():
                file.write(block)


def _is_in_place(held: Any, span: Span, tensor: NewTensor) -> bool:
    """Whether a tensor lies in external data at the place of the old one."""
    return _as_before(tensor, span) and bool(held.external_data)


def _set_external(tensor: Any, location: str, offset: int, length: int) -> None:
    import onnx

    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = onnx.TensorProto.EXTERNAL


def _stream(graph: GraphFile, new: Mapping[str, NewTensor], target: Path) -> None:
    """Write the ``.onnx`` file, with the tensors that lie in it."""
    import onnx

    tensors = [
        _hold(tensor, graph.path.name, graph.spans.get(tensor.name), new.get(tensor.name))
        for tensor in graph.model.graph.initializer
    ]
    for tensor in (t for node in graph.model.graph.node for t in _inside(node)):
        _load(tensor, graph.path)
    rest, body = onnx.ModelProto(), onnx.GraphProto()
    rest.CopyFrom(graph.model)
    rest.ClearField("graph")
    body.CopyFrom(graph.model.graph)
    body.ClearField("initializer")
    head, inner = rest.SerializeToString(deterministic=True), body.SerializeToString(deterministic=True)
    size = len(inner) + sum(
        len(varint(_INITIALIZER << 3 | LENGTH)) + len(varint(t.size)) + t.size for t in tensors
    )
    if size + len(head) >= _MESSAGE:
        raise Unsupported(
            f"{target.name} would be {size:,} bytes, more than an ONNX file holds without external data",
            hint="export the merged model instead",
        )
    with target.open("wb") as file:
        file.write(head + varint(_GRAPH << 3 | LENGTH) + varint(size) + inner)
        for held in tensors:
            file.write(varint(_INITIALIZER << 3 | LENGTH) + varint(held.size))
            for block in held.blocks():
                file.write(block)


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A tensor as it is written: the message but for its bytes, with what introduces these, and so many
    bytes."""

    head: bytes
    nbytes: int = 0
    bytes_of: Callable[[], Iterator[Any]] = lambda: iter(())

    @property
    def size(self) -> int:
        return len(self.head) + self.nbytes

    def blocks(self) -> Iterator[Any]:
        yield self.head
        yield from self.bytes_of()


def _hold(tensor: Any, own: str, span: Span | None, new: NewTensor | None) -> _Held:
    """`tensor` of a graph whose file has the name `own`: with its bytes, old or new, if they lie in it."""
    import onnx

    where = {entry.key: entry.value for entry in tensor.external_data}
    if where.get("location") != own and (new is None or where):
        return _Held(tensor.SerializeToString(deterministic=True))
    nbytes = new.nbytes if new is not None else span.nbytes if span is not None else 0
    bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    head = bare.SerializeToString(deterministic=True) + varint(_RAW << 3 | LENGTH) + varint(nbytes)
    if new is not None:
        return _Held(head, nbytes, new.blocks)
    return _Held(head, nbytes, partial(_read, span)) if span is not None else _Held(head)


def _read(span: Span) -> Iterator[Any]:
    buffer = memoryview(bytearray(min(_BUFFER, max(span.nbytes, 1))))
    with span.file.open("rb", buffering=0) as file, ranges.reading(span.file, span.name):
        for first in range(0, span.nbytes, len(buffer)):
            part = buffer[: min(len(buffer), span.nbytes - first)]
            ranges.read_into(file.fileno(), part, span.offset + first)
            yield part


def _inside(node: Any) -> Iterator[Any]:
    """The tensors in a node's attributes and bodies."""
    for attribute in node.attribute:
        yield from (tensor for tensor in (attribute.t, *attribute.tensors) if tensor.external_data)
        for body in (attribute.g, *attribute.graphs):
            yield from (tensor for tensor in body.initializer if tensor.external_data)
            for inner in body.node:
                yield from _inside(inner)


def _load(tensor: Any, path: Path) -> None:
    """Hold a tensor that lies in the file `path` in memory."""
    import onnx

    if any(entry.key == "location" and entry.value == path.name for entry in tensor.external_data):
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        del tensor.external_data[:]
        tensor.ClearField("data_location")
