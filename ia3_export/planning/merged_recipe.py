"""The recipe of a merge that was made before, as its manifest says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ia3_export.checkpoint.manifest import read_manifest
from ia3_export.errors import IA3ExportError, Refused
from ia3_export.planning.recipe import DEFAULT_RECIPE, Recipe
from ia3_export.quantization.base import Base
from ia3_export.words import TORCH_NAMES


def find_recipe(
    base: Base, merged: Base | None, adapters: int, said: Recipe | None, source: str
) -> tuple[Recipe, list[str]]:
    """The recipe by which `merged` was made, but for what the user `said`, and in words what was taken.

    It is the `recorded_recipe`; of what is said ``combine`` and ``weights`` count. People know the record as
    `source`. Raises `Refused` as `check_recorded`.
    """
    recipe = recorded_recipe(base, merged)
    if said is not None:
        return replace(recipe, combine=said.combine, weights=said.weights), []
    if recipe == DEFAULT_RECIPE:
        return recipe, []
    check_recorded(recipe, adapters)
    return recipe, [f"taken from {source}: {recipe.described}"]


def recorded_recipe(base: Base, merged: Base | None) -> Recipe:
    """The recipe in the manifest of `merged`; without one the default, with the dtype of its weights."""
    if merged is None:
        return DEFAULT_RECIPE
    recorded = _read(read_manifest(merged.stored.folder))
    if recorded is not None:
        return recorded
    if base.is_quantized:
        return Recipe(quantized="keep-or-dense" if merged.is_quantized else "dequantize")
    stored: Any = TORCH_NAMES.get(merged.stored.main_dtype)
    if merged.stored.main_dtype == base.stored.main_dtype or stored in (None, "float64"):
        return DEFAULT_RECIPE
    return Recipe(dtype=stored)


def _read(record: Mapping[str, Any]) -> Recipe | None:
    try:
        options = record["options"]
        weights = tuple(float(weight) for weight in options["weights"])
        return Recipe(
            combine=options["combine"],
            weights=weights,
            cast=options["cast"],
            dtype=options["dtype"],
            quantized=options.get("quantized", "dequantize"),
            allow_missing=bool(options.get("allow_missing")),
            allow_unused=bool(options.get("allow_unused")),
            tokenizer=options.get("tokenizer", "auto"),
        )
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError, IA3ExportError):
        return None


def check_recorded(recipe: Recipe, adapters: int) -> None:
    """Raise `Refused` for a recorded recipe by which an adapter counts for nothing: an artifact's excuse."""
    odd = recipe.combine != "product" and (adapters == 1 or 0.0 in recipe.weights)
    if odd or len(recipe.weights) not in (0, adapters):
        raise Refused(
            f"the manifest of the merged folder says {recipe.described}, for {adapters} adapters",
            hint="if that is what you merged, say so with --combine and --weights",
        )
