"""The files of an exported folder: how they are called, and which make one model: a graph, or encoder and
decoder(s)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ia3_export.errors import NotFound

ENCODER, MERGED, FIRST, CACHED = (
    "encoder_model",
    "decoder_model_merged",
    "decoder_model",
    "decoder_with_past_model",
)
#: The input of graphs with tables: the row that each element of a batch takes, int64 (batch,).
TASK = "task"
#: What the files of a precision end in.
SUFFIXES: Mapping[str, str] = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "q8": "_quantized",
    "int4": "_q4",
    "keep": "_keep",
}
_STEMS = sorted(("model", ENCODER, MERGED, FIRST, CACHED), key=len, reverse=True)


def file_name(stem: str, precision: str) -> str:
    """``model.onnx``, ``model_fp16.onnx``, ..."""
    return f"{stem}{SUFFIXES[precision]}.onnx"


def precision_of(path: Path) -> str:
    """What the name of a graph says of its precision; ``fp32`` where it says nothing."""
    return next((name for name, end in SUFFIXES.items() if end and path.stem.endswith(end)), "fp32")


def plain_stem(path: Path) -> str | None:
    """``decoder_model_merged`` of ``decoder_model_merged_int8.onnx``: the name without its precision; None
    for files that are no part of an exported folder.
    """
    return next((s for s in _STEMS if path.stem == s or path.stem.startswith(f"{s}_")), None)


def find_onnx(location: str | Path) -> list[tuple[Path, ...]]:
    """The models in an exported folder, the plain one first, then its other precisions.

    Each is one ``.onnx`` file, or encoder and decoder(s). A single file is itself, with the other half of an
    encoder-decoder beside it.

    Files that are links to each other count once. Raises `NotFound`.
    """
    path = Path(location)
    if path.is_file():
        groups = _groups(path.parent.glob("*.onnx"))
        return [next((g for g in groups if len(g) > 1 and any(f.samefile(path) for f in g)), (path,))]
    for folder in (path / "onnx", path):
        groups = _groups(sorted(folder.glob("*.onnx")))
        if groups:
            return groups
    raise NotFound(
        f"{location} holds no onnx/model.onnx", hint="give the folder that ia3-export onnx wrote, or a file"
    )


def _groups(files: Iterable[Path]) -> list[tuple[Path, ...]]:
    by_suffix: dict[str, dict[str, Path]] = {}
    for file in files:
        stem = plain_stem(file)
        if stem is not None and file.is_file():
            by_suffix.setdefault(file.stem.removeprefix(stem), {})[stem] = file
    groups: list[tuple[Path, ...]] = []
    for _, parts in sorted(by_suffix.items()):
        if "model" in parts:
            found: tuple[Path, ...] = (parts["model"],)
        elif ENCODER in parts and MERGED in parts:
            found = (parts[ENCODER], parts[MERGED])
        elif ENCODER in parts and FIRST in parts:
            found = tuple(parts[stem] for stem in (ENCODER, FIRST, CACHED) if stem in parts)
        elif MERGED in parts:  # optimum wrote decoders without an encoder so, too
            found = (parts[MERGED],)
        else:
            continue
        if not any(found[-1].samefile(other[-1]) for other in groups):
            groups.append(found)
    return groups
