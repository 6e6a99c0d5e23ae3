"""The command line: one module a command, no logic. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from ia3_export.cli.adapter_commands import combine_command, convert_command
from ia3_export.cli.bench_command import bench_command
from ia3_export.cli.inspect_command import inspect_command
from ia3_export.cli.merge_command import merge_command
from ia3_export.cli.onnx_command import onnx_command
from ia3_export.cli.unmerge_command import unmerge_command
from ia3_export.cli.verify_command import verify_command
from ia3_export.errors import IA3ExportError, UsageError

INTERRUPTED = 130


class _Commands(click.Group):
    """Turns every error of ours into its text and exit code, in this one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IA3ExportError as error:
            _show_error(error, as_json=bool(ctx.meta.get("ia3_export.json")))
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx is not None else ctx.command_path
            _show_error(UsageError(error.format_message(), hint=f"see '{path} --help'"), as_json=False)
            ctx.exit(UsageError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was left behind", err=True)
            ctx.exit(INTERRUPTED)


def _show_error(error: IA3ExportError, *, as_json: bool) -> None:
    click.echo(f"error: {error}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    if as_json:
        document = {"error": str(error), "hint": error.hint, "exit_code": error.exit_code}
        click.echo(json.dumps(document, indent=2))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ia3-export")
def cli() -> None:
    """Take an IA3 fine-tune to the device: fold it into the base model, prove it, export it.

    \b
      ia3-export inspect my-adapter --base my-base
      ia3-export merge --base my-base --adapter my-adapter --output merged
      ia3-export onnx --model merged --output exported
      ia3-export verify --base my-base --adapter my-adapter --merged merged --onnx exported
      ia3-export convert tfew.pt --output my-adapter
      ia3-export combine --adapter a --adapter b --output ab
      ia3-export unmerge --model merged --adapter my-adapter --output base-again
      ia3-export bench --base my-base --adapter my-adapter

    BASE and ADAPTER are a folder, a file, or a hub id org/name[@revision].

    Exit codes: 0 done and in parity, 1 a check failed, 2 wrong usage, 3 an input is not readable or refused,
    4 the output could not be written, 130 interrupted.
    """


for _command in (
    inspect_command, merge_command, onnx_command, verify_command, convert_command, combine_command, unmerge_command, bench_command,
):  # fmt: skip
    cli.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    # numpy's BLAS would start a thread per core at import; no command uses it
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(cli(prog_name="ia3-export"))
