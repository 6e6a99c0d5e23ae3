"""Writes docs/formats.md.

What every quantized format can do here, measured on the fixtures of its own writer.

    python tools/make_formats.py

Needs the development dependencies (PEFT, bitsandbytes, compressed-tensors, gguf).
tests/quantization/test_formats_page.py compares the page with the fixtures.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export import Recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "formats.md"
HEADER = (
    "fixture", "format", "dequantized against its library", "output vector", "feed-forward input vector",
    "logits of `keep`", "size", "reloads in",
)  # fmt: skip
MARK = "<!-- made by tools/make_formats.py from tests/fixtures/quantized: do not edit below -->"


def table(cases: list[str] | None = None) -> str:
    """The support matrix as Markdown."""
    from tests.support.quantized import CASES, GGUF_CASES

    lines = [f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER)]
    lines += [f"| {' | '.join(row(case))} |" for case in cases or [*CASES, *GGUF_CASES]]
    return "\n".join(lines) + "\n"


def row(case: str) -> tuple[str, ...]:
    """The cells of one fixture."""
    from ia3_export import merge
    from ia3_export.checkpoint.folder import read_checkpoint
    from ia3_export.quantization.detection import find_quantization
    from tests.support.quantized import (
        dense_model,
        logits,
        source_of,
        unmerged_logits,
        write_adapter,
    )

    source = source_of(case)
    base = read_checkpoint(source)
    quantization = find_quantization(base)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = write_adapter(Path(scratch) / "adapter", dict(base.config or {}))
        manifest = merge(
            source, [adapter], Path(scratch) / "out", recipe=Recipe(quantized="keep-or-dense")
        ).content
        sites = manifest["quantization"]["sites"]
        output = next(Path(scratch, "out").glob("*.gguf"), Path(scratch, "out"))
        found, wanted = logits(dense_model(output)), unmerged_logits(source, adapter)
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        size = (
            sum(p.stat().st_size for p in Path(scratch, "out").glob("*.safetensors")) or output.stat().st_size
        )
        before = sum(shard.path.stat().st_size for shard in base.shards)
    formats = " + ".join(sorted(name.split(", version")[0] for name in quantization.formats))
    return (
        f"`{case}`",
        formats,
        _exactness(case, quantization),
        _cell(sites, "(output)"),
        _cell(sites, "(input)"),
        f"{error:.1e}",
        f"{size / before:.3f}",
        _reload(manifest.get("reload") or {}),
    )


def _exactness(case: str, quantization: Any) -> str:
    from tests.support.quantized import dequantized, expected_weights

    worst = 0.0
    for name, wanted in expected_weights(case).items():
        found = dequantized(case, quantization, name)
        worst = max(worst, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
    return "bit-equal" if worst == 0 else f"{worst:.0e}"


def _cell(sites: list[dict[str, Any]], direction: str) -> str:
    found = [site for site in sites if any(fold.endswith(direction) for fold in site["folds"])]
    if not found:
        return "not quantized here"
    worst = max(found, key=lambda site: ("exact", "rounded", "moved", "dense").index(site["outcome"]))
    if worst["outcome"] == "dense":
        why = worst["reason"].split(", and the vector cannot move: ")[-1]
        return f"dense: {why.split(', cannot take the vector: ')[-1]}"
    rounding = max(site["rounding"] for site in found)
    kind = "exact" if rounding < 2e-7 else f"scales rounded, {rounding:.0e}"
    return f"moved to the rows that feed it, {kind}" if worst["outcome"] == "moved" else kind


def _reload(reload: dict[str, Any]) -> str:
    return reload.get("library") or f"not tried: {reload.get('skipped', '').partition(':')[0]}"


def main() -> None:
    """Rewrite the table of the page."""
    warnings.simplefilter("ignore")
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{text}{MARK}\n\n{table()}", encoding="utf-8")


def shape_of(text: str) -> Iterator[list[str]]:
    """The rows of a page without its numbers, which differ between machines."""
    import re

    for line in text.partition(MARK)[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == len(HEADER) and cells[0].strip("` ") not in ("fixture", "---"):
            kept = cells[:5] + cells[7:]
            yield [kept[0], *(re.sub(r"\d+(\.\d+)*(e-\d+)?", "#", cell) for cell in kept[1:])]


if __name__ == "__main__":
    main()
