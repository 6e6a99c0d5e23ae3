"""Sentence-transformers models: the pooling and normalisation that follow the encoder, as its modules.json
says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3_export.errors import DamagedFile, Refused, Unsupported

#: By the names that sentence-transformers 5 writes, with the flag of earlier versions.
_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True, slots=True)
class SentenceHead:
    """``modes`` of pooling (several are concatenated), then `normalize` to length 1."""

    modes: tuple[str, ...]
    normalize: bool

    def __call__(self, hidden: Any, mask: Any) -> Any:
        """Sentence embeddings (batch, modes x width) of hidden states (batch, length, width), `mask` (batch,
        length)."""
        import torch

        pooled = torch.cat([_pool(mode, hidden, mask) for mode in self.modes], dim=-1)
        return torch.nn.functional.normalize(pooled, p=2.0, dim=1) if self.normalize else pooled


def read_sentence_head(folder: Path) -> SentenceHead | None:
    """The head of the sentence-transformers model in `folder` (``modules.json``); None if it is none.

    Raises `DamagedFile`, and `Unsupported` for modules other than Transformer, Pooling and Normalize.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return None
    modes: tuple[str, ...] = ()
    normalize = False
    for module in _read(file, list):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1] if isinstance(module, dict) else "?"
        if kind == "Pooling":
            file_of_modes = folder / str(module.get("path", "")) / "config.json"
            if not file_of_modes.resolve().is_relative_to(folder.resolve()):
                raise Refused(
                    f"{file} names {file_of_modes}, which lies outside its folder",
                    hint="do not use this model",
                )
            modes = _read_modes(file_of_modes)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise Unsupported(
                f"{file}: the module {kind} is not exported",
                hint="--task feature-extraction exports the encoder without what follows it",
            )
    if not modes:
        raise Unsupported(
            f"{file} names no pooling", hint="--task feature-extraction exports the encoder alone"
        )
    return SentenceHead(modes, normalize)


def _read_modes(file: Path) -> tuple[str, ...]:
    config = _read(file, dict)
    named = config.get("pooling_mode")
    if named is None:
        found = [mode for mode, flag in _MODES.items() if config.get(flag) is True]
    else:
        found = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    unknown = [mode for mode in found if mode not in _MODES]
    if unknown or not found:
        raise Unsupported(
            f"{file}: pooling {', '.join(unknown) or 'without a mode'} is not exported",
            hint=f"there are {', '.join(_MODES)}; --task feature-extraction exports the encoder alone",
        )
    return tuple(found)


def _read(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{file} is not readable: {error}", hint="fetch the model again") from None
    if not isinstance(value, kind):
        raise DamagedFile(f"{file} is no JSON {kind.__name__}", hint="fetch the model again")
    return value


def _pool(mode: str, hidden: Any, mask: Any) -> Any:
    """As sentence-transformers' ``Pooling`` computes it (6.2: weights of ``weightedmean`` begin at the first
    token that is no padding)."""
    import torch

    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    # the first attended token has the largest place counted from the end, the last one counted from the start
    first, last = (mask * places.flip(0)).argmax(dim=1), (mask * places).argmax(dim=1)
    if mode in ("cls", "lasttoken"):
        at = last if mode == "lasttoken" else first
        return hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if mode == "max":
        return hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).max(dim=1).values
    if mode == "weightedmean":
        weights = weights * (places - first[:, None]).to(hidden.dtype)[..., None]
    total, count = (hidden * weights).sum(dim=1), weights.sum(dim=1).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)
