"""``ia3-export onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ia3_export.cli.options import (
    choice,
    gathered,
    output_option,
    output_options,
    overwrite_option,
    parse_size,
    parse_words,
    rules_option,
)
from ia3_export.cli.output import Output
from ia3_export.cli.report_text import show_report
from ia3_export.drawing.formats import human_bytes
from ia3_export.errors import UsageError
from ia3_export.onnx.options import DecoderForm, GraphOptions

if TYPE_CHECKING:
    from ia3_export.commands.export_onnx import OnnxExport, OnnxFile
    from ia3_export.onnx.mixing import Mix

#: Weights that are named without ``-v``.
_COSTLY = 8
#: Weights without codes that are named without ``-v``, for each reason.
_NAMED = 4


@click.command("onnx")
@click.option("--model", metavar="DIR", help="Folder that merge wrote, or any checkpoint.")
@click.option("--base", metavar="BASE", help="Instead of --model, with --adapter.")
@click.option(
    "--onnx-base",
    metavar="DIR",
    help="ONNX folder of the base: --adapter is folded into its weights, without a trace. --base then is "
    "where weights are looked up whose names are gone.",
)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="ADAPTER", help="IA3 adapter; repeat for several."
)
@rules_option
@output_option
@click.option(
    "--task",
    help="text-generation, text2text-generation, automatic-speech-recognition, feature-extraction, "
    "sentence-similarity, fill-mask, text-, token-, image-, audio-classification, question-answering; "
    "inferred by default.",
)
@click.option(
    "--precision",
    "precisions",
    default="fp32",
    show_default=True,
    callback=parse_words,
    metavar="LIST",
    help="Of fp32, keep (the codes of a base that is quantized already), fp16, int8, q8 (8 bits for "
    "browsers), int4, separated by commas; all from one trace.",
)
@click.option(
    "--budget",
    callback=parse_size,
    metavar="SIZE",
    help="Of int4: how large its files may be, such as 90MB; of the weights' bits, 4 or 8, those that lose "
    "least.",
)
@click.option(
    "--keep-effect",
    type=float,
    metavar="SHARE",
    help="Of int4: the share of the adapters' effect that must be left, such as 0.95, in files as small as "
    "possible.",
)
@click.option(
    "--max-loss",
    type=float,
    metavar="NATS",
    help="The most that a quantized file may lose: mean KL divergence, one minus the cosine without logits. "
    "More is exit 1. By default any loss is written, and said.",
)
@click.option(
    "--target",
    "targets",
    default="",
    callback=parse_words,
    metavar="LIST",
    help="Runtimes besides optimum and transformers.js, whose layout the folder always has: genai, mobile.",
)
@click.option(
    "--decoder",
    type=choice(DecoderForm),
    default="merged",
    show_default=True,
    help="Encoder-decoders: one decoder file that is its own first step, optimum's two, or "
    "those two in one If.",
)
@click.option(
    "--swappable",
    is_flag=True,
    help="With --base: the base's graphs, and a file of kilobytes for each --adapter that a run takes.",
)
@click.option(
    "--task-table",
    is_flag=True,
    help="With --base: the base's graphs with a table of all adapters' vectors; an input, task, says which "
    "row each element of a batch takes.",
)
@click.option("--opset", default=20, show_default=True, help="ONNX operator set.")
@click.option("--no-verify", is_flag=True, help="Do not run the files through ONNX Runtime.")
@overwrite_option
@output_options
@gathered(GraphOptions, "graphs")
def onnx_command(
    model: str | None,
    base: str | None,
    onnx_base: str | None,
    adapters: tuple[str, ...],
    rules: tuple[str, ...],
    output: Path,
    graphs: GraphOptions,
    no_verify: bool,
    overwrite: bool,
    out: Output,
) -> None:
    """Export a model to ONNX: files that ONNX Runtime, transformers.js, optimum and onnxruntime-genai load as
    they are.

    Every file is verified through ONNX Runtime before the folder is put in place: with --base and --adapter
    against the live adapter, with --model against that model. The last words say what came of it: in parity;
    written with a loss, of so much, by quantization alone; or, exit 1, not written, with the files kept
    aside.

    \b
      ia3-export onnx --model merged --output exported
      ia3-export onnx --base my-base --adapter my-adapter --output exported --precision fp32,int8,int4
      ia3-export onnx --base my-4-bit-base --adapter my-adapter --output exported --precision keep
      ia3-export onnx --base my-base --adapter one --adapter two --output exported --swappable
      ia3-export onnx --base my-base --adapter one --adapter two --output exported --task-table
      ia3-export onnx --onnx-base exported-base --adapter my-adapter --output exported

    \f
    More than seven parameters: one an option.
    """
    from ia3_export.adapters import read_adapters
    from ia3_export.commands.export_onnx import export_onnx

    if onnx_base is not None:
        from ia3_export.commands.refolding import refold

        if model is not None or graphs != GraphOptions():
            raise UsageError(
                "--onnx-base keeps the graphs as they are: task, precisions and form were chosen before",
                hint="give --adapter, and --base where names are gone",
            )
        folded = refold(
            output,
            onnx_base,
            read_adapters(adapters, rules),
            base=base,
            check=not no_verify,
            overwrite=overwrite,
            on_step=out.text,
        )
        _show(out, folded)
        return
    done = export_onnx(
        output,
        model=model,
        base=base,
        adapters=read_adapters(adapters, rules),
        graphs=graphs,
        check=not no_verify,
        overwrite=overwrite,
        on_step=out.text,
    )
    _show(out, done)


def _show(out: Output, done: OnnxExport) -> None:
    if done.report is not None:
        if done.adapters:
            out.text("without an adapter:")
        show_report(out, done.report, done.verdict)
    for name, report in done.adapters.items():
        out.text(f"with {name}:")
        show_report(out, report, done.verdict)
    if done.bits is not None:
        _show_bits(out, done.bits)
    _show_files(out, done)
    for loss in done.losses:
        out.text(
            f"warning: {loss}; ia3-export verify would fail it. --text there measures on your texts, "
            "--max-loss here fails such a file"
        )
    out.document(done.to_json())


def _show_bits(out: Output, mix: Mix) -> None:
    """The weights that would cost most (with ``-v`` all), and what was tried."""
    costly = list(reversed(mix.order))
    shown = costly if out.verbose else costly[:_COSTLY]
    narrow = {id(choice) for choice in mix.order[: mix.count]}
    rows = [
        (choice.name, "4" if id(choice) in narrow else "8", f"{choice.loss:.2g}", human_bytes(choice.saved))
        for choice in shown
    ]
    out.table(("weight", "bits", "loss at 4 bits alone", "would save"), rows, numbers=("bits", "would save"))
    if len(shown) < len(costly):
        out.text(f"and {len(costly) - len(shown)} weights that cost less (-v)")
    out.text(
        f"int4: {mix.count} of {len(mix.order)} weights have 4 bits, the others 8; on the inputs that they "
        f"were chosen on they lose {mix.loss:.3g}"
    )


def _show_reasons(out: Output, file: OnnxFile) -> None:
    """The weights that are not the base's codes, by why; without ``-v`` the first of them."""
    for reason in dict.fromkeys(file.reasons.values()):
        names = [name for name, why in file.reasons.items() if why == reason]
        shown = names if out.verbose else names[:_NAMED]
        more = f" and {len(names) - len(shown)} more (-v)" if len(shown) < len(names) else ""
        out.text(f"{file.path}, no codes: {', '.join(shown)}{more}: {reason}")


def _show_files(out: Output, done: OnnxExport) -> None:
    rows = []
    for file in done.files:
        reached = (
            ""
            if not file.weight_bytes
            else f"{file.converted_bytes / file.weight_bytes:.1%} of {human_bytes(file.weight_bytes)}"
        )
        rows.append((file.path, file.precision, human_bytes(file.size), reached))
        if file.reasons:
            _show_reasons(out, file)
        elif out.verbose and file.left:
            out.text(f"{file.path}, left in float32: {', '.join(file.left)}")
    out.table(("file", "precision", "size", "weights converted"), rows, numbers=("size",))
    out.text(f"{done.folder}: {done.task}, opset {done.opset}")
