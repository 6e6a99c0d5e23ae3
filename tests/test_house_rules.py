"""Rules of the house that a machine can check: documentation, public names, sizes."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import click

import ia3_export
from ia3_export.cli import cli
from tools import make_reference

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "ia3_export").rglob("*.py"))


def test_public_names_are_what_the_package_exports_and_documents() -> None:
    assert ia3_export.__all__ == sorted(ia3_export.__all__)
    for name in ia3_export.__all__:
        value = getattr(ia3_export, name)
        assert (inspect.getdoc(value) or "").strip(), name


def test_every_public_function_and_class_has_a_docstring_and_every_module_too() -> None:
    missing = []
    for file in MODULES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            missing.append(str(file))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                missing.append(f"{file.name}: {node.name}")
    assert not missing


def test_no_module_grows_over_its_limit() -> None:
    long = {f.name: n for f in MODULES if (n := f.read_text().count("\n")) > 400}
    assert not long


def _is_wrapper(function: ast.FunctionDef) -> bool:
    """What a decorator puts in a function's place hands on whatever that takes."""
    return any(ast.unparse(decorator).startswith("wraps(") for decorator in function.decorator_list)


def test_no_function_takes_a_keyword_tunnel() -> None:
    tunnels = [
        f"{file.name}: {node.name}"
        for file in MODULES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.args.kwarg and not _is_wrapper(node)
    ]
    assert not tunnels


def test_the_command_line_reference_is_up_to_date() -> None:
    assert make_reference.TARGET.read_text(encoding="utf-8") == make_reference.render(), (
        "run python tools/make_reference.py"
    )


def test_every_command_has_help_with_an_example() -> None:
    for name, command in cli.commands.items():
        assert f"ia3-export {name}" in (command.help or ""), name
        assert all(option.help for option in command.params if isinstance(option, click.Option)), name


def test_the_readme_links_exist_and_its_commands_are_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    used = set(re.findall(r"^ia3-export (\w+)", text, re.MULTILINE))
    assert used == set(cli.commands)


def test_the_changelog_and_the_version_agree() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in changelog or f"## {version}" in changelog


def test_no_test_module_grows_over_its_limit() -> None:
    modules = (file for folder in ("tests", "tools/bench") for file in (ROOT / folder).rglob("*.py"))
    long = {
        f.name: n for f in modules if "node_modules" not in f.parts and (n := f.read_text().count("\n")) > 600
    }
    assert not long


def _functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield file, node


def test_more_than_seven_parameters_have_a_reason_in_the_docstring() -> None:
    found = []
    for file, function in _functions():
        arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if count > 7 and "ore than seven parameters: " not in (ast.get_docstring(function) or ""):
            found.append(f"{file.name}: {function.name} has {count}")
    assert not found


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = []
    for file, function in _functions():
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        if body and (function.end_lineno or 0) - body[0].lineno >= 60:
            long.append(f"{file.name}: {function.name}")
    assert not long


def test_records_of_more_than_five_fields_are_made_by_keyword() -> None:
    """Four fields in order are the most that a reader tells apart; the rows of a table may have that many."""
    positional = []
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or "dataclass" not in "".join(
                map(ast.unparse, node.decorator_list)
            ):
                continue
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            before = [*takewhile(lambda field: ast.unparse(field.annotation) != "KW_ONLY", fields)]
            by_keyword = "kw_only=True" in "".join(map(ast.unparse, node.decorator_list)) or len(before) <= 4
            if len(fields) > 5 and not by_keyword:
                positional.append(f"{file.name}: {node.name}")
    assert not positional


def test_the_formatter_is_switched_off_for_tables_only() -> None:
    """``# fmt: skip`` ends a literal of several lines."""
    elsewhere = []
    for file in MODULES:
        text = file.read_text(encoding="utf-8")
        tables = {
            node.end_lineno
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set) and node.end_lineno != node.lineno
        }
        elsewhere += [
            f"{file.name}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if "# fmt: skip" in line
            and not any(number - 1 <= end <= number for end in tables if end is not None)
        ]
    assert not elsewhere
