"""``ia3-export bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ia3_export.benching.settings import BenchSettings
from ia3_export.cli.options import adapters_option, base_option, gathered, output_options, parse_words
from ia3_export.cli.output import Output
from ia3_export.drawing.formats import human_bytes

if TYPE_CHECKING:
    from ia3_export.benching.results import Benchmark, Measure, Row

_WIDTH = 40


@click.command("bench")
@base_option
@adapters_option
@click.option("--task", help="As in onnx; inferred by default.")
@click.option(
    "--precision",
    "precisions",
    default="fp32",
    show_default=True,
    callback=parse_words,
    metavar="LIST",
    help="Of fp32, fp16, int8, int4: the merged graphs are measured in these, too. Float32 always is.",
)
@click.option(
    "--forms",
    default="",
    callback=parse_words,
    metavar="LIST",
    help="Of swappable, task-table: graphs of several tasks, run with the adapter, beside the merged one.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of either runtime. Default: physical cores.")
@click.option(
    "--length", type=click.IntRange(1), default=32, show_default=True, help="Tokens in a forward's text."
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Greedy decoding steps in a round, for models that generate.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences in a forward.")
@click.option(
    "--rounds",
    type=click.IntRange(5),
    default=15,
    show_default=True,
    help="Rounds that count; one more warms up.",
)
@output_options
@gathered(BenchSettings, "settings")
def bench_command(
    base: str,
    adapters: tuple[str, ...],
    settings: BenchSettings,
    out: Output,
) -> None:
    """Measure base, live adapter and merged model side by side, in PyTorch and in ONNX Runtime.

    Each runs in float32 in a process of its own, on the CPU, all in turns. Folding costs nothing over the
    base: the graph has the base's operators. What it saves over the live adapter is what the table says;
    differences within the spread of the rounds are none.

    \b
      ia3-export bench --base my-base --adapter my-adapter
      ia3-export bench --base my-base --adapter my-adapter --precision fp32,int8,int4 --threads 4 --json
      ia3-export bench --base my-base --adapter my-adapter --forms swappable,task-table

    The merged model is exported into a temporary folder for this and not verified: that is what onnx does.
    """
    from ia3_export.benching.bench import bench

    done = bench(base, adapters, settings, on_step=out.text)
    _show(out, done)
    out.document(done.to_json())


def _show(out: Output, done: Benchmark) -> None:
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in done.inputs.items())
    steps = f"; a token is one of {done.tokens} greedy steps after it" if done.tokens else ""
    out.text(f"{done.machine['cpu']}, {done.machine['physical_cores']} cores, threads: {done.threads}")
    out.text(f"{done.task}, {done.rounds} rounds; a forward takes {shapes}{steps}")
    _show_times(out, done)
    _show_sizes(out, done)
    for measure in done.measures:
        _show_bars(out, done, measure)
    for line in done.findings:
        out.text(line)


def _show_times(out: Output, done: Benchmark) -> None:
    columns = ["runtime", "variant", "forward ms", "p95", "ratio"]
    if "token" in done.measures:
        columns += ["token ms", "token p95", "token ratio", "tokens/s"]
    rows = []
    for row in done.rows:
        cells = [row.runtime, _label(row)]
        for measure in done.measures:
            timing = row.timing(measure)
            if timing is not None:
                cells += [_number(timing.median), _number(timing.p95), f"{timing.ratio:.2f}x"]
        if row.tokens_per_second is not None:
            cells.append(_number(row.tokens_per_second))
        rows.append(cells)
    out.table(columns, rows, numbers=columns[2:], optional=("token ratio", "p95", "token p95"))


def _show_sizes(out: Output, done: Benchmark) -> None:
    columns = ("runtime", "variant", "files", "operators", "peak memory", "imports")
    rows = [
        (
            row.runtime,
            _label(row),
            human_bytes(row.files),
            "" if row.operators is None else row.operators,
            human_bytes(row.peak),
            human_bytes(row.imported),
        )
        for row in done.rows
    ]
    out.table(columns, rows, numbers=columns[2:])


def _show_bars(out: Output, done: Benchmark, measure: Measure) -> None:
    """Medians over the base's in the same runtime, as bars."""
    from ia3_export.benching.results import MEASURES

    ratios = {row: timing.ratio for row in done.rows if (timing := row.timing(measure)) is not None}
    longest = max(ratios.values())
    out.text(f"{MEASURES[measure]}, time over the base's in the same runtime")
    for runtime, rows in done.groups():
        out.text(f"  {runtime}")
        for row in rows:
            bar = "#" * max(1, round(_WIDTH * ratios[row] / longest))
            out.text(f"    {_label(row):<15} {ratios[row]:5.2f}x |{bar}")


def _label(row: Row) -> str:
    return row.variant if row.precision == "fp32" else f"{row.variant} {row.precision}"


def _number(value: float) -> str:
    """Three significant digits, and all those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
