"""``ia3-export patch`` and ``ia3-export apply``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ia3_export.cli.options import output_options, parse_size
from ia3_export.cli.output import Output
from ia3_export.drawing.formats import human_bytes

if TYPE_CHECKING:
    from ia3_export.commands.apply import Applied


@click.command("patch")
@click.option("--from", "from_", required=True, metavar="DIR", help="What is deployed: the base's folder.")
@click.option("--to", required=True, metavar="DIR", help="The same with an adapter merged into it.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Patch to write."
)
@click.option(
    "--max-carried",
    callback=parse_size,
    metavar="SIZE",
    help="Most bytes that are carried because no vector explains them, such as a new head; default 1 % of "
    "the folder, between 1 MiB and 64 MiB.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that is there.")
@output_options
def patch_command(
    from_: str, to: str, output: Path, max_carried: int | None, overwrite: bool, out: Output
) -> None:
    """Write the smallest file that turns a deployed base into the merged model.

    It holds the vectors, where they go, and digests of every file, but no tensors: safetensors, ONNX and
    GGUF, in every precision whose codes a merge keeps. It is proven before it is written.

    \b
      ia3-export patch --from my-base --to merged --output task.ia3patch
      ia3-export apply task.ia3patch my-base
    """
    from ia3_export.commands.patch import patch

    with out.progress("comparing") as report:
        made = patch(from_, to, output, max_carried=max_carried, overwrite=overwrite, on_progress=report)
    content: dict[str, Any] = dict(made.content)
    if out.verbose:
        for kind in ("changed", "new", "removed"):
            for name in content["files"][kind]:
                out.text(f"{kind:8} {name}")
    out.text(
        f"{made.path}: {human_bytes(content['bytes'])} for {human_bytes(content['folder_bytes'])}; "
        f"{content['vectors']} vectors in {content['folds']} places, "
        f"{human_bytes(content['carried_bytes'])} of other bytes; proven: it makes every byte of {to}"
    )
    out.document(content)


@click.command("apply")
@click.argument("places", nargs=-1, metavar="[PATCH] DIR")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="New folder with the files that the patch names; default: DIR is replaced in one step.",
)
@click.option("--revert", "back", is_flag=True, help="Take the patch that was applied in place back.")
@click.option("--dry-run", is_flag=True, help="Verify folder and patch, write nothing.")
@output_options
def apply_command(
    places: tuple[str, ...], output: Path | None, back: bool, dry_run: bool, out: Output
) -> None:
    """Put a patch on the folder it was made for; needs numpy alone.

    Every byte is verified before the first write. In place, DIR is the old or the new folder whenever the
    process is killed, never between, and --revert brings the old one back bit for bit.

    \b
      ia3-export apply task.ia3patch my-model
      ia3-export apply --revert my-model
      ia3-export apply task.ia3patch my-base --output my-model
    """
    if back and (output is not None or dry_run):
        raise click.UsageError("--revert takes neither --output nor --dry-run")
    if dry_run and output is not None:
        raise click.UsageError("--dry-run writes nothing: give no --output")
    if len(places) != (1 if back else 2):
        raise click.UsageError("give the folder alone with --revert" if back else "give PATCH and DIR")
    from ia3_export.commands.apply import apply, revert

    with out.progress("reverting" if back else "patching") as report:
        if back:
            done = revert(places[0], on_progress=report)
        else:
            done = apply(places[0], places[1], output=output, dry_run=dry_run, on_progress=report)
    _show(out, done)
    out.document(done.content)


def _show(out: Output, done: Applied) -> None:
    content = done.content
    for row in content.get("files", ()) if out.verbose else ():
        out.text(f"{row['sha256']}  {row['path']}")
    if "files" not in content:
        out.text(f"{done.folder}: nothing to revert, its files are those from before the patch")
        return
    size = sum(row["bytes"] for row in content["files"])
    out.text(
        f"{done.folder}: {content['how']}; files made: {len(content['files'])} ({human_bytes(size)}), "
        f"as before: {content['kept']}, removed: {len(content['removed'])}; every byte as the patch says"
    )
