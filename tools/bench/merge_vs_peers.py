"""Time and memory of a merge beside `cp -r`, PEFT and mergekit, interleaved on the same model.

    python tools/bench/merge_vs_peers.py --folder /tmp/bench --cold --mergekit-venv /tmp/mk --json merge.json

Run it with the python of the environment that holds ia3-export, on Linux. Each round runs every variant once
and starts one variant later than the round before, so none always follows the same neighbour; the slow
peers run in --slow-rounds of the rounds, spread evenly. A run is one fresh process, timed from its start to
its end. Before it, untimed: the former output goes, the disk is synced, and the base is read once (warm) or
the page cache is dropped (cold: the base, python and every library come from the disk, or from what the host
of a virtual machine caches).

Nothing is synced inside the timed part unless the variant does it itself, which only ours-flush does. CPU is
user + system. Peak RSS is that of the largest process of the tree and counts mapped file pages; no process
can show less than this script's own size, printed as the floor. "disk read" is what the process itself
fetched from the disk: near zero when warm, at least the base when cold; otherwise the label does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from fixtures import make_llama

MIB = 1024 * 1024
START_UP_RUNS = 10
SHARD_SIZE = "800MB"  # as the shards of the base, for every variant that rewrites them
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
NAMES = ("cp", "ours-no-digests", "ours", "ours-flush", "ours-plain-io", "peft", "mergekit")

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
class Variant:
    """One way of making the output, and a cheap command that brings its libraries into memory."""

    name: str
    command: tuple[str, ...]
    warm_up: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    slow: bool = False
    optional: bool = False  # a failure leaves the row out instead of ending the benchmark


@dataclass(frozen=True)
class Usage:
    wall_s: float
    cpu_s: float
    peak_rss_mib: float
    disk_read_mib: float


@dataclass(frozen=True)
class Run:
    variant: str
    cache: str
    round: int
    usage: Usage


@dataclass(frozen=True)
class Row:
    variant: str
    cache: str
    runs: int
    wall_median_s: float
    wall_min_s: float
    ratio_to_cp: float | None  # median over the rounds of wall / wall of cp in the same round
    cpu_median_s: float
    peak_rss_mib: float
    disk_read_median_mib: float


@dataclass(frozen=True)
class Comparison:
    """One merged output, tensor by tensor, beside PEFT's and beside the base."""

    variant: str
    tensors: int
    changed_by_merge: int
    unlike_peft: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where the benchmark works: the two inputs and a folder that is emptied before every run."""

    base: Path
    adapter: Path
    run: Path

    @property
    def output(self) -> Path:
        return self.run / "out"

    @property
    def merge_cache(self) -> Path:
        return self.run / "mergekit-cache"


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


class CommandFailed(Exception):
    """A measured command ended with a non-zero exit code, or could not be started."""


# --- running a command ---


def child_environment(extra: Iterable[tuple[str, str]]) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("IA3_EXPORT_PLAIN_IO", None)
    environment.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    environment.update(extra)
    return environment


def measure(command: Sequence[str], extra_environment: Iterable[tuple[str, str]] = ()) -> Usage:
    """Run a command to its end, start-up included."""
    environment = child_environment(extra_environment)
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        except OSError as problem:
            raise CommandFailed(f"{command[0]}: {problem}") from problem
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            log.seek(0)
            tail = log.read().decode(errors="replace").strip().splitlines()[-12:]
            raise CommandFailed("\n".join([f"exit code {child.returncode}: {' '.join(command)}", *tail]))
    return Usage(
        wall_s=wall,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_mib=usage.ru_maxrss / 1024,
        disk_read_mib=usage.ru_inblock * 512 / MIB,
    )


def clear(place: Place) -> None:
    shutil.rmtree(place.run, ignore_errors=True)
    place.run.mkdir()
    os.sync()


def drop_caches() -> None:
    os.sync()
    DROP_CACHES.write_text("3\n")


def read_into_cache(folder: Path) -> None:
    buffer = bytearray(MIB)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def why_no_cold() -> str | None:
    """The reason why the page cache cannot be dropped here, or None."""
    if os.geteuid() != 0:
        return f"only root may write {DROP_CACHES}"
    try:
        drop_caches()
    except OSError as problem:
        return str(problem)
    return None


# --- the variants ---


def our_program() -> str:
    beside = Path(sys.executable).parent / "ia3-export"
    found = str(beside) if beside.exists() else shutil.which("ia3-export")
    if found is None:
        sys.exit("ia3-export is not installed beside this python")
    return found


def our_variant(name: str, place: Place, options: tuple[str, ...], *, plain_io: bool = False) -> Variant:
    inputs = ("--base", str(place.base), "--adapter", str(place.adapter))
    merge = (our_program(), "merge", *inputs, "--output", str(place.output), *options)
    environment = (("IA3_EXPORT_PLAIN_IO", "1"),) if plain_io else ()
    return Variant(name, merge, warm_up=(*merge, "--dry-run"), environment=environment)


def peft_variant(place: Place) -> Variant:
    command = (sys.executable, "-c", PEFT_MERGE, str(place.base), str(place.adapter), str(place.output))
    return Variant("peft", command, warm_up=(sys.executable, "-c", PEFT_IMPORTS), slow=True)


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
        str(place.merge_cache),
    )
    return Variant("mergekit", command, warm_up=(program, "--help"), slow=True, optional=True)


def mergekit_version_command(venv: Path) -> tuple[str, ...]:
    code = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('mergekit', 'peft')))"
    return (str(venv / "bin" / "python"), "-c", code)


def make_variants(place: Place, mergekit_venv: Path | None, recipe: Path) -> list[Variant]:
    variants = [
        Variant("cp", ("cp", "-r", str(place.base), str(place.output)), warm_up=("cp", "--version")),
        our_variant("ours-no-digests", place, ("--digests", "none")),
        our_variant("ours", place, ()),
        our_variant("ours-flush", place, ("--flush", "--digests", "none")),
        our_variant("ours-plain-io", place, ("--digests", "none"), plain_io=True),
        peft_variant(place),
    ]
    if mergekit_venv is not None:
        variants.append(mergekit_variant(place, mergekit_venv, recipe))
    return variants


# --- rounds ---


def slow_runs_in(round_index: int, rounds: int, slow_rounds: int) -> bool:
    """Whether the slow variants take part in this round: in the first, and slow_rounds times in all."""
    return (round_index * slow_rounds) % rounds < slow_rounds


def run_rounds(
    variants: Sequence[Variant],
    place: Place,
    *,
    cache: str,
    rounds: int,
    slow_rounds: int,
    left_out: dict[str, str],
) -> list[Run]:
    runs: list[Run] = []
    for index in range(rounds):
        with_slow = slow_runs_in(index, rounds, slow_rounds)
        shift = index % len(variants)
        for variant in (*variants[shift:], *variants[:shift]):
            if variant.name in left_out or (variant.slow and not with_slow):
                continue
            try:
                clear(place)
                if cache == "cold":
                    drop_caches()
                else:
                    if index == 0:
                        measure(variant.warm_up, variant.environment)
                    read_into_cache(place.base)
                usage = measure(variant.command, variant.environment)
            except CommandFailed as problem:
                if not variant.optional:
                    raise
                left_out[variant.name] = str(problem)
                print(f"{variant.name} is left out: {problem}", file=sys.stderr)
                continue
            runs.append(Run(variant.name, cache, index + 1, usage))
            print(f"{cache} {index + 1}/{rounds} {variant.name:<16}{usage.wall_s:8.2f} s", file=sys.stderr)
    return [run for run in runs if run.variant not in left_out]


def summarize(runs: Sequence[Run]) -> list[Row]:
    """One row per variant, in the order of NAMES; all runs of the same cache state."""
    copies = {run.round: run.usage.wall_s for run in runs if run.variant == "cp"}
    rows = []
    for name in NAMES:
        own = [run for run in runs if run.variant == name]
        if not own:
            continue
        walls = [run.usage.wall_s for run in own]
        ratios = [run.usage.wall_s / copies[run.round] for run in own if run.round in copies]
        rows.append(
            Row(
                variant=name,
                cache=own[0].cache,
                runs=len(own),
                wall_median_s=statistics.median(walls),
                wall_min_s=min(walls),
                ratio_to_cp=statistics.median(ratios) if ratios else None,
                cpu_median_s=statistics.median(run.usage.cpu_s for run in own),
                peak_rss_mib=max(run.usage.peak_rss_mib for run in own),
                disk_read_median_mib=statistics.median(run.usage.disk_read_mib for run in own),
            )
        )
    return rows


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


def compare(variant: str, output: Path, peft_output: Path, base: Path) -> Comparison:
    """Names, dtypes, shapes and bytes of all tensors. Imports torch: only after the last measurement, because
    a child cannot show a smaller peak RSS than the process it comes from."""
    import torch
    from safetensors import safe_open

    with ExitStack() as stack:

        def read_all(folder: Path) -> dict[str, torch.Tensor]:
            files = [stack.enter_context(safe_open(path, "pt")) for path in folder.glob("*.safetensors")]
            return {name: file.get_tensor(name) for file in files for name in file.keys()}  # noqa: SIM118

        def identical(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
            if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
                return False
            return bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))

        ours, peft, plain = read_all(output), read_all(peft_output), read_all(base)
        unlike = tuple(
            name for name in sorted({*ours, *peft}) if not identical(ours.get(name), peft.get(name))
        )
        changed = sum(not identical(tensor, plain.get(name)) for name, tensor in ours.items())
        return Comparison(variant, len(ours), changed, unlike)


def compare_all(variants: Sequence[Variant], place: Place, keep: Path) -> list[Comparison]:
    """Make every merged output once more and compare it with PEFT's."""
    clear(place)
    measure(peft_variant(place).command)
    place.output.rename(keep)
    comparisons = []
    for variant in variants:
        if variant.name not in ("cp", "peft"):
            clear(place)
            measure(variant.command, variant.environment)
            comparisons.append(compare(variant.name, place.output, keep, place.base))
    return comparisons


