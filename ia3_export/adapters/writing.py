"""Writes an adapter in PEFT's layout, for PEFT 0.4 and later.

``adapter_config.json`` has only fields that every version knows; ``target_modules`` are whole module paths,
which match a module of that path and one whose path ends in it after a dot (``check_target_module_exists``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3_export.adapters.model import Pattern, Site, TargetRules
from ia3_export.checkpoint.folder import ADAPTER_CONFIG
from ia3_export.checkpoint.header import StoredTensor, read_bytes, write_header
from ia3_export.checkpoint.wrapped import PEFT_PREFIX
from ia3_export.fold import from_float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFacts:
    """The task, base, class and copied modules that ``adapter_config.json`` states beside those with vectors.

    `class_name` is a class of transformers, `to_save` are the modules of which a copy is trained.
    """

    task_type: str | None = None
    base_model: str | None = None
    class_name: str | None = None
    to_save: Collection[str] = ()


def write_peft(
    folder: Path,
    sites: Iterable[Site],
    extras: Mapping[str, StoredTensor],
    rules: TargetRules | None,
    facts: ConfigFacts,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into `folder`.

    `rules` say the target modules, and unless None the feed-forward ones, instead of lists of `sites`.
    Vectors keep their dtype and become (n, 1), (1, n) or (1, n, 1, 1[, 1]). At most one site a module. The
    same input gives the same bytes.
    """
    ordered = sorted(sites, key=lambda site: site.module)
    config: dict[str, Any] = {
        "auto_mapping": {"base_model_class": facts.class_name, "parent_library": "transformers"}
        if facts.class_name
        else None,
        "base_model_name_or_path": facts.base_model,
        "feedforward_modules": _feedforward(ordered)
        if rules is None or rules.feedforward is None
        else _plain(rules.feedforward),
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": sorted(facts.to_save) or None,
        "peft_type": "IA3",
        "revision": None,
        "target_modules": [site.module for site in ordered] if rules is None else _plain(rules.target),
        "task_type": facts.task_type,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    entries: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        f"{PEFT_PREFIX}{site.module}.ia3_l": (
            site.dtype,
            peft_shape(site),
            from_float(site.vector.copy(), site.dtype).tobytes(),
        )
        for site in ordered
    }
    scaled = {site.module for site in ordered}
    for name, tensor in extras.items():
        module, _, leaf = name.rpartition(".")
        place = f"{module}.base_layer.{leaf}" if module in scaled else name  # PEFT's layer wraps the module
        entries[PEFT_PREFIX + place] = tensor.dtype, tensor.shape, read_bytes(tensor)
    header, starts = write_header(
        [(name, dtype, shape) for name, (dtype, shape, _) in entries.items()], {"format": "pt"}
    )
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(header)
        for name in sorted(starts, key=starts.__getitem__):
            file.write(entries[name][2])


def peft_shape(site: Site) -> tuple[int, ...]:
    """The shape in which PEFT stores the vector; one of an unknown kind of module counts as Linear's."""
    if len(site.shape) > 1:
        return site.shape
    return (len(site.vector), 1) if site.direction == "out" else (1, len(site.vector))


def _plain(pattern: Pattern) -> list[str] | str:
    return pattern if isinstance(pattern, str) else sorted(pattern or ())


def _feedforward(sites: Sequence[Site]) -> list[str] | str:
    """The modules whose input is scaled, as a list.

    An expression where PEFT would find the end of another path in a list.
    """
    inputs = [site.module for site in sites if site.direction == "in"]
    outputs = [site.module for site in sites if site.direction == "out"]
    if any(output.endswith(tuple(inputs)) for output in outputs if inputs):
        return "|".join(re.escape(module) for module in inputs)
    return inputs
