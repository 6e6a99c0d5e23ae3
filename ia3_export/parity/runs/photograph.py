"""A photograph, as a model of pictures is given one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

PHOTOGRAPH = "parts of a photograph"


def photographs(batch: int, shape: tuple[int, ...]) -> Any | None:
    """Parts of the portrait of Grace Hopper that matplotlib ships (a picture of the U.S. Navy), float32
    (batch, *shape) from -1 to 1; None without matplotlib, or where `shape` does not end in three colours,
    height and width.
    """
    import torch

    if shape[-3:-2] != (3,) or find_spec("matplotlib") is None:
        return None
    import matplotlib
    import numpy as np
    from PIL import Image

    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not file.is_file():  # some distributions leave samples out
        return None
    with Image.open(file) as picture:
        side = min(picture.size) * 3 // 4
        right, low = (length - side for length in picture.size)
        parts = []
        for i in range(batch):
            left, top = right * i // max(1, batch - 1), low * i // max(1, batch - 1)
            part = picture.convert("RGB").crop((left, top, left + side, top + side))
            parts.append(np.asarray(part.resize((shape[-1], shape[-2])), np.float32))
    pixels = torch.from_numpy(np.stack(parts)).movedim(-1, 1) / 127.5 - 1
    return pixels.view(batch, *[1] * (len(shape) - 3), *shape[-3:]).expand(batch, *shape).contiguous()
