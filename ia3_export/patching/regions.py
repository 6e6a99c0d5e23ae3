"""The tensors in a file as byte ranges, and where in them a vector could multiply numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ia3_export.checkpoint.gguf import MAGIC, read_table
from ia3_export.checkpoint.header import read_header
from ia3_export.fold import DTYPE_BITS, FLOAT_DTYPES
from ia3_export.quantization.gguf import SCALES


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
        """What two regions have in common of which one can become the other."""
        return self.dtype, self.shape, self.stride, self.at, self.nbytes


def list_regions(path: Path) -> tuple[Region, ...]:
    """The tensors of a safetensors or GGUF file in the order of the file; empty for any other.

    Raises `DamagedFile` and `Unsupported`.
    """
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
    count = 1
    for extent in records:
        count *= extent
    return Region(
        name=name,
        dtype="F16" if kind in SCALES else kind,
        shape=records,
        offset=offset,
        nbytes=nbytes,
        stride=nbytes // count,
        at=tuple(sorted(SCALES.get(kind, ()))),
    )


def _starts_with(file: BinaryIO, magic: bytes) -> bool:
    return file.read(len(magic)) == magic
