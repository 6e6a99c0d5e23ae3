"""A patch of a merged folder made, applied and taken back, beside ``cp`` and ``sync`` of the folder.

    python tools/bench/patch.py --base BASE --adapter ADAPTER [--rounds 3] [--scratch DIR]

The merge is made once. Seconds are medians of whole processes, the peak is the largest resident set.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from pathlib import Path

from harness import Usage, cores, make_parser, markdown, measure, our_program, positive


def main() -> None:
    """Measure and print a Markdown table."""
    parser = make_parser(__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--scratch", help="a folder on the disk that is to be measured")
    options = parser.parse_args()
    ours = our_program()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        merged, file, device, copy = (
            f"{folder}/{name}" for name in ("merged", "task.ia3patch", "device", "copy")
        )
        merge = [ours, "merge", "--base", options.base, "--adapter", options.adapter, "--output", merged]
        subprocess.run([*merge, "--quiet", "--no-reload-check"], check=True)
        taken: dict[str, list[Usage]] = {}

        def run(name: str, *command: str) -> None:
            taken.setdefault(name, []).append(measure(command))

        run("patch", ours, "patch", "--from", options.base, "--to", merged, "--output", file, "--quiet")
        for _ in range(options.rounds):
            run("cp and sync", "sh", "-c", f"cp -r '{options.base}' '{copy}' && sync -f '{copy}'")
            subprocess.run(["mv", copy, device], check=True)
            run("apply --dry-run", ours, "apply", file, device, "--dry-run", "--quiet")
            run("apply --output", ours, "apply", file, device, "--output", copy, "--quiet")
            subprocess.run(["rm", "-rf", copy], check=True)
            run("apply, in place", ours, "apply", file, device, "--quiet")
            subprocess.run(["diff", "-r", merged, device], check=True)
            run("apply --revert", ours, "apply", "--revert", device, "--quiet")
            subprocess.run(["diff", "-r", options.base, device], check=True)
            subprocess.run(["rm", "-rf", device], check=True)
        size = sum(path.stat().st_size for path in Path(options.base).rglob("*") if path.is_file())
        patch = Path(file).stat().st_size
        print(f"{cores()} cores, a folder of {size / 1e9:.2f} GB, a patch of {patch:,} bytes\n")
        cp = statistics.median(run.wall_s for run in taken["cp and sync"])
        rows = [
            (name, f"{(s := statistics.median(r.wall_s for r in runs)):.2f}", f"{s / cp:.2f}",
             f"{max(r.peak_rss_mib for r in runs):.0f}")
            for name, runs in taken.items()
        ]  # fmt: skip
        print(markdown(("", "seconds", "of cp and sync", "peak, MiB"), rows))


if __name__ == "__main__":
    main()
