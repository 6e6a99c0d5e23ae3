"""Report files: which formats there are, and where they may be put."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ia3_export.drawing.files import write_whole
from ia3_export.errors import OutputError, UsageError
from ia3_export.report.model import Report, to_text


def as_text(report: Report, kind: str) -> str:
    """`report` in the format `kind`: ``report`` (JSON), ``markdown``, ``junit`` or ``html``."""
    # each writer is imported when it is used: a proof of weights alone takes less time than all of them
    if kind == "markdown":
        from ia3_export.report.markdown import to_markdown

        return to_markdown(report)
    if kind == "junit":
        from ia3_export.report.junit import to_junit

        return to_junit(report)
    if kind == "html":
        from ia3_export.report.html import to_html

        return to_html(report)
    return to_text(report)


def check_targets(targets: Mapping[str, Path], inputs: Sequence[Path]) -> None:
    """Before the work: every target can be a file, and none replaces a file of an input folder.

    Raises `UsageError` and `OutputError`.
    """
    for option, path in targets.items():
        if path.is_dir():
            raise OutputError(f"--{option} {path} is a folder", hint="give a file")
        for folder in inputs:
            inside = path.resolve().is_relative_to(folder.resolve()) if folder.exists() else False
            if inside and path.exists():
                raise UsageError(
                    f"--{option} {path} would replace a file of an input", hint="give another place"
                )
    if len({path.resolve() for path in targets.values()}) < len(targets):
        raise UsageError("two reports are to be written to one file", hint="give each its own")


def write_reports(report: Report, targets: Mapping[str, Path]) -> None:
    """Write `report` to each of `targets` (a kind of `as_text` → file); new folders are made.

    Raises `OutputError`.
    """
    for kind, path in targets.items():
        write_whole(path, as_text(report, kind).encode())


def append_step_summary(report: Report, variable: str = "GITHUB_STEP_SUMMARY") -> None:
    """Append the Markdown report to the file that GitHub Actions names in `variable`, if it does.

    Raises `OutputError` when that file cannot be written.
    """
    name = os.environ.get(variable)
    if not name:
        return
    try:
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(as_text(report, "markdown") + "\n")
    except OSError as error:
        raise OutputError(
            f"${variable} {name} cannot be written: {error.strerror}", hint="unset it"
        ) from None
