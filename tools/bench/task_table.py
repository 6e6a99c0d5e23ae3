"""What a table of tasks costs a run: a graph with a table beside the graph that has one adapter folded in.

    python tools/bench/task_table.py --base BASE --adapter ADAPTER [--tasks 100] [--precision fp32,int8,int4]

The table holds ADAPTER and copies of it with other numbers. Both graphs are exported once. Then in one
process, in turns, in `--threads` threads: a prompt of 64 tokens, and decoding 32 tokens after it through the
cache; medians, and the median of the ratios within a round. Also the sizes, and a batch of 8 texts with one
task beside the same batch with 8 tasks.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import cores, make_parser, markdown, median_ratio, our_program, positive, take_turns
from safetensors.numpy import load_file, save_file

from ia3_export.onnx.exported import file_name
from ia3_export.onnx.files import size_of
from ia3_export.onnx.runtime import OnnxModel, first_step, next_step, open_model

PROMPT, TOKENS, TEXTS = 64, 32, 8


def main() -> None:
    """Measure and print Markdown tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--tasks", type=positive, default=100)
    parser.add_argument("--precision", default="fp32,int8,int4")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folded, table = Path(scratch) / "folded", Path(scratch) / "table"
        adapters = [Path(options.adapter), *others(Path(options.adapter), options.tasks - 1, Path(scratch))]
        export(options.base, adapters[:1], folded, options.precision)
        export(options.base, adapters, table, options.precision, "--task-table")
        times, sizes = [], []
        for precision in options.precision.split(","):
            graphs = [folder / "onnx" / file_name("model", precision) for folder in (folded, table)]
            times.append((precision, *measured(graphs, options.rounds, options.threads)))
            one, many = (size_of(graph) for graph in graphs)
            sizes.append((precision, f"{one:,}", f"{many:,}", f"{(many - one) / options.tasks:,.0f}"))
        print(f"{cores()} cores, {options.threads} thread(s), {options.rounds} rounds\n")
        head = ("precision", "prompt, folded ms", "table ms", "x", "token, folded ms", "table ms", "x")
        print(markdown((*head, f"{TEXTS} texts, {TEXTS} tasks beside one x"), times))
        print(
            "\n" + markdown(("precision", "folded, bytes", f"{options.tasks} tasks, bytes", "a task"), sizes)
        )


def others(adapter: Path, count: int, folder: Path) -> list[Path]:
    """Copies of `adapter` with other numbers."""
    stored = load_file(adapter / "adapter_model.safetensors")
    random = np.random.default_rng(0)
    made = []
    for i in range(count):
        made.append(folder / f"task{i + 2}")
        made[-1].mkdir()
        shutil.copy(adapter / "adapter_config.json", made[-1])
        values = {n: 1 + 0.1 * random.standard_normal(v.shape).astype("<f4") for n, v in stored.items()}
        save_file(values, made[-1] / "adapter_model.safetensors")
    return made


def export(base: str, adapters: Sequence[Path], output: Path, precision: str, *more: str) -> None:
    """Export without the proof, which `verify` and the tests make."""
    given = [word for adapter in adapters for word in ("--adapter", str(adapter))]
    command = [our_program(), "onnx", "--base", base, *given, "--output", str(output)]
    subprocess.run([*command, "--precision", precision, "--no-verify", "--quiet", *more], check=True)


def measured(graphs: Sequence[Path], rounds: int, threads: int) -> list[str]:
    """Medians in milliseconds, folded and with the table, and their ratio: of a prompt, and of a token after
    it; and the ratio of a batch of many tasks to one of one task."""
    models = {
        "folded": open_model([graphs[0]], threads=threads),
        "table": open_model([graphs[1]], threads=threads, task=1),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number, name in take_turns(list(models), rounds + 1):
        seconds = one_run(models[name])
        if number:
            taken[name].append(seconds)
    cells = []
    for part in (0, 1):
        one, other = ([run[part] for run in taken[name]] for name in ("folded", "table"))
        cells += [f"{1000 * statistics.median(values):.2f}" for values in (one, other)]
        cells.append(f"{median_ratio(other, one):.3f}")
    return [*cells, f"{mixed(models['table'], rounds):.3f}"]


def one_run(model: OnnxModel) -> tuple[float, float]:
    """Seconds of a prompt, and of a token after it."""
    ids = np.random.default_rng(0).integers(5, 60, (1, PROMPT))
    start = time.perf_counter()
    step = first_step(model, {}, ids)
    prompt = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(TOKENS):
        step = next_step(model, step, step.outputs["logits"].numpy()[:, -1:].argmax(-1))
    return prompt, (time.perf_counter() - start) / TOKENS


def mixed(model: OnnxModel, rounds: int) -> float:
    """How many times as long a batch of `TEXTS` takes with as many tasks as with one task."""
    ids = np.random.default_rng(0).integers(5, 60, (TEXTS, PROMPT))
    tasks = {"one": np.ones(TEXTS, "<i8"), "many": np.arange(TEXTS)}
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for number, name in take_turns(list(tasks), rounds + 1):
        given = OnnxModel({stem: replace(graph, task=tasks[name]) for stem, graph in model.graphs.items()})
        start = time.perf_counter()
        first_step(given, {}, ids)
        if number:
            taken[name].append(time.perf_counter() - start)
    return median_ratio(taken["many"], taken["one"])


if __name__ == "__main__":
    main()
