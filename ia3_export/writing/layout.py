"""Which output file holds which tensor, at which byte. Decided before anything is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ia3_export.checkpoint.gguf import write_prefix
from ia3_export.checkpoint.header import Shard, StoredTensor, count_elements, write_header
from ia3_export.planning.changes import Change, check_gguf
from ia3_export.planning.plan import Plan

INDEX = "model.safetensors.index.json"
#: torchao's description of a tensor that is not quantized.
_PLAIN = '{"_type": "Tensor"}'
#: What transformers looks for where there is no index.
SINGLE = "model.safetensors"
#: Bytes of a shard beyond which a dequantized output gets shards of its own; transformers' default size.
LARGEST = 5_000_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A tensor at byte `position` of an output file: the base's bytes, or a `change`."""

    source: StoredTensor
    position: int
    change: Change | None


@dataclass(frozen=True, slots=True, eq=False)
class OutputFile:
    """One weight file to write. `verbatim` is the base's shard when header and offsets are the same."""

    name: str
    prefix: bytes
    size: int
    pieces: tuple[Piece, ...]
    verbatim: Shard | None

    @property
    def untouched(self) -> bool:
        """Whether the file is the base's, byte for byte."""
        return self.verbatim is not None and not any(piece.change for piece in self.pieces)


def lay_out(plan: Plan, shard_size: int | None = None) -> tuple[OutputFile, ...]:
    """The weight files of the output: the base's shards, or new ones of at most `shard_size` bytes.

    What is dequantized stays where its codes were, other added tensors go into the last shard. ``.bin``
    shards become safetensors of the matching name, a GGUF file stays one. Raises `UsageError` and `Refused`
    for what GGUF cannot hold.
    """
    if plan.base.stored.is_gguf:
        check_gguf(plan.base.quantization, plan.changes, plan.recipe.dtype, shard_size)
        return (_lay_gguf(plan.base.stored.shards[0], _rows(plan)[0]),)
    if shard_size is not None:
        return _reshard(plan, shard_size)
    # four bits become sixteen: what was a shard of 5 GB would be one of 13
    if plan.dequantizes and any(
        sum((change or tensor).nbytes for tensor, change in rows) > LARGEST for rows in _rows(plan)
    ):
        return _reshard(plan, LARGEST)
    shards = zip(plan.base.stored.shards, _rows(plan), strict=True)
    files = tuple(_lay_shard(shard, rows, plan) for shard, rows in shards if rows or not shard.tensors)
    if len(files) == 1 and plan.base.stored.index is not None and not _is_base(files, plan):
        return (replace(files[0], name=SINGLE),)  # without an index no other name is looked for
    return files


def make_index(plan: Plan, files: Iterable[OutputFile]) -> bytes | None:
    """The output's index, None when one file needs none. The base's own bytes where they stay true."""
    files = tuple(files)
    if len(files) == 1 and plan.base.stored.index is None:
        return None
    if plan.base.stored.index_name is not None and _is_base(files, plan):
        return (plan.base.stored.folder / plan.base.stored.index_name).read_bytes()
    if len(files) == 1:
        return None
    weight_map = {_name(piece): file.name for file in files for piece in file.pieces}
    metadata: dict[str, Any] = dict((plan.base.stored.index or {}).get("metadata") or {})
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(count_elements(p.source.shape) for f in files for p in f.pieces)
    metadata["total_size"] = sum(_nbytes(piece) for file in files for piece in file.pieces)
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _is_base(files: Sequence[OutputFile], plan: Plan) -> bool:
    """Whether the files are the base's, with its headers."""
    return len(files) == len(plan.base.stored.shards) and all(file.verbatim is not None for file in files)


def _rows(plan: Plan) -> list[list[tuple[StoredTensor, Change | None]]]:
    """The tensors of the output by the base's shards."""
    rows: list[list[tuple[StoredTensor, Change | None]]] = [
        [
            (t, plan.changes.get(t.name))
            for t in shard.tensors
            if t.name in plan.changes or t.name not in plan.dropped
        ]
        for shard in plan.base.stored.shards
    ]
    stored = {tensor.name for shard in plan.base.stored.shards for tensor in shard.tensors}
    files = {shard.path: i for i, shard in enumerate(plan.base.stored.shards)}
    for name, change in plan.changes.items():
        if name not in stored:
            beside = files.get(change.source.file) if change.source.computed is not None else None
            rows[-1 if beside is None else beside].append((change.source, change))
    return rows


