"""``ia3-export unmerge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ia3_export.cli.options import (
    adapters_option,
    choice,
    output_option,
    output_options,
    overwrite_option,
    rules_option,
    said_recipe,
    weights_option,
)
from ia3_export.cli.output import Output
from ia3_export.words import Combine

if TYPE_CHECKING:
    from ia3_export.commands.unmerge import UnmergedModel


@click.command("unmerge")
@click.option("--model", required=True, metavar="DIR", help="Merged model: folder, file or hub id.")
@adapters_option
@rules_option
@output_option
@click.option("--base", metavar="BASE", help="The original, if it is at hand: compare the result with it.")
@click.option(
    "--combine",
    type=choice(Combine),
    help="How several adapters were merged; default: what the model's manifest says.",
)
@weights_option
@click.option("--allow-missing", is_flag=True, help="Accept targeted modules without a vector.")
@overwrite_option
@output_options
def unmerge_command(
    model: str,
    adapters: tuple[str, ...],
    rules: tuple[str, ...],
    output: Path,
    base: str | None,
    combine: Combine | None,
    weights: tuple[float, ...],
    allow_missing: bool,
    overwrite: bool,
    out: Output,
) -> None:
    """Divide an adapter's vectors out of a merged model again, and say how far from exact that is.

    A merge rounds, so not every weight can be told from its product: each quotient is folded again, and
    counts as certain when no other value of the dtype gives the merged one. Zeros are refused; heads stay.

    \b
      ia3-export unmerge --model merged --adapter my-adapter --output base-again

    \f
    More than seven parameters: one an option.
    """
    from ia3_export.adapters import read_adapters
    from ia3_export.commands.unmerge import unmerge

    read = read_adapters(adapters, rules)
    with out.progress("unmerging") as report:
        done = unmerge(
            model,
            read,
            output,
            base=base,
            recipe=said_recipe(combine, weights),
            allow_missing=allow_missing,
            overwrite=overwrite,
            on_progress=report,
        )
    _show(out, done)
    out.document(done.content)


def _show(out: Output, done: UnmergedModel) -> None:
    rows = done.tensors if out.verbose else done.tensors[:8]
    out.table(
        (
            "tensor",
            "dtype",
            "elements",
            "certain",
            "ambiguous",
            "does not fold back",
            "as in the base",
            "apart (ulp)",
        ),
        [
            (
                row.tensor,
                row.dtype,
                f"{row.elements:,}",
                f"{row.certain / max(1, row.elements):.2%}",
                f"{row.ambiguous:,}",
                f"{row.unfolded:,}",
                "" if row.equal is None else f"{row.equal / max(1, row.elements):.2%}",
                "" if row.distance is None else row.distance,
            )
            for row in rows
        ],
        numbers=("elements", "certain", "ambiguous", "does not fold back", "as in the base", "apart (ulp)"),
        optional=("dtype", "elements"),
    )
    if len(rows) < len(done.tensors):
        out.text(f"... and {len(done.tensors) - len(rows)} more tensors (--verbose shows all)")
    total = sum(row.elements for row in done.tensors)
    certain = sum(row.certain for row in done.tensors)
    out.text(
        f"{done.folder}: {len(done.tensors)} tensors divided; {certain / max(1, total):.2%} of {total:,} "
        f"elements are certainly what they were, {sum(row.ambiguous for row in done.tensors):,} may be a "
        "neighbouring value"
    )
    known = [row for row in done.tensors if row.equal is not None]
    if known:
        out.text(
            "compared with the base: "
            f"{sum(row.equal or 0 for row in known) / max(1, total):.2%} have its bits, the "
            f"others are at most {max(row.distance or 0 for row in known)} units of the last "
            "place away"
        )
    for warning in done.warnings:
        out.text(f"warning: {warning}")
