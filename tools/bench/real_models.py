"""A real model through every step: time, memory, and what the proof says of each file.

    python tools/bench/real_models.py --base DIR --adapter DIR [--precision fp32,fp16,int8,q8,int4] [--work
    DIR]
        [--rounds 1]

Each command runs as a user runs it, as a process of its own, start included; peak memory is that of the
process tree. ``onnx`` runs without its proof, with it, and once for all of --precision. Then one line for
every file from the report of ``verify``: the largest error and the root mean square beside their bounds,
likeness to the nearest wrong artifact, how many times beyond the gates that one would have been, the loss.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import Usage, machine_line, make_parser, markdown, measure, our_program, positive, size_mib

from ia3_export.onnx.files import size_of


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--precision", default="fp32,fp16,int8,q8,int4")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rounds", type=positive, default=1)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    print(machine_line(work))
    print(f"weights of the base: {size_mib(options.base, '*.safetensors'):.0f} MiB\n")
    commands = commands_of(options.base, options.adapter, options.precision, work)
    runs: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            # verify exits 1 for a quantized file that loses more than it lets it
            usage = measure((our_program(), *command, "--quiet"), whole_tree=True, accepted=(0, 1))
            runs[name].append(usage)
            print(f"{name}: {usage.wall_s:.1f} s", file=sys.stderr, flush=True)
    print(markdown(("command", "s", "CPU s", "peak MiB"), map(cost_row, runs, runs.values())))
    report = json.loads((work / "report.json").read_text())
    print(f"\ninputs: {report['reference']['origin']}")
    print(f"in parity: {report['in_parity']}; the adapter's effect: {report['reference']['effect']:.3g}\n")
    head = ("file", "runs", "max error", "bound", "root mean square", "bound", "likeness", "limit", "told")
    loss = ("KL", "top-1", "perplexity", "MB")
    rows = [step_row(step, work) for step in report["steps"]]
    print(markdown((*head, *loss), rows))


def commands_of(base: Path, adapter: Path, precisions: str, work: Path) -> dict[str, tuple[str, ...]]:
    """What is run, in order, by the names of the rows."""
    source = ("--base", str(base), "--adapter", str(adapter))
    merged, exported, report = str(work / "merged"), str(work / "exported"), str(work / "report.json")
    first = precisions.split(",")[0]
    onnx = ("onnx", *source, "--output", exported, "--overwrite", "--precision")
    shutil.rmtree(exported, ignore_errors=True)
    return {
        "inspect --base": ("inspect", str(adapter), "--base", str(base)),
        "merge": ("merge", *source, "--output", merged, "--overwrite"),
        "verify --weights-only": ("verify", *source, "--merged", merged, "--weights-only"),
        "verify --merged": ("verify", *source, "--merged", merged),
        f"onnx, {first}, --no-verify": (*onnx, first, "--no-verify"),
        f"onnx, {first}": (*onnx, first),
        f"onnx, {precisions}": (*onnx, precisions),
        "verify --merged --onnx": (
            "verify",
            *source,
            "--merged",
            merged,
            "--onnx",
            exported,
            "--report",
            report,
        ),
    }


def cost_row(name: str, runs: list[Usage]) -> tuple[str, ...]:
    wall, cpu = (statistics.median(getattr(run, field) for run in runs) for field in ("wall_s", "cpu_s"))
    return f"`{name}`", f"{wall:.1f}", f"{cpu:.1f}", f"{max(run.peak_rss_mib for run in runs):.0f}"


def step_row(step: Mapping[str, Any], work: Path) -> tuple[str, ...]:
    gates = {gate["name"]: gate for gate in step["gates"]}
    likest = max(
        (gate for name, gate in gates.items() if name.startswith("likeness")),
        key=lambda gate: gate["value"] or 0.0,
        default=None,
    )
    error, mean = gates.get("max error"), gates.get("root mean square error")
    distance, told = step["distance"], step["discrimination"]
    beyond = [told[key] for key in ("base", "half", "nearest") if told and told[key] is not None]
    file = next(iter((work / "exported").rglob(step["file"].rpartition("/")[2])), None)
    return (
        step["name"],
        "in parity" if step["passed"] else step["finding"],
        *limit_cells(error),
        *limit_cells(mean),
        *limit_cells(likest),
        f"{min(beyond):.3g}" if beyond else "",
        *(number(distance and distance[key]) for key in ("kl", "top1", "perplexity_change")),
        "" if file is None else f"{size_of(file) / 1e6:.1f}",
    )


def limit_cells(gate: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("", "") if gate is None else (number(gate["value"]), number(gate["limit"]))


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
