"""What lies beside the graphs: names by precision, ``transformers.js_config``, and the files of further targets."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ia3_export.errors import UsageError
from ia3_export.onnx.files import external_files


@dataclass(frozen=True, slots=True)
class Precision:
    """How a precision is made (`kind`), the suffix of its files, and transformers.js' name of it."""

    kind: Literal["fp16", "int8", "int4"]
    suffix: str
    dtype: str


#: Besides fp32. transformers.js looks for int8 weights under two names: ``int8``, and ``q8``, its default in browsers.
PRECISIONS: Mapping[str, Precision] = {
    "fp16": Precision("fp16", "_fp16", "fp16"),
    "int8": Precision("int8", "_int8", "q8"),
    "int4": Precision("int4", "_q4", "q4"),
}
TARGETS = ("transformers.js", "optimum", "genai", "mobile")
_QUANTIZED = "_quantized"


def precision_list(names: Sequence[str]) -> list[str]:
    """`names` without repetition, in the order fp32, fp16, int8, int4. Raises `UsageError` for others, or none."""
    known = ["fp32", *PRECISIONS]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(
            f"--precision {unknown[0] if unknown else ''} is not offered",
            hint=f"there are {', '.join(known)}",
        )
    return [name for name in known if name in names]


def file_name(stem: str, precision: str) -> str:
    """``model.onnx``, ``model_fp16.onnx``, ..."""
    suffix = PRECISIONS[precision].suffix if precision in PRECISIONS else ""
    return f"{stem}{suffix}.onnx"


def package(folder: Path, precisions: Sequence[str], targets: Sequence[str]) -> None:
    """Complete an exported `folder` (graphs in ``onnx/``, side files beside it): ``config.json`` with
    ``transformers.js_config``, the second name of int8 files, and what `targets` want.

    Raises `Unsupported` for a target that the model cannot be run on.
    """
    graphs = sorted((folder / "onnx").glob("*.onnx"))
    for graph in graphs:
        if graph.stem.endswith(PRECISIONS["int8"].suffix) and not external_files(graph):
            _link(graph, graph.with_name(graph.name.replace(PRECISIONS["int8"].suffix, _QUANTIZED)))
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["transformers.js_config"] = _javascript(graphs, precisions)
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if "genai" in targets:
        from ia3_export.onnx.genai import write_genai_config

        write_genai_config(folder)
    if "mobile" in targets:
        from ia3_export.onnx.mobile import write_ort

        for graph in graphs:
            write_ort(graph)


def _javascript(graphs: Sequence[Path], precisions: Sequence[str]) -> dict[str, Any]:
    """The settings that transformers.js reads: the best file for a browser by default, and how many chunks of external data there are."""
    chosen = next(p for p in ("int8", "int4", "fp16", "fp32") if p in precisions)
    dtype = PRECISIONS[chosen].dtype if chosen in PRECISIONS else "fp32"
    if dtype == "q8" and not any(
        graph.with_name(f"{graph.stem.removesuffix('_int8')}{_QUANTIZED}.onnx").exists() for graph in graphs
    ):
        dtype = "int8"  # external data carry the name of one file only
    settings: dict[str, Any] = {"dtype": dtype}
    chunks = {graph.name: len(external_files(graph)) for graph in graphs}
    if any(chunks.values()):
        settings["use_external_data_format"] = {name: count for name, count in chunks.items() if count}
    return settings


def _link(source: Path, target: Path) -> None:
    """A second name without a second copy, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
