"""What the proof adds to ``ia3-export onnx``: seconds and memory with and without it, on a model of your own.

    python tools/bench/onnx_proof.py --base BASE --adapter ADAPTER [--precision fp32,int8,int4]

Every run is a fresh process with its start included; each round runs all of them, one after the other, each
round starting one later. "x weights" is the peak memory beside the float32 weights (the graph's own size).
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from harness import (
    CommandFailed,
    Usage,
    cores,
    make_parser,
    markdown,
    measure,
    our_program,
    positive,
    size_mib,
    take_turns,
)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = make_parser(__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument(
        "--precision", action="append", help="of one export; default fp32, then fp32,int8,int4"
    )
    parser.add_argument("--rounds", type=positive, default=1)
    options = parser.parse_args()
    asked = options.precision or ["fp32", "fp32,int8,int4"]
    runs: dict[str, list[Usage]] = {f"{p}{flag}": [] for p in asked for flag in ("", " --no-verify")}
    with tempfile.TemporaryDirectory() as scratch:
        output, weights = Path(scratch) / "exported", 0.0
        for number, name in take_turns(list(runs), options.rounds):
            shutil.rmtree(output, ignore_errors=True)
            precision, *flags = name.split(" ")
            command = [our_program(), "onnx", "--base", options.base, "--adapter", options.adapter, "--quiet"]
            command += ["--output", str(output), "--precision", precision, *flags]
            try:
                runs[name].append(measure(command))
            except CommandFailed as problem:
                sys.exit(str(problem))
            weights = size_mib(output, "model.onnx*") or weights
            print(f"{number + 1}/{options.rounds} {name}: {runs[name][-1].wall_s:.1f} s", file=sys.stderr)
    rows = []
    for precision in asked:
        proven, plain = runs[precision], runs[f"{precision} --no-verify"]
        seconds = [statistics.median(usage.wall_s for usage in own) for own in (plain, proven)]
        peaks = [statistics.median(usage.peak_rss_mib for usage in own) for own in (plain, proven)]
        more = statistics.median(a.wall_s - b.wall_s for a, b in zip(proven, plain, strict=True))
        rows.append(
            (
                precision,
                *(f"{value:.1f}" for value in seconds),
                f"+{more:.1f}",
                *(f"{value:.0f}" for value in peaks),
                f"{peaks[1] / weights:.1f}",
            )
        )
    print(f"{cores()} cores, {weights:.0f} MiB of float32 weights, {options.rounds} round(s)\n")
    head = ("precisions", "no proof, s", "proof, s", "more, s", "no proof, MiB", "proof, MiB", "x weights")
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
