"""The patch file: parse, validate, write.

A safetensors file (https://github.com/huggingface/safetensors, "Format") whose metadata holds one JSON
document, as docs/patch.md specifies. A patch comes from elsewhere: nothing in it is believed before it is
checked here, and no path in it can leave the folder that it is applied to.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint.header import StoredTensor, read_bytes, read_header
from ia3_export.errors import DamagedFile, Unsupported
from ia3_export.fold import DTYPE_BITS, FLOAT_DTYPES, Array

SCHEMA = "ia3-export/patch/1"
#: The document in the metadata, and the SHA-256 of its UTF-8 bytes.
KEY, DIGEST = "ia3-export", "ia3-export-sha256"
#: The largest whole number that every JSON reader keeps exactly.
_LARGEST = 2**53 - 1
_LARGEST_STRIDE = 1 << 16
#: Longest vectors that are read, together: no model has more channels.
_LARGEST_VECTORS = 1 << 30
_HEXADECIMAL = frozenset("0123456789abcdef")
_FORBIDDEN = frozenset('<>:"|?*\\')


@dataclass(frozen=True, slots=True)
class FileState:
    """A file by its name in the folder, size and SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Copy:
    """`length` bytes at `offset` of the old file."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRule:
    """Bytes of the old file in which numbers are multiplied by a vector.

    They are records of `stride` bytes; of record ``i`` the numbers of `dtype` at the byte offsets `at` are
    multiplied by element ``i // inner % n`` of `vector`, rounded to `rounded`, and stored as `to`. That may
    be of another width where a record is one number. `length` counts the bytes that are made.
    """

    offset: int
    length: int
    dtype: str
    rounded: str
    to: str
    stride: int
    at: tuple[int, ...]
    vector: str
    inner: int

    @property
    def records(self) -> int:
        """How many records there are."""
        return self.length // self.made_stride

    @property
    def made_stride(self) -> int:
        """Bytes of a record of the new file."""
        wide = DTYPE_BITS[self.dtype] != DTYPE_BITS[self.to]
        return DTYPE_BITS[self.to] // 8 if wide else self.stride


@dataclass(frozen=True, slots=True)
class Stored:
    """`length` bytes that the patch holds in `tensor`: as they are, or as a zlib stream."""

    tensor: str
    length: int
    compressed: bool


Piece = Copy | FoldRule | Stored


@dataclass(frozen=True, slots=True)
class FileChange:
    """How the file `new` comes to be: `pieces` in its order, which refer to the bytes of `old`."""

    old: FileState | None
    new: FileState
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PatchFile:
    """A patch: files that change or come, that stay, that go; `blobs` are its tensors by name."""

    path: Path
    tool: str
    files: tuple[FileChange, ...]
    kept: tuple[FileState, ...]
    removed: tuple[FileState, ...]
    blobs: Mapping[str, StoredTensor]

    @property
    def before(self) -> dict[str, FileState]:
        """The files that the folder must have."""
        olds = [change.old for change in self.files if change.old is not None]
        return {state.path: state for state in (*olds, *self.removed, *self.kept)}

    @property
    def after(self) -> dict[str, FileState]:
        """The files that the folder has then."""
        return {state.path: state for state in (*(change.new for change in self.files), *self.kept)}

    def vectors(self) -> dict[str, Array]:
        """The vectors by name, float32 (n,)."""
        return {
            name: np.frombuffer(read_bytes(tensor), "<f4")
            for name, tensor in self.blobs.items()
            if tensor.dtype == "F32"
        }


def to_metadata(
    tool: str, files: Sequence[FileChange], kept: Sequence[FileState], removed: Sequence[FileState]
) -> dict[str, str]:
    """The metadata of a patch: its JSON document and the digest of that."""
    rows = [
        {
            "path": change.new.path,
            "from": _state(change.old) if change.old is not None else None,
            "to": {"size": change.new.size, "sha256": change.new.sha256},
            "pieces": [_piece(piece) for piece in change.pieces],
        }
        for change in files
    ]
    content = {
        "schema": SCHEMA,
        "tool": tool,
        "files": rows,
        "kept": [_state(state) for state in kept],
        "removed": [_state(state) for state in removed],
    }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return {KEY: text, DIGEST: _digest(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def joined(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """`pieces` with neighbouring copies of neighbouring bytes in one."""
    last: Piece | None = None
    for piece in pieces:
        if isinstance(last, Copy) and isinstance(piece, Copy) and last.offset + last.length == piece.offset:
            last = Copy(last.offset, last.length + piece.length)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def read_patch(path: Path) -> PatchFile:
    """Parse and validate the patch `path`.

    Raises `NotFound`, `DamagedFile` where the file contradicts itself or is cut short, and `Unsupported`
    where it is no patch, or one of another version.
    """
    shard = read_header(path)
    text = shard.metadata.get(KEY)
    try:
        content = json.loads(text) if text is not None else None
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"its document is no JSON ({error})") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(content, dict) or schema != SCHEMA:
        raise Unsupported(
            f"{path} is no patch of this version: its schema is {schema!r}, not {SCHEMA!r}",
            hint="give a file that ia3-export patch wrote, or install the ia3-export that wrote it",
        )
    assert text is not None
    if shard.metadata.get(DIGEST) != _digest(text):
        raise _wrong(path, "its document does not have the SHA-256 that stands beside it")
    blobs = {tensor.name: tensor for tensor in shard.tensors}
    reader = _Reader(path, blobs)
    patch = PatchFile(
        path=path,
        tool=reader.text(content, "tool"),
        files=tuple(reader.change(row) for row in reader.rows(content, "files")),
        kept=tuple(reader.state(row) for row in reader.rows(content, "kept")),
        removed=tuple(reader.state(row) for row in reader.rows(content, "removed")),
        blobs=blobs,
    )
    _check_names(patch)
    return patch


def _state(state: FileState) -> dict[str, Any]:
    return {"path": state.path, "size": state.size, "sha256": state.sha256}


def _piece(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Copy):
        return {"kind": "copy", "offset": piece.offset, "length": piece.length}
    if isinstance(piece, Stored):
        kind = "zlib" if piece.compressed else "raw"
        return {"kind": kind, "tensor": piece.tensor, "length": piece.length}
    return {
        "kind": "fold",
        "offset": piece.offset,
        "length": piece.length,
        "dtype": piece.dtype,
        "round": piece.rounded,
        "to": piece.to,
        "stride": piece.stride,
        "at": list(piece.at),
        "vector": piece.vector,
        "inner": piece.inner,
    }


def _wrong(path: Path, what: str) -> DamagedFile:
    return DamagedFile(f"the patch {path} is damaged: {what}", hint="fetch the patch again")


def unsafe(name: str) -> bool:
    """Whether `name` is no plain relative path that means the same on every system."""
    parts = name.split("/")
    return any(
        part in ("", ".", "..")
        or part.endswith((" ", "."))
        or any(ord(letter) < 32 or letter in _FORBIDDEN or 0xD800 <= ord(letter) < 0xE000 for letter in part)
        or len(part.encode(errors="replace")) > 255
        for part in parts
    )


class _Reader:
    """Takes the document apart; every complaint names the place."""

    def __init__(self, path: Path, blobs: Mapping[str, StoredTensor]) -> None:
        self.path, self.blobs = path, blobs
        total = 0
        for name, tensor in blobs.items():
            vector = tensor.dtype == "F32"
            if len(tensor.shape) != 1 or not (vector or tensor.dtype == "U8"):
                raise _wrong(path, f"tensor {name} is {tensor.dtype} {list(tensor.shape)}")
            total += tensor.nbytes if vector else 0
        if total > _LARGEST_VECTORS:
            raise _wrong(path, f"its vectors have {total:,} bytes")

    def rows(self, row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        value = row.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise _wrong(self.path, f"{key} is no list of objects")
        return value

    def text(self, row: Mapping[str, Any], key: str) -> str:
        value = row.get(key)
        if not isinstance(value, str):
            raise _wrong(self.path, f"{key} is {value!r}, no text")
        return value

    def number(self, row: Mapping[str, Any], key: str, least: int = 0) -> int:
        return self._number(row.get(key), key, least)

    def _number(self, value: Any, key: str, least: int) -> int:
        if type(value) is not int or not least <= value <= _LARGEST:
            raise _wrong(self.path, f"{key} is {value!r}")
        return value

    def state(self, row: Mapping[str, Any], name: str | None = None) -> FileState:
        name = self.text(row, "path") if name is None else name
        if unsafe(name):
            raise DamagedFile(
                f"the patch {self.path} names {name!r}, which is no plain path inside a folder",
                hint="nothing was written; do not use this patch, or ask who made it",
            )
        digest = self.text(row, "sha256")
        if len(digest) != 64 or not _HEXADECIMAL.issuperset(digest):
            raise _wrong(self.path, f"the sha256 of {name} is {digest!r}")
        return FileState(name, self.number(row, "size"), digest)

    def change(self, row: Mapping[str, Any]) -> FileChange:
        source, target = row.get("from"), row.get("to")
        if not (source is None or isinstance(source, dict)) or not isinstance(target, dict):
            raise _wrong(self.path, "an entry of files has no from or to")
        old = None if source is None else self.state(source)
        new = self.state(target, self.text(row, "path"))
        pieces = tuple(self._piece(piece, old, new.path) for piece in self.rows(row, "pieces"))
        if sum(piece.length for piece in pieces) != new.size:
            raise _wrong(self.path, f"the pieces of {new.path} do not add up to its {new.size:,} bytes")
        return FileChange(old, new, pieces)

    def _piece(self, row: Mapping[str, Any], old: FileState | None, name: str) -> Piece:
        kind, length = self.text(row, "kind"), self.number(row, "length", 1)
        if kind in ("zlib", "raw"):
            tensor = self.blobs.get(self.text(row, "tensor"))
            if tensor is None or tensor.dtype != "U8" or (kind == "raw" and tensor.nbytes != length):
                raise _wrong(self.path, f"{name}: {row.get('tensor')!r} holds no {length:,} bytes of it")
            return Stored(tensor.name, length, kind == "zlib")
        if kind not in ("copy", "fold"):
            raise Unsupported(
                f"the patch {self.path} has a piece of the unknown kind {kind!r}",
                hint="install the ia3-export that wrote it",
            )
        offset = self.number(row, "offset")
        piece = Copy(offset, length) if kind == "copy" else self._fold(row, name, offset, length)
        taken = piece.records * piece.stride if isinstance(piece, FoldRule) else length
        if old is None or offset + taken > old.size:
            raise _wrong(self.path, f"{name}: a piece reads past the end of the old file")
        return piece

    def _fold(self, row: Mapping[str, Any], name: str, offset: int, length: int) -> FoldRule:
        dtype, rounded, to = (self.text(row, key) for key in ("dtype", "round", "to"))
        stride, inner = self.number(row, "stride", 1), self.number(row, "inner", 1)
        listed, vector = row.get("at"), self.blobs.get(self.text(row, "vector"))
        at = tuple(self._number(each, "at", 0) for each in (listed if isinstance(listed, list) else [None]))
        if not {dtype, rounded, to}.issubset(FLOAT_DTYPES):
            raise _wrong(self.path, f"{name}: {dtype} to {to}, rounded to {rounded}, is no fold")
        width = DTYPE_BITS[dtype] // 8
        ends = [*at[1:], stride]
        if not at or any(start + width > end for start, end in zip(at, ends, strict=True)):
            raise _wrong(self.path, f"{name}: numbers at {list(at)} do not fit records of {stride} bytes")
        if DTYPE_BITS[dtype] != DTYPE_BITS[to] and stride != width:
            raise _wrong(self.path, f"{name}: {dtype} to {to} among other bytes")
        if vector is None or vector.dtype != "F32" or not vector.size:
            raise _wrong(self.path, f"{name}: {row.get('vector')!r} is no vector")
        rule = FoldRule(
            offset=offset,
            length=length,
            dtype=dtype,
            rounded=rounded,
            to=to,
            stride=stride,
            at=at,
            vector=vector.name,
            inner=inner,
        )
        if length % rule.made_stride or stride > _LARGEST_STRIDE:
            raise _wrong(self.path, f"{name}: {length:,} bytes are no records of {rule.made_stride}")
        return rule


def _check_names(patch: PatchFile) -> None:
    """No file twice, none that is a folder too, also where a system takes large letters for small ones; what
    is there before and after comes from itself."""
    before = patch.before
    for change in patch.files:
        if change.old is not None and before[change.old.path] != change.old:
            raise _wrong(patch.path, f"{change.old.path} has two digests")
        if change.new.path in before and (change.old is None or change.old.path != change.new.path):
            raise _wrong(patch.path, f"{change.new.path} is replaced by another file")
    gone = {state.path for state in patch.removed}
    if before.keys() - patch.after.keys() != gone:
        raise _wrong(patch.path, "what it removes is not what is there before and not after")
    stay = [state.path for state in patch.kept]
    for listed in (
        [*before],
        [*(state.path for state in patch.removed), *stay],
        [*(change.new.path for change in patch.files), *stay],
    ):
        names = [name.casefold() for name in listed]
        folders = {folder for name in names for folder in _folders(name)}
        twice = {name for name, count in Counter(names).items() if count > 1}
        for name in sorted(twice | (folders & set(names))):
            raise _wrong(patch.path, f"{name} occurs twice")


def _folders(name: str) -> Iterator[str]:
    parts = name.split("/")
    return ("/".join(parts[:end]) for end in range(1, len(parts)))
