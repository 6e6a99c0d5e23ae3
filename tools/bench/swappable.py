"""What live vectors cost a run: a swappable graph with an adapter beside the graph that has it folded in.

    python tools/bench/swappable.py --base BASE --adapter ADAPTER --adapter OTHER [--precision fp32,int4]

Both are exported once. Then in one process, in turns: a prompt of 64 tokens, and decoding 32 tokens after it
through the cache, in `--threads` threads; medians, and the median of the ratios within a round. Also the
sizes of the adapter files and the time to take another one.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from harness import cores, make_parser, markdown, median_ratio, our_program, positive, take_turns

from ia3_export.onnx.exported import file_name
from ia3_export.onnx.runtime import OnnxModel, first_step, next_step, open_model

PROMPT, TOKENS = 64, 32


def main() -> None:
    """Measure and print Markdown tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", action="append", required=True)
    parser.add_argument("--precision", default="fp32,int4")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folded, swap = Path(scratch) / "folded", Path(scratch) / "swap"
        export(options.base, options.adapter[:1], folded, options.precision)
        export(options.base, options.adapter, swap, options.precision, "--swappable")
        files = sorted((swap / "adapters").glob("*.onnx_adapter"))
        name = Path(options.adapter[0]).resolve().name
        rows = []
        for precision in options.precision.split(","):
            graphs = [folder / "onnx" / file_name("model", precision) for folder in (folded, swap)]
            used = next(f for f in files if f.stem == name)
            plain = open_model([graphs[0]], threads=options.threads)
            live = open_model([graphs[1]], threads=options.threads, adapters={graphs[1].name: used})
            rows.append((precision, *measured(plain, live, options.rounds)))
        print(f"{cores()} cores, {options.threads} thread(s), {options.rounds} rounds\n")
        head = ("precision", "prompt, folded ms", "live ms", "x", "token, folded ms", "live ms", "x")
        print(markdown(head, rows))
        print("\n" + ", ".join(f"{file.name}: {file.stat().st_size:,} bytes" for file in files))
        print(f"taking another adapter: {1000 * load_time(files[0]):.2f} ms")


def export(base: str, adapters: Sequence[str], output: Path, precision: str, *more: str) -> None:
    """Export without the proof, which `verify` and the tests make."""
    given = [word for adapter in adapters for word in ("--adapter", adapter)]
    command = [our_program(), "onnx", "--base", base, *given, "--output", str(output)]
    subprocess.run([*command, "--precision", precision, "--no-verify", "--quiet", *more], check=True)


def measured(folded: OnnxModel, other: OnnxModel, rounds: int) -> list[str]:
    """Medians in milliseconds of two models in turns, and their ratio: of a prompt, and of a token after
    it."""
    models = {"folded": folded, "other": other}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number, name in take_turns(list(models), rounds + 1):
        seconds = one_run(models[name])
        if number:
            taken[name].append(seconds)
    cells = []
    for part in (0, 1):
        one, two = ([run[part] for run in taken[name]] for name in models)
        cells += [f"{1000 * statistics.median(values):.2f}" for values in (one, two)]
        cells.append(f"{median_ratio(two, one):.3f}")
    return cells


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


def load_time(adapter: Path) -> float:
    """Seconds to load an adapter and to make the options of a run with it."""
    import onnxruntime

    taken = []
    for _ in range(20):
        start = time.perf_counter()
        loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
