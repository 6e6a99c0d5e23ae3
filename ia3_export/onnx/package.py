"""What lies beside the graphs: names by precision, ``transformers.js_config``, files of further targets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.ranges import link_or_copy
from ia3_export.onnx.exported import SUFFIXES, plain_stem
from ia3_export.onnx.files import external_files

#: transformers.js' names of the precisions, the best for a browser first. It looks for 8-bit weights under
#: two: ``q8``, its default in browsers, and ``int8``.
_DTYPES: Mapping[str, str] = {"q8": "q8", "int8": "int8", "int4": "q4", "fp16": "fp16", "fp32": "fp32"}


def package(folder: Path, precisions: Sequence[str], targets: Sequence[str]) -> None:
    """Complete an exported `folder` (graphs in ``onnx/``, side files beside it): ``config.json`` with
    ``transformers.js_config``, the second name of int8 files, and what `targets` want.

    Raises `Unsupported` for a target that the model cannot be run on.
    """
    graphs = sorted((folder / "onnx").glob("*.onnx"))
    chunks = {graph: len(external_files(graph)) for graph in graphs}
    if "q8" not in precisions:
        _name_twice(chunks)
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["transformers.js_config"] = _javascript(chunks, precisions)
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if "genai" in targets:
        from ia3_export.onnx.genai import write_genai_config

        write_genai_config(folder)
    if "mobile" in targets:
        from ia3_export.onnx.mobile import write_ort

        # an .ort file would hold the float32 weights that ONNX Runtime makes of their 8-bit codes
        expanded = (SUFFIXES["q8"], SUFFIXES["keep"])
        for graph in (g for g in graphs if not g.stem.endswith(expanded)):
            write_ort(graph)


def _name_twice(chunks: Mapping[Path, int]) -> None:
    """Link int8 files under q8's name, too: transformers.js asks for that one by itself. External data carry
    the name of one file only."""
    for graph, count in chunks.items():
        if graph.stem.endswith(SUFFIXES["int8"]) and not count:
            link_or_copy(graph, graph.with_name(graph.name.replace(SUFFIXES["int8"], SUFFIXES["q8"])))


def _javascript(chunks: Mapping[Path, int], precisions: Sequence[str]) -> dict[str, Any]:
    """The settings that transformers.js reads: the best file for a browser by default, and how many chunks of
    external data there are.
    """
    dtype = next((name for precision, name in _DTYPES.items() if precision in precisions), None)
    quantized = any(graph.with_name(f"{plain_stem(graph)}{SUFFIXES['q8']}.onnx").exists() for graph in chunks)
    if dtype == "int8" and quantized:
        dtype = "q8"
    # it knows no dtype of the name of kept codes: those are asked for by the name of the file
    settings: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if any(chunks.values()):
        settings["use_external_data_format"] = {graph.name: count for graph, count in chunks.items() if count}
    return settings
