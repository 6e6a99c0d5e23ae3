"""``ia3-export verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ia3_export.cli.options import (
    adapters_option,
    base_option,
    choice,
    gathered,
    output_options,
    parse_size,
    rules_option,
    said_recipe,
    weights_option,
)
from ia3_export.cli.output import Output
from ia3_export.parity.settings import RunSettings
from ia3_export.words import Combine, RunDtype

_FILE = click.Path(path_type=Path)


@click.command("verify")
@base_option
@adapters_option
@rules_option
@click.option("--merged", type=_FILE, metavar="DIR", help="Folder that merge wrote.")
@click.option(
    "--onnx",
    type=_FILE,
    multiple=True,
    metavar="DIR|FILE",
    help="Folder that onnx wrote, with all precisions in it, or a file. Repeat it for several, in the "
    "order of the chain.",
)
@click.option(
    "--base-onnx",
    type=_FILE,
    metavar="DIR|FILE",
    help="The base's own export: the graphs must have the same operators.",
)
@click.option(
    "--weights-only",
    is_flag=True,
    help="No forward: compare bits, streaming, without torch where names allow.",
)
@click.option(
    "--combine",
    type=choice(Combine),
    help="As in merge; default: what the manifest says.",
)
@weights_option
@click.option(
    "--inputs",
    type=_FILE,
    metavar="FILE",
    help="Inputs of your own: .jsonl, .npz or .safetensors, by argument name.",
)
@click.option(
    "--text",
    type=_FILE,
    metavar="FILE",
    help="Texts of your own, one a line, for the artifact's tokenizer, or the base's.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of made-up inputs."
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where the forwards run."
)
@click.option(
    "--dtype",
    type=choice(RunDtype),
    default="auto",
    show_default=True,
    help="In which PyTorch runs the live and the merged model; auto: as stored.",
)
@click.option("--tf32", is_flag=True, help="Let CUDA use TF32 in float32 products.")
@click.option(
    "--atol", type=click.FloatRange(min=0), help="|a - b| <= atol + rtol |b| instead of every gate."
)
@click.option("--rtol", type=click.FloatRange(min=0), help="See --atol.")
@click.option(
    "--max-memory",
    callback=parse_size,
    metavar="SIZE",
    help="Memory for models, such as 16GB; larger ones run layer by layer. Default: what is free.",
)
@click.option(
    "--report", type=_FILE, metavar="FILE", help="Write the report as JSON (docs/report.schema.json)."
)
@click.option("--markdown", type=_FILE, metavar="FILE", help="Write it as Markdown.")
@click.option("--junit", type=_FILE, metavar="FILE", help="Write it as JUnit XML.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write it as one self-contained page.")
@output_options
@gathered(RunSettings, "settings")
@click.pass_context
def verify_command(
    ctx: click.Context,
    base: str,
    adapters: tuple[str, ...],
    rules: tuple[str, ...],
    merged: Path | None,
    onnx: tuple[Path, ...],
    base_onnx: Path | None,
    weights_only: bool,
    combine: Combine | None,
    weights: tuple[float, ...],
    settings: RunSettings,
    report: Path | None,
    markdown: Path | None,
    junit: Path | None,
    html: Path | None,
    out: Output,
) -> None:
    """Prove artifacts equal to the unmerged forward. Exit 0 when in parity, 1 when not.

    First every weight, bit for bit; then forwards of base + live adapters, merged model and ONNX on the same
    inputs. With neither --merged nor --onnx, a merge into a temporary folder is verified.

    \b
      ia3-export verify --base my-base --adapter my-adapter --merged merged --onnx exported --html report.html

    In GitHub Actions the Markdown report also goes to $GITHUB_STEP_SUMMARY.

    \f
    More than seven parameters: one an option.
    """
    from ia3_export.adapters import read_adapters
    from ia3_export.cli.report_text import show_report
    from ia3_export.commands.verify import verify
    from ia3_export.report.files import append_step_summary, check_targets, write_reports

    given: dict[str, Any] = {"report": report, "markdown": markdown, "junit": junit, "html": html}
    targets = {kind: path for kind, path in given.items() if path is not None}
    places = [
        Path(p)
        for p in (base, *adapters, merged, *onnx, base_onnx, settings.inputs, settings.text)
        if p is not None
    ]
    check_targets(targets, places)
    with out.progress("comparing weights") as on_progress:
        result = verify(
            base,
            read_adapters(adapters, rules),
            merged=merged,
            onnx=onnx,
            base_onnx=base_onnx,
            recipe=said_recipe(combine, weights),
            settings=None if weights_only else settings,
            on_progress=on_progress,
        )
    show_report(out, result)
    out.document(result.to_json())
    write_reports(result, targets)
    append_step_summary(result)
    if not result.in_parity:
        ctx.exit(1)
