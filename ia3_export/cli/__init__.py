"""The command line: one module a command, no logic. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from ia3_export.cli.adapters import combine_command, convert_command
from ia3_export.cli.bench import bench_command
from ia3_export.cli.inspect import inspect_command
from ia3_export.cli.merge import merge_command
from ia3_export.cli.onnx import onnx_command
from ia3_export.cli.output import Output
from ia3_export.cli.patch import apply_command, patch_command
from ia3_export.cli.unmerge import unmerge_command
from ia3_export.cli.verify import verify_command
from ia3_export.errors import (
    CRASHED,
    IA3ExportError,
    InputError,
    OutputError,
    Unsupported,
    UsageError,
    kind_and_line,
)

INTERRUPTED = 130
#: The extra of pyproject.toml that brings a library; ``cpu`` brings all but plots.
_EXTRAS = dict.fromkeys(
    ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "optimum", "onnxruntime"), "cpu"
) | {"matplotlib": "plot"}


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
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise  # click's own business
        except Exception as error:
            if ctx.meta.get("ia3_export.verbose"):
                for line in "".join(traceback.format_exception(error)).splitlines():
                    Output(as_json=False, quiet=False, verbose=True).note(line)
            said = _not_installed(error) or _of_machine(error) or _crash(error)
            _show_error(said, as_json=bool(ctx.meta.get("ia3_export.json")))
            ctx.exit(said.exit_code)


class _Crash(IA3ExportError):
    """An exception that nobody foresaw."""

    exit_code = CRASHED


def _not_installed(error: Exception) -> IA3ExportError | None:
    """The error for a library that the core does without; None for any other."""
    library = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extra = _EXTRAS.get(library)
    if extra is None:
        return None
    return Unsupported(
        f"this needs {library}, which is not installed",
        hint=f"pip install 'ia3-export[{extra}]' (the README's line brings the build of torch for CPUs)",
    )


def _of_machine(error: Exception) -> IA3ExportError | None:
    """The error for what the system refused: memory, space, a file; None where it is a mistake of ours."""
    from ia3_export.writing.stage import is_full, unreadable

    if isinstance(error, MemoryError):
        return InputError(
            f"there is not enough memory ({kind_and_line(error)})",
            hint="close other programs, or use a machine with more; verify has --weights-only and "
            "--max-memory",
        )
    if not isinstance(error, OSError):
        return None
    if is_full(error):
        return OutputError(
            f"cannot write: {kind_and_line(error)}", hint="free some space, on the disk of TMPDIR as well"
        )
    said = error.strerror or str(error)
    return unreadable(Path(error.filename), said) if isinstance(error.filename, str) else None


def _crash(error: Exception) -> _Crash:
    """The line to report: what it was, and the last place of our own that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "ia3_export" in Path(frame.filename).parts]
    where = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    version = metadata.version("ia3-export")
    return _Crash(
        f"ia3-export {version} crashed{where}: {kind_and_line(error)}",
        hint="this is a mistake in ia3-export and no verdict on your files: please report this line and "
        "the command; --verbose shows the traceback",
    )


def _show_error(error: IA3ExportError, *, as_json: bool) -> None:
    out = Output(as_json, quiet=False, verbose=False)
    out.note(f"error: {error}")
    if error.hint:
        out.note(f"hint: {error.hint}")
    if as_json:
        out.document({"error": str(error), "hint": error.hint, "exit_code": error.exit_code})


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
      ia3-export patch --from my-base --to merged --output task.ia3patch
      ia3-export apply task.ia3patch my-base
      ia3-export bench --base my-base --adapter my-adapter

    BASE and ADAPTER are a folder, a file, or a hub id org/name[@revision].

    Exit codes: 0 done and in parity, 1 a check failed, 2 wrong usage, 3 an input is not readable or refused,
    4 the output could not be written, 70 a crash of ia3-export itself, 130 interrupted.
    """


for _command in (
    inspect_command,
    merge_command,
    onnx_command,
    verify_command,
    convert_command,
    combine_command,
    unmerge_command,
    patch_command,
    apply_command,
    bench_command,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    # numpy's BLAS would start a thread per core at import; no command uses it
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(cli(prog_name="ia3-export"))