# --- what is printed ---


def filesystem_of(folder: Path) -> str:
    found, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, this_kind, *_ = line.split()
        if len(mount) >= len(found) and folder.resolve().is_relative_to(mount):
            found, kind = mount, this_kind
    return kind


def first_line(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def machine_line(folder: Path, mergekit_venv: Path | None) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    cores = len(os.sched_getaffinity(0))
    parts = [f"{cores} cores", f"{memory:.0f} GiB", f"Linux {platform.release()} {platform.machine()}"]
    parts += [filesystem_of(folder), f"python {platform.python_version()}"]
    parts += [
        f"{name} {version(name)}" for name in ("ia3-export", "torch", "transformers", "peft", "safetensors")
    ]
    parts.append(first_line(("cp", "--version")))
    if mergekit_venv is not None:
        parts.append(first_line(mergekit_version_command(mergekit_venv)))
    return ", ".join(parts)


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
    return "\n".join(lines)


def print_comparison(comparison: Comparison) -> None:
    unlike = comparison.unlike_peft
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


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
    return chosen


def read_options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        "--only", type=names, default=NAMES, metavar="NAME,...", help=f"of {', '.join(NAMES)}"
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
    subprocess.run(  # in a child, so that this process stays small; the call below finds it made
        [sys.executable, str(Path(__file__).with_name("fixtures.py")), str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    base, adapter = make_llama(folder)
    place = Place(base, adapter, scratch / "run")
    left_out: dict[str, str] = {}
    venv = usable_mergekit(options, left_out)
    variants = make_variants(place, venv, scratch / "mergekit.yml")
    variants = [variant for variant in variants if variant.name in options.only]

    report = Report(
        machine=machine_line(folder, venv),
        base_mib=sum(path.stat().st_size for path in base.iterdir()) / MIB,
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
        report.rows.extend(summarize(runs))
        print(f"\n{cache} cache\n{table([row for row in report.rows if row.cache == cache])}", flush=True)

    print()
    finished = [variant for variant in variants if variant.name not in left_out]
    if "peft" in options.only:
        report.comparisons.extend(compare_all(finished, place, scratch / "peft-output"))
        for comparison in report.comparisons:
            print_comparison(comparison)
    else:
        left_out["comparison with PEFT's output"] = "--only leaves out peft"
    for what, reason in left_out.items():
        print(f"left out: {what}: {reason}")
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
            assert not comparison.unlike_peft, (
                f"{comparison.variant} differs from PEFT: {comparison.unlike_peft}"
            )
            assert comparison.changed_by_merge, f"{comparison.variant} changed nothing"


if __name__ == "__main__":
    main()
