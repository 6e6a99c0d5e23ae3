"""``ia3-export merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ia3_export.cli.inspect import show_left_out, show_plan, show_quantization
from ia3_export.cli.options import (
    adapters_option,
    base_option,
    choice,
    gathered,
    output_options,
    overwrite_option,
    parse_size,
    rules_option,
    weights_option,
)
from ia3_export.cli.output import Output
from ia3_export.drawing.formats import human_bytes
from ia3_export.planning.recipe import Recipe
from ia3_export.words import Cast, Combine, Digests, Dtype, Quantized, TokenizerChoice
from ia3_export.writing.options import OutputOptions

if TYPE_CHECKING:
    from ia3_export.writing.manifest import Manifest


@click.command("merge")
@base_option
@adapters_option
@rules_option
@click.option("--output", type=click.Path(path_type=Path), help="Folder to create.")
@click.option(
    "--output-per-adapter",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead of --output: DIR/<adapter name> for each adapter alone, reading the base once.",
)
@click.option(
    "--combine",
    type=choice(Combine),
    default="product",
    show_default=True,
    help="Several adapters: one after the other, sum of w*l, or 1 + sum of w*(l-1).",
)
@weights_option
@click.option(
    "--dtype",
    type=choice(Dtype),
    default="auto",
    show_default=True,
    help="Dtype of the output; auto keeps what is stored.",
)
@click.option(
    "--quantized",
    type=choice(Quantized),
    default="dequantize",
    show_default=True,
    help="A quantized base: written dense, its scales folded (or refused), or folded with dense weights "
    "where it must be.",
)
@click.option(
    "--cast",
    type=choice(Cast),
    default="peft",
    show_default=True,
    help="peft-low-mem rounds the vector to the base's dtype first, as PEFT's low-memory loading does.",
)
@click.option(
    "--shard-size",
    callback=parse_size,
    metavar="SIZE",
    help="Largest shard, such as 5GB; default as the base.",
)
@click.option("--link", is_flag=True, help="Hard-link shards that no vector touches.")
@click.option("--dry-run", is_flag=True, help="Show the plan, write nothing.")
@overwrite_option
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Leave targeted modules without a vector, and lost heads, as they are.",
)
@click.option("--allow-unused", is_flag=True, help="Drop vectors and tensors that have no place in the base.")
@click.option(
    "--tokenizer",
    type=choice(TokenizerChoice),
    default="auto",
    show_default=True,
    help="Tokenizer, chat template, generation and processor settings: the adapter's where they differ and "
    "fit, the base's, the adapter's.",
)
@click.option(
    "--digests",
    type=choice(Digests),
    default="output",
    show_default=True,
    help="SHA-256 of inputs and outputs, of outputs, or none.",
)
@click.option(
    "--flush", is_flag=True, help="Sync to disk before the final rename: survives a power cut, slower."
)
@click.option(
    "--reload-check/--no-reload-check",
    default=None,
    callback=lambda _ctx, _option, whole: {None: "streamed", True: "whole", False: "none"}[whole],
    help="Of a quantized base: compare every weight with what its users' library reads; weight by weight by "
    "default, with --reload-check from the whole model as transformers loads it.",
)
@output_options
@gathered(Recipe, "recipe")
@gathered(OutputOptions, "options")
def merge_command(
    base: str,
    adapters: tuple[str, ...],
    rules: tuple[str, ...],
    output: Path | None,
    output_per_adapter: Path | None,
    dry_run: bool,
    recipe: Recipe,
    options: OutputOptions,
    out: Output,
) -> None:
    """Fold IA3 adapters into a base model.

    Streams shard by shard, without loading the model; the output folder loads in transformers as it stands.

    \b
      ia3-export merge --base my-base --adapter my-adapter --output merged
      ia3-export merge --base org/model@main --adapter a --adapter b --combine linear --weights 0.7,0.3 \
--output ab

    \f
    More than seven parameters: one an option.
    """
    if not dry_run and (output is None) == (output_per_adapter is None):
        raise click.UsageError("give either --output or --output-per-adapter")
    if output_per_adapter is not None and (recipe.combine != "product" or recipe.weights):
        raise click.UsageError("--output-per-adapter merges each adapter alone: no --combine, no --weights")
    from ia3_export.adapters import read_adapters
    from ia3_export.commands.merge import merge, merge_each, plan_merge

    read = read_adapters(adapters, rules)
    if dry_run:
        from ia3_export.commands.inspect import summarize
        from ia3_export.writing.manifest import describe_plan

        plan = plan_merge(base, read, recipe)
        show_plan(out, plan)
        plan.raise_problems()
        out.document(describe_plan(plan) | summarize(plan))
        return
    with out.progress("merging") as report:
        if output_per_adapter is not None:
            manifests = merge_each(base, read, output_per_adapter, recipe, options, on_progress=report)
            out.document({"manifests": [manifest.content for manifest in manifests]})
        else:
            assert output is not None
            manifests = [merge(base, read, output, recipe, options, on_progress=report)]
            out.document(manifests[0].content)
    for manifest in manifests:
        _show(out, manifest)


def _show(out: Output, manifest: Manifest) -> None:
    content = manifest.content
    changed: list[dict[str, Any]] = content["changes"]
    for warning in content["warnings"]:
        out.text(f"warning: {warning}")
    show_quantization(out, content["quantization"])
    show_left_out(out, content["left_out"])
    if out.verbose:
        for row in changed:
            out.text(
                f"{row['how']:8} {row['tensor']} {row['dtype']} {row['shape']} {'; '.join(row['folds'])}"
            )
    flushed = sum(row["flushed_to_zero"] for row in changed)
    out.text(
        (
            f"{manifest.folder}: {len(changed)} tensors changed, "
            f"{human_bytes(sum(row['bytes'] for row in changed))}, {len(content['files'])} files"
        )
        + (f", {flushed} elements became zero" if flushed else "")
    )
    reload = content.get("reload")
    if reload is not None and reload["skipped"]:
        out.text(f"not reloaded: {reload['skipped']}")
    elif reload is not None:
        out.text(
            f"reloaded through {reload['library']}: {reload['weights']} weights are what was written, "
            f"largest relative difference {reload['error']:.1e}"
        )
