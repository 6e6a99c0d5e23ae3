"""What every format's reader returns, and reading parts of stored tensors as numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ia3_export.checkpoint import ranges
from ia3_export.checkpoint.header import Computed, StoredTensor, tensor_bytes
from ia3_export.errors import DamagedFile, kind_and_line
from ia3_export.fold import FLOAT_DTYPES, Array, Scale, storage_dtype, to_float
from ia3_export.quantization.coded import CodedRows, CodeReader, NotCoded, read_whole

#: ``read(first, count)``: rows ``first:first+count`` of a dense weight, float32 (count, columns).
RowReader = Callable[[int, int], Array]

#: What damaged tensors and configurations of odd types make a reader raise.
READER_ERRORS = (
    EOFError, OSError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, MemoryError,
)  # fmt: skip
#: Largest relative error of one rounding to a 16-bit dtype.
ROUNDING = {"F16": 2.0**-11, "BF16": 2.0**-8}
#: What scales are stored in, where they are neither powers of two nor quantized themselves.
SCALE_DTYPES = ("F32", "F16", "BF16")
_WHOLE = {"I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4", "I16": "<i2", "U16": "<u2", "I8": "i1"}


@dataclass(frozen=True, slots=True, eq=False)
class ScaleTensor:
    """A tensor of the output that absorbs a vector: `inner` consecutive elements share one of its factors.

    `stored` is the file's own tensor, or one computed from it that takes its place (``computed``). One that
    `divides` takes the reciprocals.
    """

    stored: StoredTensor
    inner: int
    divides: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """The `tensors` by which the rows (or columns) of a packed weight are scaled without touching a code.

    `drops` are stored tensors that the output no longer has, `rewrites` small ones with new bytes. Modules of
    one `group` can only be rewritten together (they share an entry of the configuration).
    """

    tensors: tuple[ScaleTensor, ...]
    drops: tuple[str, ...] = ()
    rewrites: tuple[StoredTensor, ...] = ()
    group: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BlockScales:
    """Scales that lie inside the blocks of codes: `fold` makes of the factors of the rows the packed tensor
    as it will be, and `rounding` the relative error of the row that loses most by that."""

    fold: Callable[[Array], StoredTensor]
    rounding: Callable[[Array], float]


@dataclass(frozen=True, slots=True)
class NoScale:
    """Why a format has no scale that takes the vectors on one side of a weight: a clause for a message."""

    reason: str


#: What takes the vectors on one side of a packed weight.
Side = Scales | BlockScales | NoScale

#: Of formats whose scales belong to rows, or to groups within them: the side of the inputs.
BY_ROW = NoScale("every scale belongs to a row")
#: Of weights with a single scale: the side of the outputs.
OF_WHOLE = NoScale("one scale belongs to the whole tensor")
#: Of formats whose blocks run along the rows.
BY_BLOCK = NoScale("columns share the blocks' scales")


class CannotKeep(Exception):
    """A vector has no place in the scales of a quantized weight. The text is a clause that says why; the
    planner catches it and writes the weight dense, or refuses it."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Packed:
    """One quantized weight of a checkpoint.

    `name` and `shape` are those of the dense parameter as its stored file would have them (nn.Linear: (out,
    in)), `parts` every stored tensor that belongs to it by name, `rows` reads it dequantized, `unit` rows at
    a time. `on_output` and `on_input` say what takes a vector there. `conv1d`: the quantizer stored (out,
    in), while `shape` is the dense file's (in, out). `method` is the configuration's word (``quant_method``),
    `format` names it for people; `mislabelled`: the configuration says another version of it. `coded` reads
    the codes themselves, (out, in), where they are evenly spaced, or says why they are not read.
    """

    name: str
    method: str
    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    rows: RowReader
    unit: int
    on_output: Side
    on_input: Side
    conv1d: bool = False
    mislabelled: bool = False
    coded: CodeReader | str = "its codes are not evenly spaced"

    @property
    def module(self) -> str:
        """The module path."""
        return self.name.removesuffix(".weight")

    def dense(self, compute_dtype: str) -> StoredTensor:
        """The dequantized weight as a float32 tensor that is computed while it is read, of `compute_dtype` in
        a model."""
        columns = self.shape[-1]

        def read(first: int, count: int) -> Array:
            return np.ascontiguousarray(self.rows(first // columns, count // columns)).reshape(-1)

        main = next(iter(self.parts.values()))
        return compute(self.name, "F32", self.shape, main, Computed(self.unit * columns, read, compute_dtype))

    def read_codes(self) -> CodedRows:
        """All codes of the weight, (out, in). Raises `NotCoded` with the reason why there are none, and
        `DamagedFile`."""
        if isinstance(self.coded, str):
            raise NotCoded(self.coded)
        out, columns = self.shape[::-1] if self.conv1d else self.shape
        try:
            return read_whole(self.coded, out, columns, out if self.conv1d else self.unit)
        except READER_ERRORS as error:
            raise _damaged(self.name, next(iter(self.parts.values())), error) from error


def _damaged(name: str, beside: StoredTensor, error: Exception) -> DamagedFile:
    return DamagedFile(
        f"{name} in {beside.file.name} cannot be dequantized: {kind_and_line(error)}",
        hint="its scales, zero points or codes are damaged; quantize or fetch the base again",
    )


def compute(
    name: str, dtype: str, shape: tuple[int, ...], beside: StoredTensor, computed: Computed
) -> StoredTensor:
    """A computed tensor that is written into the shard of `beside`. What damaged parts make its reader raise
    becomes a `DamagedFile`."""

    def read(first: int, count: int) -> Array:
        try:
            return computed.read(first, count)
        except READER_ERRORS as error:
            raise _damaged(name, beside, error) from error

    nbytes = tensor_bytes(dtype, shape)
    guarded = Computed(computed.unit, read, computed.compute_dtype)
    return StoredTensor(
        name=name,
        dtype=dtype,
        shape=shape,
        file=beside.file,
        offset=beside.offset,
        nbytes=nbytes,
        data=None,
        computed=guarded,
    )


def parts_of(
    module: str, leaves: Iterable[str], tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Those of ``module.leaf`` that are among `tensors`, by name, in the order of `leaves`."""
    names = (f"{module}.{leaf}" for leaf in leaves)
    return {name: tensors[name] for name in names if name in tensors}


def group_columns(
    scales: StoredTensor, columns: int, groups: int, configured: Collection[object], *, strict: bool
) -> int:
    """Columns that share a scale: of the `configured` sizes one that gives `groups` (the last may be
    smaller), else the even division, which `strict` does not allow where sizes are configured. Raises
    `DamagedFile`."""
    sizes = [size for size in configured if isinstance(size, int) and size > 0]
    fits = [size for size in sizes if -(-columns // size) == groups]
    size = fits[0] if fits else -(-columns // max(groups, 1))
    if size < 1 or -(-columns // size) != groups or (strict and sizes and not fits and groups != 1):
        raise DamagedFile(
            f"{scales.name} in {scales.file.name} has scales for {groups} groups of {columns} columns, which "
            f"{f'groups of {sizes[0]} do' if sizes else 'no group size does'} not give",
            hint="the file is damaged, or its configuration belongs to another; fetch them again",
        )
    return size


def given(tensor: StoredTensor, values: Array, dtype: str) -> StoredTensor:
    """`tensor` with other contents: the bytes of `values`, as `dtype`."""
    data = np.frombuffer(np.ascontiguousarray(values).tobytes(), "u1")
    return StoredTensor(
        name=tensor.name,
        dtype=dtype,
        shape=values.shape,
        file=tensor.file,
        offset=0,
        nbytes=data.nbytes,
        data=data,
    )


def numpy_dtype(dtype: str) -> np.dtype[np.generic]:
    """The numpy dtype of the stored bits; bfloat16 and 8-bit floats are kept as unsigned integers."""
    if dtype in FLOAT_DTYPES:
        return storage_dtype(dtype)
    return np.dtype(_WHOLE.get(dtype, "u1"))


def read_flat(tensor: StoredTensor, first: int, count: int) -> Array:
    """Elements ``first:first+count`` of a tensor in C order, as stored. Raises `EOFError` when the file is
    too short."""
    dtype = numpy_dtype(tensor.dtype)
    if tensor.computed is not None:
        return tensor.computed.read(first, count)
    if tensor.data is not None:
        return tensor.data[first * dtype.itemsize : (first + count) * dtype.itemsize].view(dtype)
    buffer = np.empty(count, dtype)
    with _opened(tensor) as descriptor:
        ranges.read_into(descriptor, buffer.view("u1").data, tensor.offset + first * dtype.itemsize)
    return buffer


@contextmanager
def _opened(tensor: StoredTensor) -> Iterator[int]:
    descriptor = os.open(tensor.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_rows(tensor: StoredTensor, first: int, count: int) -> Array:
    """Rows ``first:first+count`` of a two-dimensional tensor, as stored."""
    columns = tensor.shape[1]
    return read_flat(tensor, first * columns, count * columns).reshape(count, columns)


def read_columns(tensor: StoredTensor, first: int, count: int) -> Array:
    """Columns ``first:first+count`` of a two-dimensional tensor, as stored, reading no others."""
    rows, columns = tensor.shape
    if tensor.data is not None or tensor.computed is not None or count == columns:
        return read_rows(tensor, 0, rows)[:, first : first + count]
    dtype = numpy_dtype(tensor.dtype)
    found = np.empty((rows, count), dtype)
    raw = found.view("u1").reshape(rows, -1)
    with _opened(tensor) as descriptor:
        for row in range(rows):
            begin = tensor.offset + (row * columns + first) * dtype.itemsize
            ranges.read_into(descriptor, raw[row].data, begin)
    return found


def as_float(raw: Array, dtype: str) -> Array:
    """Stored bits of a floating dtype as float32, exactly, in the same shape."""
    return to_float(np.ascontiguousarray(raw).reshape(-1), dtype).astype("<f4", copy=False).reshape(raw.shape)


def expect(tensor: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> None:
    """Raise `DamagedFile` unless `tensor` has one of `dtypes` and `shape` (None: any extent)."""
    fits = len(tensor.shape) == len(shape) and all(
        wanted in (None, extent) for wanted, extent in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted = ["any" if extent is None else extent for extent in shape]
        raise DamagedFile(
            f"{tensor.name} in {tensor.file.name} is {tensor.dtype} {list(tensor.shape)}, its format wants "
            f"{' or '.join(dtypes)} {wanted}",
            hint="the file is damaged, or of a variant that this version does not read",
        )


def split_vectors(
    shape: tuple[int, ...], scales: Iterable[Scale], *, conv1d: bool
) -> tuple[Array | None, Array | None]:
    """The product of output vectors and that of input vectors among `scales` of a dense weight (or bias) of
    `shape`, float64; None where there is none. Raises `CannotKeep` for a scale that is neither."""
    if len(shape) > 2:
        raise CannotKeep("it is no single projection")
    products: list[Array | None] = [None, None]
    for scale in scales:
        axis = scale.axis(shape)
        if axis is None:
            raise CannotKeep("transformers builds its parameter from several stored tensors")
        factors, before = scale.factors.astype("<f8"), products[axis]
        products[axis] = factors if before is None else before * factors
    first, second = products
    return (second, first) if conv1d and len(shape) == 2 else (first, second)
