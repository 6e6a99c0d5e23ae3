"""Writes docs/report.schema.json from the dataclasses of the report.

A test fails when the file is out of date.

python tools/make_schema.py          writes it
python tools/make_schema.py --check  exits 1 when it would change
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ia3_export.report.model import SCHEMA, Report

TARGET = Path(__file__).parent.parent / "docs" / "report.schema.json"
VERDICTS = ("NOT in parity", "in parity")


def render() -> str:
    """The schema as text: what `Report.to_json` writes and nothing else."""
    made = TypeAdapter(Report).json_schema(mode="serialization")
    definitions = {name: _closed(_plain(content)) for name, content in made.pop("$defs").items()}
    report = _plain(made)
    report["properties"] = {
        "schema": {"const": SCHEMA},
        "verdict": {"description": "`in_parity` in words.", "enum": list(VERDICTS)},
        **report["properties"],
    }
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('/', ':')}",
        "title": "Report of ia3-export verify",
        **_closed(report),
        "$defs": definitions,
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly its properties: the JSON always has every field, defaults or not."""
    return schema | {"required": list(schema["properties"]), "additionalProperties": False}


def _plain(schema: Any) -> Any:
    """Without titles and defaults.

    Numbers may be null, because those that are not finite are written as null.
    """
    if isinstance(schema, list):
        return [_plain(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "number" or {"type": "number"} in schema.get("anyOf", ()):
        return {"type": ["number", "null"]}
    plain = {
        key: _plain(value) for key, value in schema.items() if key not in ("title", "default", "properties")
    }
    if "properties" in schema:
        plain["properties"] = {name: _plain(value) for name, value in schema["properties"].items()}
    if "description" in plain:
        plain["description"] = _markdown(plain["description"])
    return plain


def _markdown(docstring: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(docstring.split()))


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text(encoding="utf-8") != text and f"{TARGET} is out of date")
    TARGET.write_text(text, encoding="utf-8")
