"""How one file becomes another, as pieces of a patch.

Equal tensors are copied, others multiplied by the vector that `ia3_export.patching.solve` finds, and what no
vector explains is carried, compressed: side files, a replaced head. That may not grow beyond a limit, or the
patch would be the model.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from ia3_export.checkpoint.ranges import read_into, reading
from ia3_export.errors import Refused
from ia3_export.fold import Array
from ia3_export.patching.format import Copy, Piece, Stored, joined
from ia3_export.patching.regions import GraphRegions, Region, list_regions
from ia3_export.patching.runs import matching_runs
from ia3_export.patching.solve import Pair, Solution, is_equal, make_rule, solve

_STEP = 1 << 20
#: A tensor of so many slices at most is looked at slice by slice, when no vector fits it whole.
_MOST_SLICES = 1024
#: Compressed tensors up to this size are weighed against a vector of their own.
_WEIGHED = 1 << 20
#: Bytes between tensors that are compared; a graph's structure has a few megabytes.
_COMPARED = 64 << 20
#: About what a fold piece takes in the document.
_PIECE = 160


#: Old and new regions, and what makes the one of the other: None where both are equal.
Parts = list[tuple[tuple[Region, Region], Solution | None]]


@dataclass(slots=True)
class Contents:
    """What the patch will hold: vectors (float32) and compressed bytes by tensor name, up to `limit` bytes of
    the latter."""

    limit: int
    vectors: dict[str, Array] = field(default_factory=dict)
    carried: dict[str, bytes] = field(default_factory=dict)
    largest: tuple[int, str] = (0, "")

    def add_vector(self, vector: Array) -> str:
        """The name of `vector`, which is held once."""
        for name, known in self.vectors.items():
            if known.tobytes() == vector.tobytes():
                return name
        name = f"v{len(self.vectors)}"
        self.vectors[name] = vector
        return name

    def carry(self, data: bytes, length: int, what: str) -> Stored:
        """A piece of `length` bytes with the zlib stream `data`. Raises `Refused` over the limit."""
        self.largest = max(self.largest, (len(data), what))
        if sum(map(len, self.carried.values())) + len(data) > self.limit:
            raise self.too_large()
        for name, known in self.carried.items():
            if known == data:
                return Stored(name, length, compressed=True)
        name = f"r{len(self.carried)}"
        self.carried[name] = data
        return Stored(name, length, compressed=True)

    def too_large(self) -> Refused:
        """The refusal of a patch that would carry too much."""
        size, what = self.largest
        return Refused(
            f"no vector makes {what} of the base's, and all that no vector explains would take more than "
            f"{self.limit:,} bytes ({size:,} or more for it alone)",
            hint="codes that were rounded anew share nothing with the base: keep them "
            "(merge --quantized keep, onnx --onnx-base), or give --max-carried SIZE, or ship that file whole",
        )

    def compress(self, blocks: Iterator[bytes], what: str) -> bytes:
        """`blocks` as a zlib stream. Raises `Refused` as soon as it is over the limit."""
        packer, packed = zlib.compressobj(9), bytearray()
        for block in blocks:
            packed += packer.compress(block)
            if len(packed) > self.limit:
                self.largest = (len(packed), what)
                raise self.too_large()
        return bytes(packed + packer.flush())


def whole_file(path: Path, name: str, contents: Contents) -> tuple[Piece, ...]:
    """The pieces of a file of which there is no older one."""
    size = path.stat().st_size
    if not size:
        return ()
    with path.open("rb") as file:
        data = contents.compress(iter(lambda: file.read(_STEP), b""), name)
    return (contents.carry(data, size, name),)


def make_pieces(
    old: Path, new: Path, name: str, contents: Contents, graphs: GraphRegions
) -> tuple[Piece, ...]:
    """The pieces that make the file `new` of `old`; `name` is for messages, `graphs` are both folders'.

    Raises `Refused` where too much would be carried, `DamagedFile` and `Unsupported`.
    """
    with ExitStack() as stack:
        files = []
        for path in (old, new):
            files.append(os.open(path, os.O_RDONLY))
            stack.callback(os.close, files[-1])
        maker = _Maker(
            name=name,
            contents=contents,
            files=(files[0], files[1]),
            sizes=(old.stat().st_size, new.stat().st_size),
            regions=(list_regions(old, graphs), list_regions(new, graphs)),
        )
        with reading(new, name):
            return tuple(joined(maker.pieces()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """Two open files, old and new, and their tensors."""

    name: str
    contents: Contents
    files: tuple[int, int]
    sizes: tuple[int, int]
    regions: tuple[tuple[Region, ...], tuple[Region, ...]]

    def pieces(self) -> list[Piece]:
        olds = {region.name: region for region in self.regions[0]}
        made: dict[str, list[Piece]] = {}
        # weights before biases: many elements tell a factor more exactly, and the bias can share it
        for region in sorted(self.regions[1], key=lambda region: (-region.nbytes, region.offset)):
            made[region.name] = list(self._tensor(olds.get(region.name), region))
        found: list[Piece] = []
        ends = _gaps(self.regions[0], self.sizes[0])
        position = 0
        for region in self.regions[1]:
            found += self._between(position, region.offset, ends.get(region.name))
            found += made[region.name]
            position = region.offset + region.nbytes
        found += self._between(position, self.sizes[1], ends[None])
        return found

    def _tensor(self, old: Region | None, new: Region) -> Iterator[Piece]:
        if old is None or old.kind != new.kind:
            yield self._carried(new.offset, new.nbytes, new.name)
            return
        pair = Pair(old, new, *self.files)
        if is_equal(pair):
            yield Copy(old.offset, old.nbytes)
            return
        packed = None
        if new.nbytes <= _WEIGHED:
            packed = zlib.compress(self._read(new.offset, new.nbytes), 9)
        known = tuple(self.contents.vectors.values())
        parts = _explain(pair, known)
        if parts is not None and (packed is None or _cost(parts, known) < len(packed)):
            for part, solution in parts:
                if solution is None:
                    yield Copy(part[0].offset, part[0].nbytes)
                else:
                    yield make_rule(*part, solution, self.contents.add_vector(solution.vector))
        elif packed is not None:
            yield self.contents.carry(packed, new.nbytes, f"{new.name} in {self.name}")
        else:
            yield self._carried(new.offset, new.nbytes, new.name)

    def _carried(self, offset: int, length: int, tensor: str) -> Piece:
        what = f"{tensor} in {self.name}" if tensor else self.name
        blocks = (
            self._read(at, min(_STEP, offset + length - at)) for at in range(offset, offset + length, _STEP)
        )
        return self.contents.carry(self.contents.compress(blocks, what), length, what)

    def _between(self, start: int, end: int, old: tuple[int, int] | None) -> Iterator[Piece]:
        """Bytes between tensors: a header, padding, the structure of a graph; `old` are those in the same
        place, from which long runs are copied."""
        length, known = end - start, (old or (0, 0))
        if length > _COMPARED or known[1] - known[0] > _COMPARED:
            yield self._carried(start, length, "")
            return
        before, after = self._read(known[0], known[1] - known[0], 0), self._read(start, length)
        done = 0
        for at, run, where in matching_runs(before, after):
            if at > done:
                yield self._carried(start + done, at - done, "")
            yield Copy(known[0] + where, run)
            done = at + run
        if length > done:
            yield self._carried(start + done, length - done, "")

    def _read(self, offset: int, count: int, which: int = 1) -> bytes:
        block = bytearray(count)
        read_into(self.files[which], memoryview(block), offset)
        return bytes(block)


def _explain(pair: Pair, known: Sequence[Array]) -> Parts | None:
    """The parts of the tensor in order; None if no vectors explain all of it."""
    solution = solve(pair, known)
    if solution is not None:
        return [((pair.old, pair.new), solution)]
    if not _sliceable(pair.new):
        return None
    found: Parts = []
    for old, new in zip(_slices(pair.old), _slices(pair.new), strict=True):
        part = replace(pair, old=old, new=new)
        rows: Parts | None = [((old, new), None)] if is_equal(part) else _explain(part, known)
        if rows is None:
            return None
        found += rows
    return found


def _cost(parts: Parts, known: Sequence[Array]) -> int:
    """About how many bytes `parts` take in the patch."""
    solutions = [solution for _, solution in parts if solution is not None]
    new = [s.vector.nbytes for s in solutions if not any(s.vector is vector for vector in known)]
    return sum(new) + _PIECE * len(parts)


def _gaps(regions: Sequence[Region], size: int) -> Mapping[str | None, tuple[int, int]]:
    """The bytes before each tensor and, under None, after the last: start and end."""
    gaps: dict[str | None, tuple[int, int]] = {}
    position = 0
    for region in regions:
        gaps[region.name] = position, region.offset
        position = region.offset + region.nbytes
    return gaps | {None: (position, size)}


def _sliceable(region: Region) -> bool:
    return len(region.shape) > 2 and 1 < region.shape[0] <= _MOST_SLICES and bool(region.at)


def _slices(region: Region) -> Iterator[Region]:
    """`region` along its first axis: the experts of a fused weight, the groups of a convolution."""
    nbytes = prod(region.shape[1:]) * region.stride
    for index in range(region.shape[0]):
        yield replace(
            region,
            name=f"{region.name}[{index}]",
            shape=region.shape[1:],
            offset=region.offset + index * nbytes,
            nbytes=nbytes,
        )
