"""Time and memory of a merge beside `cp -r`, PEFT and mergekit, interleaved on the same model.

    python tools/bench/merge_vs_peers.py --folder /tmp/bench --cold --mergekit-venv /tmp/mk --json merge.json

Run it with the python of the environment that holds ia3-export, on Linux. The slow peers run in --slow-rounds
of the rounds. How rounds, caches and processes are measured is told in harness.py.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from fixtures import make_in_child, make_llama
from harness import (
    SHARD_SIZE,
    CommandFailed,
    Comparison,
    Place,
    Row,
    Run,
    Variant,
    chosen,
    clear,
    compare,
    copy_variant,
    first_line,
    machine_line,
    make_parser,
    measure,
    our_program,
    our_variant,
    positive,
    print_left_out,
    run_rounds,
    size_mib,
    summarize,
    why_no_cold,
)

START_UP_RUNS = 10
NAMES = ("cp", "cp-sha256sum", "ours-no-digests", "ours", "ours-flush", "ours-plain-io", "peft", "mergekit")

PEFT_IMPORTS = "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM"
PEFT_MERGE = f"""{PEFT_IMPORTS}
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(output, max_shard_size="{SHARD_SIZE}")
"""
MERGEKIT_RECIPE = """merge_method: passthrough
dtype: bfloat16
models:
  - model: "{base}+{adapter}"
"""


@dataclass(frozen=True)
class Report:
    machine: str
    base_mib: float
    rss_floor_mib: float
    start_up_ms: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


# --- the variants ---


def copy_and_hash_variant(place: Place) -> Variant:
    """``cp -r`` and the digests of what was copied: what `merge` does by default, without the merge."""
    command = ("sh", "-c", 'cp -r "$0" "$1" && sha256sum "$1"/*', str(place.base), str(place.output))
    return Variant(name="cp-sha256sum", command=command, warm_up=("sha256sum", "--version"))


def peft_variant(place: Place) -> Variant:
    command = (sys.executable, "-c", PEFT_MERGE, str(place.base), str(place.adapter), str(place.output))
    return Variant(name="peft", command=command, warm_up=(sys.executable, "-c", PEFT_IMPORTS), slow=True)


def mergekit_variant(place: Place, venv: Path, recipe: Path) -> Variant:
    """mergekit lets PEFT write the merged model to a cache and merges on from there; the cache is emptied
    before every run, or the next one would skip that step."""
    recipe.write_text(MERGEKIT_RECIPE.format(base=place.base, adapter=place.adapter))
    program = str(venv / "bin" / "mergekit-yaml")
    command = (
        program,
        str(recipe),
        str(place.output),
        "--quiet",
        "--no-copy-tokenizer",
        "--no-write-model-card",
        "--out-shard-size",
        SHARD_SIZE.removesuffix("B"),
        "--lora-merge-cache",
        str(place.run / "mergekit-cache"),
    )
    return Variant(name="mergekit", command=command, warm_up=(program, "--help"), slow=True, optional=True)


def mergekit_version_command(venv: Path) -> tuple[str, ...]:
    code = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('mergekit', 'peft')))"
    return (str(venv / "bin" / "python"), "-c", code)


def make_variants(place: Place, mergekit_venv: Path | None, recipe: Path) -> list[Variant]:
    variants = [
        copy_variant(place),
        copy_and_hash_variant(place),
        our_variant("ours-no-digests", place, ("--digests", "none")),
        our_variant("ours", place, ()),
        our_variant("ours-flush", place, ("--flush", "--digests", "none")),
        our_variant("ours-plain-io", place, ("--digests", "none"), plain_io=True),
        peft_variant(place),
    ]
    if mergekit_venv is not None:
        variants.append(mergekit_variant(place, mergekit_venv, recipe))
    return variants


def start_up_figures(place: Place) -> dict[str, float]:
    """Median milliseconds of the commands that should feel instant; a first run of each is thrown away."""
    program = our_program()
    commands = {
        "python -c pass": (sys.executable, "-c", "pass"),
        "ia3-export --help": (program, "--help"),
        "ia3-export inspect ADAPTER --base BASE": (
            program,
            "inspect",
            str(place.adapter),
            "--base",
            str(place.base),
        ),
    }
    for command in commands.values():
        measure(command)
    walls: dict[str, list[float]] = {label: [] for label in commands}
    for _ in range(START_UP_RUNS):
        for label, command in commands.items():
            walls[label].append(measure(command).wall_s * 1000)
    return {label: statistics.median(values) for label, values in walls.items()}


# --- the same result? ---


def compare_all(variants: Sequence[Variant], place: Place, keep: Path) -> list[Comparison]:
    """Make every merged output once more and compare it with PEFT's."""
    clear(place.run)
    measure(peft_variant(place).command)
    place.output.rename(keep)
    comparisons = []
    for variant in variants:
        if variant.name not in ("cp", "cp-sha256sum", "peft"):
            clear(place.run)
            measure(variant.command, variant.environment)
            comparisons.append(compare(variant.name, place.output, keep, place.base))
    return comparisons


