"""The tensors in a file as byte ranges, and where in them a vector could multiply numbers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ia3_export.checkpoint.gguf import MAGIC, read_table
from ia3_export.checkpoint.header import count_elements, read_header
from ia3_export.fold import DTYPE_BITS, FLOAT_DTYPES
from ia3_export.quantization.gguf import SCALES
from ia3_export.words import ONNX_FLOATS

if TYPE_CHECKING:
    from ia3_export.onnx.spans import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A tensor in a file: C-ordered records of `stride` bytes in the given `shape`.

    The numbers of `dtype` at the byte offsets `at` of every record can take a factor; `at` is empty where
    there are none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stride: int
    at: tuple[int, ...]

    @property
    def kind(self) -> tuple[object, ...]:
        """What two regions have in common of which one can become the other; the dtypes of numbers may
        differ, as where float16 scales become float32."""
        if self.at and self.stride == DTYPE_BITS[self.dtype] // 8:
            return "numbers", self.shape
        return "" if self.at else self.dtype, self.shape, self.stride, self.at, self.nbytes


#: The tensors of ONNX graphs by the file that holds them.
GraphRegions = Mapping[Path, tuple[Region, ...]]


def list_regions(path: Path, graphs: GraphRegions) -> tuple[Region, ...]:
    """The tensors of a safetensors, GGUF or ONNX file, or of the external data of one of `graphs`, in the
    order of the file; empty for any other.

    Raises `DamagedFile` and `Unsupported`.
    """
    if path in graphs:
        return graphs[path]
    if path.suffix == ".safetensors":
        return tuple(
            dense(tensor.name, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)
            for tensor in read_header(path).tensors
            if tensor.nbytes
        )
    with path.open("rb") as file:
        if path.suffix == ".gguf" or _starts_with(file, MAGIC):
            return tuple(
                dense(row.name, row.kind, row.shape, row.offset, row.nbytes)
                if row.block == 1
                else _blocks(row.name, row.kind, row.shape, row.offset, row.nbytes, row.block)
                for row in read_table(path)
            )
    return ()


def graph_regions(folder: Path, names: Iterable[str]) -> dict[Path, tuple[Region, ...]]:
    """The initializers of the ONNX files among `names` in `folder`, by the file that holds their bytes.

    Raises `DamagedFile` and `Refused`.
    """
    spans: dict[Path, list[Span]] = {}
    for name in names:
        if name.endswith(".onnx"):
            from ia3_export.onnx.spans import tensor_spans

            for span in tensor_spans(folder / name):
                spans.setdefault(_plain(span.file), []).append(span)
    return {path: tuple(_without_overlaps(found)) for path, found in spans.items()}


def _plain(path: Path) -> Path:
    """`path` without ``.`` and ``..`` in it, links not followed."""
    return Path(os.path.normpath(path))


def _without_overlaps(spans: Sequence[Span]) -> Iterator[Region]:
    """Graphs share external data, and bodies of a graph names: every byte once, every name once."""
    end, names = 0, Counter[str]()
    for span in sorted(spans, key=lambda span: (span.offset, -span.nbytes)):
        if span.offset < end or not span.nbytes:
            continue
        end = span.offset + span.nbytes
        name = f"{span.name}#{names[span.name]}" if names[span.name] else span.name
        names[span.name] += 1
        dtype = ONNX_FLOATS.get(span.dtype, "U8")
        if count_elements(span.shape) * DTYPE_BITS[dtype] != span.nbytes * 8:
            dtype = "U8"
        yield dense(name, dtype, span.shape, span.offset, span.nbytes)


def dense(name: str, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> Region:
    """A tensor whose elements are numbers of a safetensors dtype, or codes without a scale among them."""
    numbers = dtype in FLOAT_DTYPES
    return Region(
        name=name,
        dtype=dtype,
        shape=shape,
        offset=offset,
        nbytes=nbytes,
        stride=DTYPE_BITS[dtype] // 8 if numbers else 1,
        at=(0,) if numbers else (),
    )


def _blocks(name: str, kind: str, shape: tuple[int, ...], offset: int, nbytes: int, block: int) -> Region:
    """A tensor in ggml's blocks, whose scales are float16 numbers among the codes."""
    records = (*shape[:-1], shape[-1] // block)
    return Region(
        name=name,
        dtype="F16" if kind in SCALES else kind,
        shape=records,
        offset=offset,
        nbytes=nbytes,
        stride=nbytes // count_elements(records),
        at=tuple(sorted(SCALES.get(kind, ()))),
    )


def _starts_with(file: BinaryIO, magic: bytes) -> bool:
    return file.read(len(magic)) == magic
