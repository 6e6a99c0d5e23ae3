"""Recorded speech, as a model of sounds is given it."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

SPEECH = "recorded speech"
#: What alsa-utils, a package of every Linux distribution, tests loudspeakers with: a voice that names each.
_RECORDINGS = Path("/usr/share/sounds/alsa")
#: Samples a second that models of speech are made for.
_RATE = 16_000


def speech(name: str, batch: int, shape: tuple[int, ...]) -> Any | None:
    """Speech for the argument `name` of a model, float32 (batch, *shape), another part in each row:
    ``input_values`` (samples,) of mean 0 and variance 1, or log-mel features (mels, frames) as Whisper takes
    them and (frames, mels) as the Audio Spectrogram Transformer does.

    None without recordings, and for shapes that the feature extractors do not make.
    """
    import torch
    import transformers

    words = [sound for file in sorted(_RECORDINGS.glob("*_*.wav")) if (sound := _read(file)) is not None]
    if not words:
        return None
    rows = [torch.cat([*words[i % len(words) :], *words[: i % len(words)]]) for i in range(batch)]
    if name == "input_values" and len(shape) == 1:
        cut = torch.stack([row.repeat(-(-shape[0] // len(row)))[: shape[0]] for row in rows])
        return (cut - cut.mean(1, keepdim=True)) / cut.std(1, keepdim=True)
    if name == "input_features":
        extractor = transformers.WhisperFeatureExtractor(feature_size=shape[0])
    else:
        extractor = transformers.ASTFeatureExtractor(num_mel_bins=shape[1], max_length=shape[0])
    arrays = [row.numpy() for row in rows]
    features = extractor(arrays, sampling_rate=_RATE, return_tensors="pt")[name]
    cut = features[..., : shape[1]]
    return cut.contiguous() if tuple(cut.shape[1:]) == shape else None


def _read(file: Path) -> Any | None:
    """The first channel of a recording in 16 bits, from -1 to 1 at `_RATE`, without the silence before it;
    None for other kinds of file."""
    import numpy as np
    import torch

    try:
        with wave.open(str(file)) as opened:
            rate, width, channels = opened.getframerate(), opened.getsampwidth(), opened.getnchannels()
            raw = opened.readframes(opened.getnframes())
    except (OSError, EOFError, wave.Error):
        return None
    if width != 2 or rate % _RATE:
        return None
    frames = np.frombuffer(raw, "<i2")[::channels]
    if not frames.any():
        return None
    each = rate // _RATE
    sound = frames[: len(frames) // each * each].reshape(-1, each).mean(1) / 2.0**15
    begins = int(np.argmax(np.abs(sound) > 0.05 * np.abs(sound).max()))
    return torch.from_numpy(sound[begins:].astype(np.float32))
