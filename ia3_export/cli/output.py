"""What people see: text, tables, JSON, progress. JSON goes to stdout and moves all text to stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ia3_export.drawing.formats import human_bytes
from ia3_export.report.model import finite

if TYPE_CHECKING:
    from ia3_export.writing.execute import Progress

#: ``::error::`` at the start of a line, ``##[group]`` and ``##vso[`` anywhere.
_COMMANDS = re.compile(r"^\s*::|##(?=\[|vso\[)")


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command writes: `as_json`, `quiet` and `verbose` as given on the command line."""

    as_json: bool
    quiet: bool
    verbose: bool

    def text(self, line: str = "") -> None:
        """A line for people."""
        if not self.quiet:
            click.echo(_printable(line), err=self.as_json)

    def note(self, line: str) -> None:
        """A line on stderr, also where it is quiet: an error, its hint."""
        click.echo(_printable(line), err=True)

    def document(self, content: Mapping[str, Any]) -> None:
        """The JSON document, if asked for."""
        if self.as_json:
            text = json.dumps(finite(content), indent=2, sort_keys=True, ensure_ascii=False)
            # half a character is written as Python does
            click.echo(text.encode(errors="backslashreplace").decode())

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        numbers: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> None:
        """Print a plain table, if it is not quiet.

        `numbers` are set flush right, `optional` ones are left out, last first, if it is too wide.
        """
        if self.quiet:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        stream = sys.stderr if self.as_json else sys.stdout
        # a pipe has no width of its own: rows stay whole for grep
        console = Console(file=stream, width=None if stream.isatty() or "COLUMNS" in os.environ else 400)
        widths = {
            c: max(len(str(cell)) for cell in (c, *(row[i] for row in rows))) for i, c in enumerate(columns)
        }
        shown = list(columns)
        for column in reversed(optional):
            if sum(widths[c] + 3 for c in shown) > console.width:
                shown.remove(column)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in shown:
            table.add_column(
                Text(_visible(column)), justify="right" if column in numbers else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(
                *(Text(_visible(str(cell))) for c, cell in zip(columns, row, strict=True) if c in shown)
            )
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():
            if line.strip():
                click.echo(_printable(line.rstrip()), file=stream)

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[Progress], None]]:
        """A callback that draws bytes and rate: a bar on a terminal, a line every ten seconds otherwise."""
        if self.quiet:
            yield lambda _: None
        elif sys.stderr.isatty():
            with _bar(what) as report:
                yield report
        else:
            yield _lines(what)


def _printable(line: str) -> str:
    """`line` as it may reach a terminal or the log of a CI job, whose runners obey commands in it."""
    return _COMMANDS.sub(r"\\\g<0>", _visible(line))


def _visible(text: str) -> str:
    """`text` with control characters and the like spelled out (``\\x1b``): names come from untrusted files,
    and terminals obey escapes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (what, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda progress: bar.update(task, completed=progress.done, total=progress.total)


def _lines(what: str) -> Callable[[Progress], None]:
    start = time.monotonic()
    last = start

    def report(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            rate = human_bytes(progress.done / (now - start))
            click.echo(
                f"{what}: {human_bytes(progress.done)} of {human_bytes(progress.total)}, {rate}/s", err=True
            )

    return report
