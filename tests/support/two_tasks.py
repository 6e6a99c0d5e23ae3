"""A base with two adapters of it, and inputs for a decoder's graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tests.support import zoo
from tests.support.exported import KINDS


def written(name: str, folder: Path) -> tuple[Path, tuple[Path, Path]]:
    """A base and two adapters of a kind of the zoo; the second has fewer targets."""
    kind = KINDS.get(name) or zoo.by_name(name)
    zoo.build(kind).save_pretrained(folder / "base")
    fewer = replace(kind, targets=("k_proj",), feedforward=()) if name == "llama" else kind
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(folder / "one")
    zoo.adapt(zoo.build(kind), fewer, seed=2).save_pretrained(folder / "two")
    return folder / "base", (folder / "one", folder / "two")


def inputs(path: Path) -> dict[str, Any]:
    """Some tokens for a decoder's graph, and an empty cache."""
    ids = np.arange(1, 13).reshape(2, 6)
    positions = np.tile(np.arange(6), (2, 1))
    values: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": positions,
    }
    for port in onnxruntime.InferenceSession(path).get_inputs():
        if port.name.startswith("past"):
            sizes = {"batch_size": 2}
            shape = [axis if isinstance(axis, int) else sizes.get(axis, 0) for axis in port.shape]
            values[port.name] = np.zeros(shape, "<f4")
    return values
