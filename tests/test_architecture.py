"""docs/architecture.md says what the tree and the import layers say."""

from __future__ import annotations

import ast
import re
import tomllib
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ia3_export"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def _section(title: str) -> str:
    return PAGE.partition(f"\n## {title}")[2].partition("\n## ")[0]


def _rooms() -> set[str]:
    folders = {file.parent.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")}
    return folders - {"."}


def _layers() -> list[set[str]]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    of_rooms = (c for c in contracts if c["type"] == "layers" and "containers" not in c)
    (layers,) = (contract["layers"] for contract in of_rooms)
    return [{name.strip().removeprefix("ia3_export.") for name in layer.split("|")} for layer in layers]


def _is_module(name: str) -> bool:
    return (PACKAGE / name / "__init__.py").exists() or (PACKAGE / f"{name}.py").exists()


def test_the_picture_shows_the_layers_that_imports_are_held_to() -> None:
    picture = _section("The rooms").partition("```text\n")[2].partition("```")[0]
    shown = []
    for line in (line for line in picture.splitlines() if not line.startswith(" ")):
        words = re.findall(r"[a-z_]+", line)  # names of the layer, then what is said of them
        shown.append(set(takewhile(_is_module, words)))
    assert shown == _layers()


def test_every_module_lies_in_a_room_of_a_layer() -> None:
    known = set().union(*_layers())
    top = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert top - {"__init__", "__main__"} == known


def test_the_table_has_every_room_and_its_first_module() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \| .+ \| `([\w/.]+)` \|$", _section("The rooms"), re.MULTILINE)
    assert {room for room, _ in rows} == _rooms()
    assert all(start.startswith(f"{room}/") for room, start in rows)


def test_every_path_on_the_page_exists() -> None:
    paths = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|md))`", PAGE))
    missing = {path for path in paths if not ((PACKAGE / path).exists() or (ROOT / path).exists())}
    assert len(paths) > 40
    assert not missing


def test_the_glossary_has_ten_words_at_most_and_each_is_a_class_there() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| `([\w/.]+)` \|$", _section("Ten words"), re.MULTILINE)
    assert 0 < len(rows) <= 10
    for word, meaning, path in rows:
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        assert word in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}, word
        assert meaning.strip()


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(file.relative_to(PACKAGE).as_posix())
    assert not {name: files for name, files in places.items() if len(files) > 1}
