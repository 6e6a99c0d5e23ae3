"""docs/report.schema.json: up to date, and it accepts the reports that `verify` writes and nothing else."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ia3_export.report import model
from ia3_export.report.model import Distance, Report, to_text
from tests.report import sample
from tools import make_schema

ROOT = Path(__file__).parent.parent.parent


SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)


def infinite() -> Report:
    """Every number of every distance infinite or NaN."""
    report = sample.failing()
    worst = Distance(
        **dict(zip((field.name for field in fields(Distance)), cycle([math.inf, math.nan]), strict=False))
    )
    steps = tuple(
        replace(
            step,
            distance=worst,
            loss=worst,
            library=worst,
            effect_present=-math.inf,
            gates=(replace(step.gates[0], value=math.inf, limit=math.nan),),
        )
        for step in report.steps
    )
    return replace(report, steps=steps)


SAMPLES = {
    "good": sample.good(),
    "failing": sample.failing(),
    "weights only": sample.weights_only(),
    "large": sample.large(30, 6),
    "infinite": infinite(),
}


def small() -> dict[str, Any]:
    """One of everything that a report may hold, as JSON."""
    report = sample.failing()
    step = replace(report.steps[0], layers=report.steps[0].layers[:1])
    sites = (replace(report.sites[0], values=(1.5,)),)
    document: dict[str, Any] = json.loads(
        to_text(replace(report, steps=(step,), sites=sites, weights=report.weights[:1]))
    )
    return document


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every field, the free mappings' entries left out."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    if path not in {("options",), ("environment",), ("digests",)}:
        for key, entry in entries:
            yield (*path, key)
            yield from places(entry, (*path, key))


def damaged(path: tuple[str | int, ...], change: str) -> Any:
    document = small()
    holder: Any = document
    for key in path[:-1]:
        holder = holder[key]
    if change == "missing":
        del holder[path[-1]]
    elif change == "wrong type":
        holder[path[-1]] = {"not": "this"} if not isinstance(holder[path[-1]], dict) else ["not this"]
    else:
        holder[path[-1]]["extra"] = 1
    return document


FIELDS = [path for path in places(small()) if isinstance(path[-1], str)]
OBJECTS = [path for path in places(small()) if isinstance(path[-1], int) and len(path) <= 4] + [
    path
    for path in FIELDS
    if path[-1] in ("base", "reference", "unmerged", "distance", "loss", "library", "generation", "location")
]


def test_the_file_is_up_to_date() -> None:
    assert make_schema.TARGET.read_text(encoding="utf-8") == make_schema.render(), (
        "run python tools/make_schema.py"
    )


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_it_knows_every_field_of_every_class_and_demands_it() -> None:
    objects = {"Report": SCHEMA} | SCHEMA["$defs"]
    classes = [
        value
        for value in vars(model).values()
        if isinstance(value, type) and hasattr(value, "__dataclass_fields__")
    ]
    assert {cls.__name__ for cls in classes} == set(objects)
    for cls in classes:
        names = [field.name for field in fields(cls)]
        given = list(objects[cls.__name__]["properties"])
        assert given == (["schema", "verdict", *names] if cls is Report else names)
        assert objects[cls.__name__]["required"] == given
        assert objects[cls.__name__]["additionalProperties"] is False
        assert objects[cls.__name__]["description"]


def test_the_page_for_people_explains_every_field() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    objects = [SCHEMA, *SCHEMA["$defs"].values()]
    names = {name for entry in objects for name in entry["properties"]}
    assert {name for name in names if f"`{name}`" not in page and f"`{name}[]`" not in page} == set()


@pytest.mark.parametrize("name", SAMPLES)
def test_reports_are_valid(name: str) -> None:
    text = to_text(SAMPLES[name])
    VALIDATOR.validate(json.loads(text, parse_constant=pytest.fail))


def test_what_is_not_finite_is_null() -> None:
    document = json.loads(to_text(infinite()))
    assert set(document["steps"][0]["distance"].values()) == {None}
    assert document["steps"][0]["effect_present"] is None


def test_the_undamaged_document_is_valid_and_has_one_of_everything() -> None:
    assert VALIDATOR.is_valid(small())
    assert len(FIELDS) > 90 and len(OBJECTS) > 12


@pytest.mark.parametrize("change", ["missing", "wrong type"])
def test_a_field_that_is_missing_or_of_another_type_is_found(change: str) -> None:
    accepted = [path for path in FIELDS if VALIDATOR.is_valid(damaged(path, change))]
    assert accepted == []


def test_a_field_too_many_is_found() -> None:
    document = small()
    assert not VALIDATOR.is_valid(document | {"extra": 1})
    holders = [path for path in OBJECTS if isinstance(at(document, path), dict)]
    assert len(holders) > 10
    assert [path for path in holders if VALIDATOR.is_valid(damaged(path, "extra"))] == []


def at(document: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


@pytest.mark.parametrize(
    "path, value",
    [
        (("schema",), "ia3-export/report/2"), (("verdict",), "fine"), (("in_parity",), 1),
        (("in_parity",), "true"), (("steps", 0, "kind"), "gguf"), (("steps", 0, "gates", 0, "relation"), "<"),
        (("steps", 0, "passed"), None), (("steps", 0, "gates", 0, "value"), "inf"),
        (("sites", 0, "direction"), "both"), (("sites", 0, "size"), 1.5),
        (("steps", 0, "error_histogram", 0), [1]), (("steps", 0, "error_histogram", 0), [1, 2, 3]),
        (("steps", 0, "error_histogram", 0), [1, 2.5]), (("reference", "applied_by"), "magic"),
        (("warnings",), [1]), (("options",), {"seed": 1}), (("weights", 0, "changed"), None),
        (("base", "id"), None),
    ],
)  # fmt: skip
def test_a_value_that_no_report_has_is_found(path: tuple[str | int, ...], value: Any) -> None:
    document = copy.deepcopy(small())
    at(document, path[:-1])[path[-1]] = value
    assert not VALIDATOR.is_valid(document)
