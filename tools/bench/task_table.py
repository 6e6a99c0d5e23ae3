"""What a table of tasks costs a run: a graph with a table beside the graph that has one adapter folded in.

    python tools/bench/task_table.py --base BASE --adapter ADAPTER [--tasks 100] [--precision fp32,int8,int4]

The table holds ADAPTER and copies of it with other numbers. Both graphs are exported once. Then in one
process, in turns, in `--threads` threads: a prompt of 64 tokens, and decoding 32 tokens after it through the
cache; medians, and the median of the ratios within a round. Also the sizes, and a batch of 8 texts with one
task beside the same batch with 8 tasks.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import cores, make_parser, markdown, median_ratio, positive, take_turns
from safetensors.numpy import load_file, save_file
from swappable import PROMPT, export, measured

from ia3_export.onnx.exported import file_name
from ia3_export.onnx.files import size_of
from ia3_export.onnx.runtime import OnnxModel, first_step, open_model

TEXTS = 8


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
        more = others(Path(options.adapter), options.tasks - 1, Path(scratch))
        adapters = [options.adapter, *map(str, more)]
        export(options.base, adapters[:1], folded, options.precision)
        export(options.base, adapters, table, options.precision, "--task-table")
        times, sizes = [], []
        for precision in options.precision.split(","):
            graphs = [folder / "onnx" / file_name("model", precision) for folder in (folded, table)]
            plain = open_model([graphs[0]], threads=options.threads)
            tabled = open_model([graphs[1]], threads=options.threads, task=1)
            cells = measured(plain, tabled, options.rounds)
            times.append((precision, *cells, f"{mixed(tabled, options.rounds):.3f}"))
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
