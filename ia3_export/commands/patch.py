"""``patch``: the smallest file that makes a merged folder of the deployed base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.header import write_header
from ia3_export.drawing.files import write_whole
from ia3_export.errors import OutputError, Refused, UsageError
from ia3_export.patching.apply import prove
from ia3_export.patching.folders import Seen, check_still, list_folder, look_at
from ia3_export.patching.format import (
    FileChange,
    FileState,
    FoldRule,
    PatchFile,
    Stored,
    read_patch,
    to_metadata,
)
from ia3_export.patching.make import Contents, make_pieces, whole_file
from ia3_export.patching.regions import GraphRegions, graph_regions
from ia3_export.writing.execute import Progress

SCHEMA = "ia3-export/patch-made/1"
#: What a patch carries at most beside vectors, unless the user says otherwise.
_LEAST, _SHARE, _MOST = 1 << 20, 0.01, 64 << 20


@dataclass(frozen=True, slots=True)
class MadePatch:
    """A patch that `patch` wrote, and what is in it as the JSON document of the command."""

    path: Path
    content: Mapping[str, Any]


def patch(
    from_: str | Path,
    to: str | Path,
    output: str | Path,
    *,
    max_carried: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> MadePatch:
    """Write the file `output` that makes the folder `to` of the folder `from_`: vectors, places, digests.

    The vectors are found from the two folders alone, and the patch is proven before it is written: what it
    makes of `from_` has the digests of `to`. The format: docs/patch.md.

    Args:
        from_: the deployed base: safetensors, ONNX or GGUF files of any precision, and what lies beside them.
        to: the same with an adapter merged into it.
        output: file to write.
        max_carried: bytes that may be carried compressed because no vector explains them; by default 1 % of
            `to`, 1 MiB at least and 64 MiB at most.
        overwrite: replace an output that is there.
        on_progress: called with bytes compared and in total.

    Raises `Refused` where the folders do not differ by vectors, naming the file and the tensor, `NotFound`,
    `DamagedFile`, and `OutputError`.
    """
    check_arguments(patch, locals())
    base, merged, target = Path(from_), Path(to), Path(output)
    _check_output(target, (base, merged), overwrite)
    if max_carried is not None and max_carried < 1:
        raise UsageError(f"max_carried={max_carried} leaves no room", hint="give a number of bytes")
    before, after = (look_at(folder, list_folder(folder)) for folder in (base, merged))
    size = sum(seen.state.size for seen in after.values())
    contents = Contents(max_carried or min(max(_LEAST, int(size * _SHARE)), _MOST))
    files = []
    changed = [name for name, seen in after.items() if name not in before or before[name].state != seen.state]
    graphs = graph_regions(base, before) | graph_regions(merged, after)
    done, total = 0, sum(after[name].state.size for name in changed)
    # weight files first: side files share nothing, and what is too large is said of a tensor
    for name in sorted(changed, key=lambda name: (-after[name].state.size, name)):
        old, new = before.get(name) or _same(before, after[name].state), after[name].state
        state = old.state if old is not None else None
        files.append(_change(state, new, (base, merged), contents, graphs))
        done += after[name].state.size
        on_progress(Progress(done, total))
    if not files and before.keys() == after.keys():
        raise Refused(f"{base} and {merged} hold the same files", hint="give a base and what was made of it")
    kept = [seen.state for name, seen in after.items() if name not in changed]
    removed = [seen.state for name, seen in before.items() if name not in after]
    data = _encode(sorted(files, key=lambda change: change.new.path), kept, removed, contents)
    draft = target.with_name(f".{target.name}.draft")
    write_whole(draft, data)
    try:
        made = read_patch(draft)
        prove(made, base)
        check_still(base, before)
        check_still(merged, after)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return MadePatch(target, _describe(replace(made, path=target), contents, size))


def _check_output(target: Path, folders: tuple[Path, Path], overwrite: bool) -> None:
    resolved = target.resolve()
    for folder in folders:
        if resolved.is_relative_to(folder.resolve()):
            raise Refused(f"the output {target} lies inside {folder}", hint="give a place elsewhere")
    if target.is_dir():
        raise OutputError(f"{target} is a folder", hint="give the name of a file, such as task.ia3patch")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} already exists", hint="give another --output, or --overwrite")


def _same(before: Mapping[str, Seen], new: FileState) -> Seen | None:
    """The file that has the bytes of `new` under another name: the base's card, which a merge puts aside."""
    found = (before[name] for name in sorted(before) if before[name].state.sha256 == new.sha256)
    return next(found, None) if new.size else None


def _change(
    old: FileState | None,
    new: FileState,
    folders: tuple[Path, Path],
    contents: Contents,
    graphs: GraphRegions,
) -> FileChange:
    base, merged = folders
    path = merged / new.path
    if old is None:
        return FileChange(None, new, whole_file(path, new.path, contents))
    return FileChange(old, new, make_pieces(base / old.path, path, new.path, contents, graphs))


def _encode(
    files: list[FileChange], kept: list[FileState], removed: list[FileState], contents: Contents
) -> bytes:
    blobs: dict[str, bytes] = {name: vector.tobytes() for name, vector in contents.vectors.items()}
    blobs |= contents.carried
    rows = [(name, "F32", (len(vector),)) for name, vector in contents.vectors.items()]
    rows += [(name, "U8", (len(data),)) for name, data in contents.carried.items()]
    document = to_metadata(f"ia3-export {metadata.version('ia3-export')}", files, kept, removed)
    prefix, offsets = write_header(rows, document)
    return prefix + b"".join(blobs[name] for name in sorted(offsets, key=lambda name: offsets[name]))


def _describe(made: PatchFile, contents: Contents, size: int) -> dict[str, Any]:
    pieces = [piece for change in made.files for piece in change.pieces]
    folds = [piece for piece in pieces if isinstance(piece, FoldRule)]
    return {
        "schema": SCHEMA,
        "patch": made.path.name,
        "bytes": made.path.stat().st_size,
        "folder_bytes": size,
        "files": {
            "changed": [change.new.path for change in made.files if change.old is not None],
            "new": [change.new.path for change in made.files if change.old is None],
            "kept": len(made.kept),
            "removed": [state.path for state in made.removed],
        },
        "vectors": len(contents.vectors),
        "vector_bytes": sum(vector.nbytes for vector in contents.vectors.values()),
        "carried_bytes": sum(map(len, contents.carried.values())),
        "carried": sum(piece.length for piece in pieces if isinstance(piece, Stored)),
        "folds": len(folds),
        "folded_bytes": sum(piece.length for piece in folds),
    }
