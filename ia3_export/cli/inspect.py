"""``ia3-export inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ia3_export.cli.options import choice, output_options, rules_option
from ia3_export.cli.output import Output
from ia3_export.drawing.formats import human_bytes
from ia3_export.ordering import natural
from ia3_export.words import Quantized

if TYPE_CHECKING:
    from ia3_export.commands.inspect import Inspection
    from ia3_export.planning.plan import Plan


_HOW = {
    "dequantize": "written dense (--quantized dequantize)",
    "keep": "the vectors go into its scales (--quantized keep)",
    "keep-or-dense": "the vectors go into its scales where that is possible (--quantized keep-or-dense)",
}


@click.command("inspect")
@click.argument("adapters", metavar="ADAPTER [ADAPTER]", nargs=-1, required=True)
@rules_option
@click.option("--compare", is_flag=True, help="Two adapters: how they differ, site by site.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the vectors: .html, or .png (needs matplotlib).",
)
@click.option("--base", metavar="BASE", help="Plan the merge into this base: folder, file or hub id.")
@click.option(
    "--quantized",
    type=choice(Quantized),
    default="keep-or-dense",
    show_default=True,
    help="How a quantized base would be merged; the default shows which vectors its scales can take.",
)
@output_options
def inspect_command(
    adapters: tuple[str, ...],
    rules: tuple[str, ...],
    compare: bool,
    plot: Path | None,
    base: str | None,
    quantized: Quantized,
    out: Output,
) -> None:
    """Show what an adapter is and, with --base, what a merge would change; with --compare, how two differ.

    Reads headers and the vectors only, and the 16-bit scales of a quantized base. Refusals of the plan are
    findings: the exit code stays 0.

    \b
      ia3-export inspect my-adapter
      ia3-export inspect my-adapter --base my-base --json
      ia3-export inspect --compare adapter-a adapter-b --plot compared.html
    """
    if len(adapters) != (2 if compare else 1):
        raise click.UsageError(
            "--compare takes two adapters" if compare else "give one adapter, or two with --compare"
        )
    if compare and base is not None:
        raise click.UsageError("--compare and --base exclude each other")
    from ia3_export.adapters import read_adapters
    from ia3_export.commands.inspect import inspect

    read = read_adapters(adapters, rules)
    if plot is not None:
        from ia3_export.commands.plot import plot_vectors

        plot_vectors(read, plot)
        out.text(f"drawn: {plot}")
    if compare:
        from ia3_export.cli.compare_text import show_comparison
        from ia3_export.commands.compare import compare as compare_adapters

        compared = compare_adapters(*read)
        show_comparison(out, compared)
        out.document(compared.to_json())
        return
    found = inspect(read[0], base, quantized=quantized)
    content = found.to_json()
    _show_adapter(out, found, content)
    if found.plan is not None:
        show_plan(out, found.plan)
    out.document(content)


def _show_adapter(out: Output, found: Inspection, content: dict[str, Any]) -> None:
    adapter = found.adapter
    out.text(
        f"{adapter.name}: {adapter.format} IA3 adapter, {len(adapter.sites)} vectors, "
        f"{adapter.parameters:,} parameters, {human_bytes(content['bytes'])}"
    )
    out.text(
        f"task: {adapter.task_type or 'not stated'}; base named in it: {content['base_model'] or 'none'}"
    )
    out.table(
        (
            "module path",
            "scales",
            "length",
            "dtype",
            "min",
            "max",
            "mean",
            "from ones",
            "inhibited",
            "amplified",
            "negative",
        ),
        [
            (
                row.module,
                f"{row.direction}put",
                row.length,
                row.dtype,
                f"{row.min:.4f}",
                f"{row.max:.4f}",
                f"{row.mean:.4f}",
                f"{row.from_ones:.4f}" + (" not finite!" if row.not_finite else ""),
                row.inhibited,
                row.amplified,
                row.negative,
            )
            for row in found.sites
        ],
        numbers=("length", "min", "max", "mean", "from ones", "inhibited", "amplified", "negative"),
        optional=("mean", "dtype", "negative", "min", "max", "inhibited", "amplified"),
    )
    for warning in adapter.warnings:
        out.text(f"warning: {warning}")
    if adapter.extras:
        out.text("tensors besides the vectors:")
        out.table(
            ("tensor", "dtype", "shape", "size"),
            [(n, t.dtype, list(t.shape), human_bytes(t.nbytes)) for n, t in adapter.extras.items()],
            numbers=("size",),
        )


def show_quantization(out: Output, quantization: dict[str, Any]) -> None:
    """A quantized base for people: its formats, and what becomes of every site that stays quantized."""
    if not quantization:
        return
    formats = ", ".join(f"{count} {name}" for name, count in quantization["formats"].items())
    out.text(f"quantized base: {formats}; {_HOW[quantization['how']]}")
    from ia3_export.planning.quantized_placement import OutcomeKind

    sites = quantization["sites"]
    counts = {outcome: sum(site["outcome"] == outcome for site in sites) for outcome in get_args(OutcomeKind)}
    if sites:
        out.text(
            "vectors on quantized weights: "
            + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        )
    shown = sites if out.verbose else [site for site in sites if site["outcome"] in ("dense", "refused")][:8]
    if shown:
        out.table(
            ("weight", "format", "vectors", "rounding", "into, or why not"),
            [
                (
                    site["weight"],
                    site["format"],
                    site["outcome"],
                    f"{site['rounding']:.1e}" if site["rounding"] else "",
                    site["reason"] or ", ".join(site["tensors"]),
                )
                for site in shown
            ],
            numbers=("rounding",),
            optional=("format", "rounding"),
        )


def show_plan(out: Output, plan: Plan) -> None:
    """The plan for people: totals, rows (all with --verbose), edits, warnings, refusals."""
    from ia3_export.commands.inspect import summarize
    from ia3_export.writing.manifest import describe_quantization
    from ia3_export.writing.wording import describe_change

    total = summarize(plan)
    share = total["adapter_parameters"] / max(1, total["base_parameters"])
    out.text(
        f"plan: {total['adapter_parameters']:,} adapter parameters ({share:.4%} of "
        f"{total['base_parameters']:,}) change {total['tensors_changed']} of {total['tensors']} tensors, "
        f"{human_bytes(total['bytes_changed'])} of {human_bytes(total['bytes'])}, in "
        f"{len(total['shards_touched'])} of {total['shards']} shards"
    )
    show_quantization(out, describe_quantization(plan))
    rows = sorted(plan.changes.values(), key=lambda change: natural(change.name))
    shown = rows if out.verbose else rows[:8]
    if shown:
        out.table(
            ("tensor", "how", "dtype", "shape", "from"),
            [(c.name, c.how, c.dtype, list(c.shape), "; ".join(describe_change(c))) for c in shown],
            optional=("from", "dtype"),
        )
    if len(shown) < len(rows):
        out.text(f"... and {len(rows) - len(shown)} more tensors (--verbose shows all)")
    for edit in plan.config_edits:
        out.text(f"config.json: {edit}")
    show_left_out(out, plan.base.stored.left_out)
    for warning in plan.warnings:
        out.text(f"warning: {warning}")
    for problem in plan.problems:
        out.text(f"refused: {problem}" + (f" ({problem.hint})" if problem.hint else ""))


def show_left_out(out: Output, names: Sequence[str]) -> None:
    """The base's files that are not in the output."""
    if names:
        out.text(f"left out, weights in other formats, adapters and states of trainings: {', '.join(names)}")
