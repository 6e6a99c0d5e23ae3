"""Do the forwards alone tell a right artifact from wrong ones? Real base and adapter, damage that users meet.

``python tools/bench/wrong_artifacts.py --base DIR --adapter DIR [--precision fp32,fp16,int8,int4] [--work
DIR] [--only right,half]``

The adapter is folded as it is and in wrong ways: not at all, at half strength, without the layer of the least
effect on its vectors, twice, with its vectors rolled by half their length, on the wrong side where shapes
allow it. Each merge is judged in PyTorch by `verify`, its ONNX files (none by default) in ONNX Runtime, all
against the right adapter. The weights proof, which finds every one of them, is not counted.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from harness import machine_line, make_parser, markdown
from safetensors.numpy import load_file, save_file

from ia3_export import export_onnx, merge, verify
from ia3_export.errors import IA3ExportError
from ia3_export.onnx.options import GraphOptions
from ia3_export.parity.runs.wrong import layer_of
from ia3_export.report.model import Step
from ia3_export.writing.options import OutputOptions

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
Vectors = dict[str, np.ndarray]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--precision", default="")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default="", help="folds whose names begin so; default all")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    precisions = tuple(filter(None, options.precision.split(",")))
    print(machine_line(work))
    rows: list[tuple[str, ...]] = []
    for name, adapter in damaged(options.adapter, work):
        if not name.startswith(tuple(options.only.split(","))):
            continue
        start = time.perf_counter()
        merged = work / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        try:
            fold(options.base, adapter, merged)
        except IA3ExportError as error:
            rows.append((name, f"none: {str(error).splitlines()[0]}", *[""] * 5))
            continue
        rows += [row(name, step) for step in verify(options.base, [options.adapter], merged=merged).steps]
        if precisions:
            exported = work / "exported"
            shutil.rmtree(exported, ignore_errors=True)
            graphs = GraphOptions(precisions=precisions)
            export_onnx(exported, base=options.base, adapters=[adapter], graphs=graphs, check=False)
            rows += [
                row(name, step) for step in verify(options.base, [options.adapter], onnx=[exported]).steps
            ]
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    head = ("folded", "artifact", "forwards", "worst gate", "max error", "bound", "told from a wrong one")
    print(markdown(head, rows, words=4))


def fold(base: Path, adapter: Path, target: Path) -> None:
    merge(base, [adapter], target, options=OutputOptions(digests="none", reload_check="none"))


def row(name: str, step: Step) -> tuple[str, ...]:
    worst = max(step.gates, key=lambda gate: _times(gate.value, gate.limit, gate.relation))
    error = "" if step.distance is None else f"{step.distance.max_error:.3g}"
    bound = "" if step.bound is None else f"{step.bound:.3g}"
    told = "" if step.told_by is None else f"{step.told_by:.3g}"
    value = f"{worst.name} {worst.value:.3g} {worst.relation} {worst.limit:.3g}"
    return (name, step.name, "pass" if step.passed else "FAIL", value, error, bound, told)


def _times(value: float | None, limit: float, relation: str) -> float:
    if value is None or not np.isfinite(value):
        return np.inf
    return value / limit if relation == "<=" else (1 - value) / max(1e-9, 1 - limit)


def damaged(adapter: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """The adapter as it is, and wrong ones, each in a folder of its own."""
    yield "right", adapter
    vectors = load_file(adapter / _WEIGHTS)
    ia3 = {name: values for name, values in vectors.items() if "ia3_l" in name}
    layers = {layer_of(name) for name in ia3}
    weakest = min(
        layers,
        key=lambda layer: sum(float(((v - 1) ** 2).sum()) for n, v in ia3.items() if layer_of(n) == layer),
    )
    changes: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
        "base": lambda _, v: np.ones_like(v),
        "half strength": lambda _, v: 1 + (v - 1) / 2,
        f"without {weakest.removeprefix('base_model.model.')}": lambda n, v: (
            np.ones_like(v) if layer_of(n) == weakest else v
        ),
        "twice": lambda _, v: v * v,
        "rolled": lambda _, v: np.roll(v, v.size // 2).reshape(v.shape),
    }
    for name, change in changes.items():
        changed = vectors | {n: change(n, v).astype(v.dtype) for n, v in ia3.items()}
        yield name, written(adapter, work / "adapter", changed)

    config = json.loads((adapter / _CONFIG).read_text())
    feed_forward = set(config["feedforward_modules"])
    turned = {n: v.reshape(1, -1) if v.shape[-1] == 1 else v for n, v in ia3.items()}
    target = written(adapter, work / "adapter", vectors | turned)
    config["feedforward_modules"] = sorted({*feed_forward, *config["target_modules"]})
    (target / _CONFIG).write_text(json.dumps(config))
    yield "input side", target


def written(adapter: Path, target: Path, vectors: Vectors) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(adapter, target)
    save_file({name: np.ascontiguousarray(v) for name, v in vectors.items()}, target / _WEIGHTS)
    return target


if __name__ == "__main__":
    main()
