"""Reading and comparing checkpoints in tests, with the safetensors library rather than our own reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files in `folder`."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )
