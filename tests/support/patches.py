"""Small folders to patch, without a model: safetensors written by their own library."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.commands.patch import patch
from tests.e2e.command import merge
from tests.support import zoo


def write_pair(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """A base and what a merge could make of it: vectors on rows and columns, a card moved, a file more, one
    less, and one in a folder of its own that stays."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    weights = {
        name: random.standard_normal((64, 48)).astype("<f4") for name in ("key", "value", "down", "head")
    }
    base, merged = folder / "base", folder / "merged"
    for place in (base, merged):
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "kept.bin").write_bytes(bytes(range(256)) * 16)
        (place / "config.json").write_text("{}")
    save_file(weights, base / "model.safetensors")
    weights["key"] *= random.standard_normal((64, 1)).astype("<f4")
    weights["down"] *= random.standard_normal((1, 48)).astype("<f4")
    save_file(weights, merged / "model.safetensors")
    (base / "README.md").write_text("# the base\n" * 20)
    (base / "gone.txt").write_text("gone\n" * 9)
    (merged / "README.base.md").write_text("# the base\n" * 20)
    (base / "old-name.txt").write_text("moved\n" * 9)
    (merged / "new-name.txt").write_text("moved\n" * 9)
    (merged / "README.md").write_text("# merged\n")
    (merged / "new.json").write_text('{"new": 1}')
    return base, merged


def write_merge(folder: Path, name: str, dtype: str) -> tuple[Path, Path]:
    """A base of a kind of the zoo in `dtype`, and an adapter merged into it by the command line."""
    kind, base, merged = zoo.by_name(name), folder / "base", folder / "merged"
    zoo.build(kind, dtype=dtype).save_pretrained(base)
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(folder / "adapter")
    merge(base, folder / "adapter", merged, "--quiet")
    return base, merged


def write_patch(folder: Path, *, seed: int = 0) -> tuple[Path, Path, Path]:
    """`write_pair`, and the patch from the one to the other."""
    base, merged = write_pair(folder, seed=seed)
    made = patch(base, merged, folder / "task.ia3patch")
    return base, merged, made.path


def edit_patch(path: Path, edit: Any) -> None:
    """Write the patch `path` again with a document that `edit` has changed; its data stay."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    document = json.loads(header["__metadata__"]["ia3-export"])
    edit(document)
    changed = json.dumps(document)
    header["__metadata__"] = {
        "ia3-export": changed,
        "ia3-export-sha256": hashlib.sha256(changed.encode()).hexdigest(),
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
