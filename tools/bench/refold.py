"""An adapter folded into an ONNX folder that exists, beside ``cp`` of its files and a fresh export.

    python tools/bench/refold.py --base BASE --adapter ADAPTER [--precision fp32,int8] [--rounds 5]
    [--no-fresh]

The base is exported once. Then in turns: `cp -r` of the ONNX files and `onnx --onnx-base` without the proof;
once each, that with the proof, and a fresh export of base and adapter without it. Seconds are medians of
whole processes, the peak is the largest resident set.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from pathlib import Path

from harness import Usage, cores, make_parser, markdown, measure, our_program, positive, take_turns


def main() -> None:
    """Measure and print a Markdown table."""
    parser = make_parser(__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--folder", help="an exported base that is there already")
    parser.add_argument("--scratch", help="a folder on the disk that is to be measured")
    parser.add_argument("--no-fresh", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        base, out = Path(options.folder or f"{scratch}/base"), Path(scratch) / "out"
        wanted = ["--precision", options.precision, "--no-verify", "--quiet"]
        if not options.folder:
            subprocess.run(
                [our_program(), "onnx", "--model", options.base, "--output", base, *wanted], check=True
            )
        refold = [
            our_program(),
            "onnx",
            "--onnx-base",
            str(base),
            "--adapter",
            options.adapter,
            "--output",
            str(out),
        ]
        jobs = {
            "cp": ["cp", "-r", str(base / "onnx"), str(out)],
            "refold": [*refold, "--no-verify", "--quiet"],
        }
        taken: dict[str, list[Usage]] = {name: [] for name in jobs}
        for number, name in take_turns(list(jobs), options.rounds + 1):
            subprocess.run(["rm", "-rf", out], check=True)
            one = measure(jobs[name])
            if number:
                taken[name].append(one)
        subprocess.run(["rm", "-rf", out], check=True)
        taken["refold, with the proof"] = [measure([*refold, "--quiet"])]
        if not options.no_fresh:
            fresh = [our_program(), "onnx", "--base", options.base, "--adapter", options.adapter]
            taken["fresh export"] = [measure([*fresh, "--output", f"{scratch}/fresh", *wanted])]
        size = sum(file.stat().st_size for file in (base / "onnx").iterdir())
        cp = statistics.median(run.wall_s for run in taken["cp"])
        print(f"{cores()} cores, {size / 1e9:.2f} GB of ONNX, {options.rounds} rounds\n")
        rows = []
        for name, runs in taken.items():
            seconds, peak = (
                statistics.median(n) for n in zip(*((r.wall_s, r.peak_rss_mib) for r in runs), strict=True)
            )
            ratios = (f"{seconds / cp:.2f}", f"{(seconds - 1) / cp:.2f}")
            rows.append((name, f"{seconds:.2f}", *ratios, f"{peak:.0f}"))
        print(markdown(("", "seconds", "of cp", "less one second, of cp", "peak, MiB"), rows))


if __name__ == "__main__":
    main()