# --- what is printed ---


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'':<16}{'':>5}{'median':>9}{'min':>9}{'median':>9}{'':>9}{'peak RSS':>10}{'disk read':>11}",
        f"{'':<16}{'runs':>5}{'wall s':>9}{'wall s':>9}{'x cp':>9}{'CPU s':>9}{'MiB':>10}{'MiB':>11}",
    ]
    for row in rows:
        ratio = "-" if row.ratio_to_cp is None else f"{row.ratio_to_cp:.2f}"
        lines.append(
            f"{row.variant:<16}{row.runs:>5}{row.wall_median_s:>9.2f}{row.wall_min_s:>9.2f}{ratio:>9}"
            f"{row.cpu_median_s:>9.2f}{row.peak_rss_mib:>10.0f}{row.disk_read_median_mib:>11.0f}"
        )
    walls = {row.variant: row.wall_median_s for row in rows}
    if {"ours", "cp-sha256sum"} <= walls.keys():
        lines.append(f"ours beside cp-sha256sum, of medians: {walls['ours'] / walls['cp-sha256sum']:.2f}")
    return "\n".join(lines)


def print_comparison(comparison: Comparison) -> None:
    unlike = comparison.unlike
    verdict = "bit-identical to PEFT's" if not unlike else f"{len(unlike)} unlike PEFT's, such as {unlike[0]}"
    print(
        f"{comparison.variant}: {comparison.tensors} tensors, "
        f"{comparison.changed_by_merge} changed by the merge, {verdict}"
    )


# --- command line ---


@dataclass(frozen=True)
class Options:
    folder: Path | None
    rounds: int
    slow_rounds: int
    cold: bool
    only: tuple[str, ...]
    mergekit_venv: Path | None
    json: Path | None


def read_options() -> Options:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, help="keeps the model from run to run; default a temporary folder, removed"
    )
    parser.add_argument("--rounds", type=positive, default=7, help="default 7")
    parser.add_argument(
        "--slow-rounds", type=positive, default=3, help="of them with PEFT and mergekit; default 3"
    )
    parser.add_argument(
        "--cold", action="store_true", help="a second table with the page cache dropped; needs root"
    )
    parser.add_argument(
        "--only",
        type=partial(chosen, names=NAMES),
        default=NAMES,
        metavar="NAME,...",
        help=f"of {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--mergekit-venv", type=Path, metavar="PATH", help="an environment that holds mergekit"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run and every figure")
    given = parser.parse_args()
    return Options(
        folder=given.folder,
        rounds=given.rounds,
        slow_rounds=min(given.slow_rounds, given.rounds),
        cold=given.cold,
        only=given.only,
        mergekit_venv=given.mergekit_venv,
        json=given.json,
    )


def usable_mergekit(options: Options, left_out: dict[str, str]) -> Path | None:
    """The environment with mergekit if it is wanted and starts; else the reason is noted."""
    if "mergekit" not in options.only:
        return None
    if options.mergekit_venv is None:
        left_out["mergekit"] = "no --mergekit-venv given"
        return None
    venv = options.mergekit_venv.absolute()
    try:
        measure(mergekit_version_command(venv))
        measure((str(venv / "bin" / "mergekit-yaml"), "--help"))
    except CommandFailed as problem:
        left_out["mergekit"] = str(problem)
        return None
    return venv


def benchmark(options: Options, folder: Path, scratch: Path) -> Report:
    make_in_child(folder)
    base, adapter = make_llama(folder)  # which finds it made
    place = Place(base, adapter, scratch / "run")
    left_out: dict[str, str] = {}
    venv = usable_mergekit(options, left_out)
    variants = make_variants(place, venv, scratch / "mergekit.yml")
    variants = [variant for variant in variants if variant.name in options.only]

    report = Report(
        machine=machine_line(folder, *([] if venv is None else [first_line(mergekit_version_command(venv))])),
        base_mib=size_mib(base),
        rss_floor_mib=measure(("true",)).peak_rss_mib,
        start_up_ms=start_up_figures(place),
        left_out=left_out,
    )
    print(report.machine)
    print(f"base {report.base_mib:.0f} MiB, peak RSS floor {report.rss_floor_mib:.0f} MiB")
    print(f"\nstart-up, median of {START_UP_RUNS}, warm")
    for label, milliseconds in report.start_up_ms.items():
        print(f"{milliseconds:8.0f} ms  {label}")

    caches = ["warm"]
    if options.cold:
        reason = why_no_cold()
        if reason is None:
            caches.append("cold")
        else:
            left_out["cold cache"] = reason
    for cache in caches:
        runs = run_rounds(
            variants,
            place,
            cache=cache,
            rounds=options.rounds,
            slow_rounds=options.slow_rounds,
            left_out=left_out,
        )
        report.runs.extend(runs)
        report.rows.extend(summarize(runs, NAMES))
        print(f"\n{cache} cache\n{table([row for row in report.rows if row.cache == cache])}", flush=True)

    print()
    finished = [variant for variant in variants if variant.name not in left_out]
    if "peft" in options.only:
        report.comparisons.extend(compare_all(finished, place, scratch / "peft-output"))
        for comparison in report.comparisons:
            print_comparison(comparison)
    else:
        left_out["comparison with PEFT's output"] = "--only leaves out peft"
    print_left_out(left_out)
    return report


def main() -> None:
    options = read_options()
    with ExitStack() as stack:
        if options.folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ia3-bench-")))
        else:
            folder = options.folder.absolute()
            folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-vs-peers-", dir=folder)))
        try:
            report = benchmark(options, folder, scratch)
        except CommandFailed as problem:
            sys.exit(str(problem))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    for comparison in report.comparisons:
        if comparison.variant.startswith("ours"):
            assert not comparison.unlike, f"{comparison.variant} differs from PEFT: {comparison.unlike}"
            assert comparison.changed_by_merge, f"{comparison.variant} changed nothing"


if __name__ == "__main__":
    main()
