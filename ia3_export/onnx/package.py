"""What lies beside the graphs: names by precision, ``transformers.js_config``, files of further targets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.ranges import link_or_copy
from ia3_export.onnx.exported import SUFFIXES
from ia3_export.onnx.files import external_files

#: transformers.js' names of the precisions. It looks for int8 weights under two: ``int8``, and ``q8``, its
#: default in browsers.
_DTYPES: Mapping[str, str] = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
_QUANTIZED = "_quantized"


def package(folder: Path, precisions: Sequence[str], targets: Sequence[str]) -> None:
    """Complete an exported `folder` (graphs in ``onnx/``, side files beside it): ``config.json`` with
    ``transformers.js_config``, the second name of int8 files, and what `targets` want.

    Raises `Unsupported` for a target that the model cannot be run on.
    """
    graphs = sorted((folder / "onnx").glob("*.onnx"))
    chunks = {graph: len(external_files(graph)) for graph in graphs}
    for graph in graphs:
        if graph.stem.endswith(SUFFIXES["int8"]) and not chunks[graph]:
            link_or_copy(graph, graph.with_name(graph.name.replace(SUFFIXES["int8"], _QUANTIZED)))
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["transformers.js_config"] = _javascript(chunks, precisions)
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if "genai" in targets:
        from ia3_export.onnx.genai import write_genai_config

        write_genai_config(folder)
    if "mobile" in targets:
        from ia3_export.onnx.mobile import write_ort

        for graph in graphs:
            write_ort(graph)


def _javascript(chunks: Mapping[Path, int], precisions: Sequence[str]) -> dict[str, Any]:
    """The settings that transformers.js reads: the best file for a browser by default, and how many chunks of
    external data there are.
    """
    chosen = next(p for p in ("int8", "int4", "fp16", "fp32") if p in precisions)
    dtype = _DTYPES[chosen]
    if dtype == "q8" and not any(
        graph.with_name(f"{graph.stem.removesuffix(SUFFIXES['int8'])}{_QUANTIZED}.onnx").exists()
        for graph in chunks
    ):
        dtype = "int8"  # external data carry the name of one file only
    settings: dict[str, Any] = {"dtype": dtype}
    if any(chunks.values()):
        settings["use_external_data_format"] = {graph.name: count for graph, count in chunks.items() if count}
    return settings
