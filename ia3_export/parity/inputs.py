"""Seeded inputs for a forward, made from the model's own configuration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ia3_export.errors import Unsupported

_SHAPES = ((1, 8), (3, 17), (2, 5))


@dataclass(frozen=True, slots=True)
class Case:
    """One forward call: a name such as ``batch 3, length 17, padded`` and its keyword arguments (torch tensors)."""

    name: str
    tensors: dict[str, Any]


def make_cases(model: Any, *, seed: int = 0) -> list[Case]:
    """Inputs of several batch sizes and lengths, with and without padding, for `model`.

    Texts are random token ids, images and sounds normal noise; the same seed gives the same inputs.
    Raises `Unsupported` for models whose main input is none of these.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    name = model.main_input_name
    config = model.config
    if name == "input_ids":
        texts = (_text_case(model, batch, length, generator) for batch, length in _SHAPES)
        return [case for case in texts if case is not None]
    if name == "pixel_values":
        shape = _image_shape(config)
        return [
            Case(
                f"batch {batch}, image {'x'.join(map(str, shape))}",
                {name: torch.randn(batch, *shape, generator=generator)},
            )
            for batch in (1, 2)
        ]
    if name in ("input_features", "input_values"):
        shape = _sound_shape(config, name)
        cases = []
        for batch in (1, 2):
            tensors = {name: torch.randn(batch, *shape, generator=generator)}
            if config.is_encoder_decoder:
                tensors["decoder_input_ids"] = _ids(config.vocab_size, batch, 6, generator)
            cases.append(Case(f"batch {batch}, sound {'x'.join(map(str, shape))}", tensors))
        return cases
    raise Unsupported(
        f"{type(model).__name__} takes {name}, for which this version makes no inputs",
        hint="text, image and sound models can be verified",
    )


def _text_case(model: Any, batch: int, length: int, generator: Any) -> Case | None:
    import torch

    config = model.config
    text = config.get_text_config()
    if batch > 1 and getattr(text, "pad_token_id", None) is None and hasattr(model, "score"):
        return None  # decoders with a classification head need a padding token to find the last one
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or length
    length = max(2, min(length, int(longest) - 4))
    tensors = {"input_ids": _ids(text.vocab_size, batch, length, generator)}
    tensors["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
    padded = batch > 1
    if padded:
        pad = getattr(text, "pad_token_id", None) or 0
        tensors["attention_mask"][-1, -(length // 3) :] = 0
        tensors["input_ids"][-1, -(length // 3) :] = pad
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted and config.is_encoder_decoder:
        tensors["decoder_input_ids"] = _ids(text.vocab_size, batch, max(2, length // 2), generator)
    if "pixel_values" in accepted and getattr(config, "vision_config", None) is not None:
        tensors["pixel_values"] = torch.randn(batch, *_image_shape(config.vision_config), generator=generator)
    return Case(f"batch {batch}, length {length}" + (", padded" if padded else ""), tensors)


def _ids(vocabulary: int, batch: int, length: int, generator: Any) -> Any:
    import torch

    low = min(3, vocabulary - 1)  # the first ids are special tokens nearly everywhere
    return torch.randint(low, vocabulary, (batch, length), generator=generator)


def _image_shape(config: Any) -> tuple[int, ...]:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(config, "num_channels", 3)
    frames = getattr(config, "num_frames", None)
    return (channels, height, width) if frames is None else (frames, channels, height, width)


def _sound_shape(config: Any, name: str) -> tuple[int, ...]:
    if name == "input_features":
        return (config.num_mel_bins, 2 * config.max_source_positions)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return (config.max_length, config.num_mel_bins)
    return (4000,)
