"""``ia3-export verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ia3_export.cli.options import adapters_option, base_option, output_options
from ia3_export.cli.output import Output

if TYPE_CHECKING:
    from ia3_export.parity.verification import Report


@click.command("verify")
@base_option
@adapters_option
@click.option("--merged", type=click.Path(path_type=Path), metavar="DIR", help="Folder that merge wrote.")
@click.option("--onnx", type=click.Path(path_type=Path), metavar="DIR", help="Folder that onnx wrote.")
@click.option(
    "--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]", help="Where PyTorch runs."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the inputs.")
@output_options
@click.pass_context
def verify_command(
    ctx: click.Context,
    base: str,
    adapters: tuple[str, ...],
    merged: Path | None,
    onnx: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Compare artifacts with the unmerged forward. Exit 0 when in parity, 1 when not.

    With neither --merged nor --onnx, a merge into a temporary folder is verified.

    \b
      ia3-export verify --base my-base --adapter my-adapter --merged merged --onnx exported
    """
    from ia3_export.parity.verification import verify

    out = Output(as_json, quiet, verbose)
    report = verify(base, adapters, merged=merged, onnx=onnx, device=device, seed=seed)
    show_report(out, report)
    out.document(report.to_json())
    if not report.in_parity:
        ctx.exit(1)


def show_report(out: Output, report: Report) -> None:
    """The report for people."""
    out.text(
        f"{report.model_class} in {report.dtype} on {report.device}, reference: base + live adapters "
        f"(applied by {report.reference}) in {report.precision}"
    )
    for name in report.inputs:
        if out.verbose:
            out.text(f"input: {name}")
    shown = [("unmerged", report.unmerged, "", "the rounding of the live model itself")]
    shown += [(row.artifact, row.distance, f"{row.bound:.3g}", row.finding) for row in report.rows]
    out.table(
        ("", "max error", "bound", "mean error", "cosine", "top-1", ""),
        [
            (
                name, f"{d.max_error:.3g}", limit, f"{d.mean_error:.3g}", f"{d.cosine:.9f}",
                "" if d.top1 is None else f"{d.top1:.1%}", finding,
            )
            for name, d, limit, finding in shown
        ],
        numbers=("max error", "bound", "mean error", "cosine", "top-1"),
        optional=("cosine", "mean error"),
    )  # fmt: skip
    out.text(f"control: the adapters change the base's outputs by up to {report.effect:.3g}")
    for warning in report.warnings:
        out.text(f"warning: {warning}")
    out.text("in parity" if report.in_parity else "NOT in parity")
