"""Writes docs/reference.md from ``--help``. A test fails when the file is out of date.

python tools/make_reference.py          writes it
python tools/make_reference.py --check  exits 1 when it would change
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.testing import CliRunner

from ia3_export.cli import cli

TARGET = Path(__file__).parent.parent / "docs" / "reference.md"


def render() -> str:
    """The page: the group's help, then every command's."""
    parts = ["# Command line reference", "", "Made from `--help` by `tools/make_reference.py`.", ""]
    commands: list[tuple[str, list[str]]] = [("ia3-export", [])]
    commands += [(f"ia3-export {name}", [name]) for name in cli.list_commands(click.Context(cli))]
    for title, arguments in commands:
        result = CliRunner().invoke(
            cli, [*arguments, "--help"], prog_name="ia3-export", terminal_width=100, max_content_width=100
        )
        parts += [f"## {title}", "", "```text", result.output.rstrip(), "```", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text(encoding="utf-8") != text and f"{TARGET} is out of date")
    TARGET.write_text(text, encoding="utf-8")