def _metadata(shard: Shard, plan: Plan) -> Mapping[str, str]:
    """A header's metadata.

    torchao describes tensors there: of a file that is no longer quantized only its format stays, and one that
    became dense is described as such.
    """
    if plan.dequantizes:
        return {k: v for k, v in shard.metadata.items() if k == "format"}
    if "tensor_names" not in shard.metadata:
        return shard.metadata
    return {k: _PLAIN if k in plan.changes else v for k, v in shard.metadata.items()}


def _lay_shard(shard: Shard, rows: list[tuple[StoredTensor, Change | None]], plan: Plan) -> OutputFile:
    if shard.prefix and _fits_header(rows) and len(rows) == len(shard.tensors):
        pieces = tuple(
            Piece(change.source if change else tensor, tensor.offset, change) for tensor, change in rows
        )
        size = len(shard.prefix) + sum(tensor.nbytes for tensor in shard.tensors)
        return OutputFile(shard.name, shard.prefix, size, pieces, shard)
    return _lay_new(_safetensors_name(shard.name), _metadata(shard, plan), rows)


def _fits_header(rows: list[tuple[StoredTensor, Change | None]]) -> bool:
    """Whether every tensor keeps the dtype and shape that the base's header gives it."""
    return all(
        change is None or (change.dtype, change.shape) == (tensor.dtype, tensor.shape)
        for tensor, change in rows
    )


def _lay_gguf(shard: Shard, rows: list[tuple[StoredTensor, Change | None]]) -> OutputFile:
    """The base's file with other bytes for some tensors; with a new header where one of them became dense."""
    same = _fits_header(rows)
    prefix, size = shard.prefix, shard.path.stat().st_size
    offsets = {tensor.name: tensor.offset for tensor in shard.tensors}
    if not same:
        kinds = {tensor.name: ((change or tensor).dtype, (change or tensor).shape) for tensor, change in rows}
        prefix, offsets, size = write_prefix(shard.prefix, kinds)
    pieces = tuple(
        Piece(change.source if change else tensor, offsets[tensor.name], change) for tensor, change in rows
    )
    return OutputFile(shard.name, prefix, size, pieces, shard if same else None)


def _lay_new(
    name: str, metadata: Mapping[str, str], rows: list[tuple[StoredTensor, Change | None]]
) -> OutputFile:
    entries = {}
    for tensor, change in rows:
        row = change or tensor
        entries[row.name] = (row.name, row.dtype, row.shape)
    prefix, offsets = write_header(entries.values(), {"format": "pt"} | dict(metadata))
    pieces = [
        Piece(change.source if change else tensor, offsets[(change or tensor).name], change)
        for tensor, change in rows
    ]
    pieces.sort(key=lambda piece: piece.position)
    return OutputFile(name, prefix, len(prefix) + sum(map(_nbytes, pieces)), tuple(pieces), None)


def _reshard(plan: Plan, shard_size: int) -> tuple[OutputFile, ...]:
    groups: list[list[tuple[StoredTensor, Change | None]]] = [[]]
    filled = 0
    for tensor, change in (row for rows in _rows(plan) for row in rows):
        nbytes = (change or tensor).nbytes
        if groups[-1] and filled + nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((tensor, change))
        filled += nbytes
    metadata = _metadata(plan.base.stored.shards[0], plan)
    if len(groups) == 1:
        return (_lay_new(SINGLE, metadata, groups[0]),)
    return tuple(
        _lay_new(f"model-{i:05d}-of-{len(groups):05d}.safetensors", metadata, group)
        for i, group in enumerate(groups, 1)
    )


def _safetensors_name(name: str) -> str:
    """``pytorch_model-00001-of-00002.bin`` → ``model-00001-of-00002.safetensors``."""
    if name.endswith(".safetensors"):
        return name
    return re.sub(r"\.(bin|pt|pth)$", ".safetensors", re.sub(r"(^|/)pytorch_model", r"\1model", name))


def _name(piece: Piece) -> str:
    return piece.change.name if piece.change else piece.source.name


def _nbytes(piece: Piece) -> int:
    return piece.change.nbytes if piece.change else piece.source.nbytes
