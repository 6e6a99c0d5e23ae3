"""Models of sounds hear speech where there is any, prepared as their own processors prepare it."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import transformers

from ia3_export.parity.runs import speech as module
from ia3_export.parity.runs.inputs import make_cases
from ia3_export.parity.runs.speech import SPEECH, speech
from tests.support import zoo


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hums at 48 kHz behind silence, and a file that is no recording."""
    for name, pitch in (("A_B", 200), ("C_D", 300)):
        hum = np.sin(np.arange(24_000) * 2 * np.pi * pitch / 48_000) * 20_000
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(48_000)
            file.writeframes(np.concatenate([np.zeros(4_800), hum]).astype("<i2").tobytes())
    (tmp_path / "E_F.wav").write_bytes(b"RIFF")
    with wave.open(str(tmp_path / "G_H.wav"), "wb") as silent:
        silent.setparams((1, 2, 48_000, 0, "NONE", ""))
    monkeypatch.setattr(module, "_RECORDINGS", tmp_path)
    return tmp_path


def test_raw_sound_is_what_the_processor_makes_of_it(recordings: Path) -> None:
    found = speech("input_values", 2, (4000,))
    assert found is not None
    time = (np.arange(12_000) + 1 / 3) / 16_000  # each of three samples in one
    for row, pitch in zip(found.numpy(), (200, 300), strict=True):
        sound = np.sin(2 * np.pi * pitch * time)
        begins = int(np.argmax(np.abs(sound) > 0.05))
        processor = transformers.Wav2Vec2FeatureExtractor()
        wanted = processor(sound[begins : begins + 4000], sampling_rate=16_000).input_values[0]
        assert np.abs(row - wanted).max() < 0.05


@pytest.mark.parametrize(
    ("name", "shape"), [("input_features", (16, 528)), ("input_values", (64, 32))], ids=["whisper", "ast"]
)
def test_features_have_the_shape_that_the_model_takes(
    recordings: Path, name: str, shape: tuple[int, int]
) -> None:
    found = speech(name, 2, shape)
    assert found is not None and found.shape == (2, *shape)
    assert not np.array_equal(found[0], found[1])


def test_what_no_extractor_makes_is_left_to_noise(recordings: Path) -> None:
    assert speech("input_features", 1, (16, 4000)) is None
    for file in recordings.glob("*.wav"):
        file.unlink()
    assert speech("input_values", 1, (4000,)) is None


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_models_of_sounds_hear_a_voice(name: str) -> None:
    if not module._RECORDINGS.is_dir():
        pytest.skip("alsa-utils, whose recordings are heard, is not installed")
    assert {case.origin for case in make_cases(zoo.build(zoo.by_name(name)))} == {SPEECH}
