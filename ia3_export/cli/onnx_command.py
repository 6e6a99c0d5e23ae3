"""``ia3-export onnx``."""

from __future__ import annotations

from pathlib import Path

import click

from ia3_export.cli.options import output_options, overwrite_option
from ia3_export.cli.output import Output
from ia3_export.cli.report_text import show_report


@click.command("onnx")
@click.option("--model", metavar="DIR", help="Folder that merge wrote, or any checkpoint.")
@click.option("--base", metavar="BASE", help="Instead of --model, with --adapter.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="ADAPTER", help="IA3 adapter; repeat for several."
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@click.option("--task", help="feature-extraction or text-classification; inferred by default.")
@click.option("--opset", default=20, show_default=True, help="ONNX operator set.")
@click.option("--no-verify", is_flag=True, help="Do not run the file through ONNX Runtime.")
@overwrite_option
@output_options
def onnx_command(
    model: str | None,
    base: str | None,
    adapters: tuple[str, ...],
    output: Path,
    task: str | None,
    opset: int,
    no_verify: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Export a merged encoder or text classifier to ONNX.

    The file is compared with PyTorch through ONNX Runtime before it is put in place; with --base and --adapter also
    with the live adapter.

    \b
      ia3-export onnx --model merged --output exported
      ia3-export onnx --base my-base --adapter my-adapter --output exported
    """
    from ia3_export.exporting import export_onnx

    out = Output(as_json, quiet, verbose)
    out.text("exporting (torch traces the model; this takes a while)")
    done = export_onnx(
        output, model=model, base=base, adapters=adapters, task=task, opset=opset, check=not no_verify,
        overwrite=overwrite,
    )  # fmt: skip
    if done.report is not None:
        show_report(out, done.report)
    if done.distance is not None:
        out.text(f"ONNX Runtime against PyTorch, both float32: max error {done.distance.max_error:.3g}")
    out.text(f"{done.folder}/onnx/model.onnx: {done.task}, opset {done.opset}")
    out.document(done.to_json())
