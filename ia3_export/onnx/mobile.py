"""``.ort`` files: the format of ONNX Runtime's mobile builds, and the operators that such a build needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ia3_export.errors import Unsupported, last_line
from ia3_export.onnx.files import size_of

#: Offsets in a flatbuffer are signed 32-bit numbers, and an .ort file is one flatbuffer.
_FLATBUFFER = 2**31 - 1
_LEVEL = "ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL"


def write_ort(graph: Path) -> list[Path]:
    """Convert ``<stem>.onnx`` to ``<stem>.ort`` beside it, weights included; returns it and its list of
    operators.

    ``<stem>.required_operators.config`` is what a reduced build of ONNX Runtime takes
    (``--include_ops_by_config``); the ready-made Android and iOS packages run the ``.ort`` without it.

    Converting twice gives the same content, but not the same bytes: ONNX Runtime writes one small table, of
    operators and their types, in the order of a hash map with a random seed.

    Raises `Unsupported` for weights of 2 GB and more, and when ONNX Runtime cannot convert the graph;
    `DamagedFile` for none.

    Tool: https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html
    """
    size = size_of(graph)
    if size > _FLATBUFFER:
        raise Unsupported(
            f"{graph.name} holds {size / 1e9:.1f} GB, and an .ort file at most 2.1 GB",
            hint="add --precision int8 or int4, or leave out --target mobile: ONNX Runtime's mobile "
            "packages read .onnx files too",
        )
    # Fixed: fused once, here, and the application sets nothing. The other style, Runtime, leaves the fusions
    # to the phone, for CoreML and NNAPI to have first choice of the nodes, and the application must ask for
    # their replay. arm: no layouts and integer types of x86. The tool configures logging and prints, so it
    # gets its own process.
    command = [
        sys.executable,
        "-P",
        "-m",
        "onnxruntime.tools.convert_onnx_models_to_ort",
        "--optimization_style",
        "Fixed",
        "--target_platform",
        "arm",
        str(graph),
    ]
    environment = {key: value for key, value in os.environ.items() if key != _LEVEL}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    converted, operators = graph.with_suffix(".ort"), graph.with_suffix(".required_operators.config")
    if done.returncode:
        converted.unlink(missing_ok=True)
        raise Unsupported(
            f"ONNX Runtime cannot convert {graph.name}: {last_line(done.stderr) or '?'}",
            hint="leave out --target mobile: ONNX Runtime's mobile packages read .onnx files too",
        )
    # its comments name this machine's folders
    lines = operators.read_text(encoding="utf-8").splitlines(keepends=True)
    operators.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")
    return [converted, operators]
