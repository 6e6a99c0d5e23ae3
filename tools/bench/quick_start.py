"""Seconds of a ``merge`` that needs the model class (a head, a prefix), the first time and again.

    python tools/bench/quick_start.py --base BASE --adapter ADAPTER [--rounds 3]

Every run is a fresh process with its start included; "first" begins with an empty cache of what classes
answer (IA3_EXPORT_CACHE), "again" with the one that the run before it left.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from harness import CommandFailed, Usage, cores, make_parser, markdown, measure, our_program, positive


def main() -> None:
    """Measure and print a Markdown table."""
    parser = make_parser(__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rounds", type=positive, default=3)
    options = parser.parse_args()
    runs: dict[str, list[Usage]] = {"first": [], "again": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            cache = [("IA3_EXPORT_CACHE", str(Path(scratch) / f"cache{number}"))]
            for name, own in runs.items():
                command = [our_program(), "merge", "--base", options.base, "--adapter", options.adapter]
                command += ["--output", str(Path(scratch) / f"{name}{number}"), "--quiet"]
                try:
                    own.append(measure(command, cache))
                except CommandFailed as problem:
                    sys.exit(str(problem))
    rows = [
        (
            name,
            f"{statistics.median(usage.wall_s for usage in own):.2f}",
            f"{min(usage.wall_s for usage in own):.2f}",
            f"{statistics.median(usage.peak_rss_mib for usage in own):.0f}",
        )
        for name, own in runs.items()
    ]
    print(f"{cores()} cores, {options.rounds} rounds\n")
    print(markdown(("merge", "median s", "min s", "peak MiB"), rows))


if __name__ == "__main__":
    main()
