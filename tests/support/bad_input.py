"""Copies of a base and an adapter that a test damages, and the refusal that must follow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.command import Ran, contents, only_complaint, run

K_PROJ = "model.layers.0.self_attn.k_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Case:
    """Copies of a base and an adapter in a folder of their own."""

    folder: Path
    run: Callable[..., Ran] = run

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def output(self) -> Path:
        return self.folder / "merged"

    @property
    def vectors(self) -> Path:
        """The adapter's weight file."""
        return self.adapter / "adapter_model.safetensors"

    def shard_of(self, tensor: str) -> Path:
        """The shard that the index names for `tensor`."""
        index = json.loads((self.base / "model.safetensors.index.json").read_text())
        return self.base / str(index["weight_map"][tensor])

    def merge(self, *more: str | Path, base: Path | None = None, output: Path | None = None) -> Ran:
        return self.run(
            "merge",
            "--base",
            base or self.base,
            "--adapter",
            self.adapter,
            "--output",
            output or self.output,
            *more,
        )

    def refuses(self, code: int, *mentions: str, args: tuple[str | Path, ...] = (), **paths: Path) -> None:
        """Assert that a merge fails as it should and leaves everything as it was."""
        before = contents(self.folder)
        only_complaint(self.merge(*args, **paths), code, *mentions)
        assert contents(self.folder) == before


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Load a safetensors file, change its table of tensors, and save it again, with the library."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def rename_keys(case: Case, old: str, new: str) -> None:
    """Replace `old` by `new` in every key of the adapter."""
    rewrite(
        case.vectors, lambda tensors: {name.replace(old, new, 1): value for name, value in tensors.items()}
    )


def set_vector(case: Case, module: str, element: int, value: float) -> None:
    """Overwrite one element of a vector."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors[f"base_model.model.{module}.ia3_l"].view(-1)[element] = value
        return tensors

    rewrite(case.vectors, change)


def drop_vector(case: Case) -> None:
    """Take the vector of `K_PROJ` out of the adapter."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        del tensors[f"base_model.model.{K_PROJ}.ia3_l"]
        return tensors

    rewrite(case.vectors, change)


class Malicious:
    """Runs a command when it is unpickled by a reader that lets it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)
