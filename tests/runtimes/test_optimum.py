"""optimum's ORTModel classes, in their own environment, answer from exported folders as unmerged models."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.command import run
from tests.runtimes.models import NEW_TOKENS, RECIPES, Exported

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("optimum_runner.py")
#: Further forms of an encoder-decoder's decoder, as they are exported with --decoder.
FORMS = ("separate", "if")


def _python() -> Path:
    """The interpreter beside optimum-onnx, which cannot live beside the transformers of this project."""
    python = Path(os.environ.get("IA3_EXPORT_OPTIMUM_PYTHON", ROOT / ".venv-optimum" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"{python} is not there; set IA3_EXPORT_OPTIMUM_PYTHON to a python with optimum-onnx")
    return python


@pytest.fixture(scope="session")
def answers(exported: Callable[[str], Exported], runtimes_folder: Path) -> dict[str, Any]:
    """Every answer of every model, from one process: its imports take longer than all models together."""
    from filelock import FileLock

    python, file = _python(), runtimes_folder / "optimum.json"
    with FileLock(f"{file}.lock"):  # for all workers of pytest-xdist
        if not file.exists():
            file.write_text(_ask(python, exported, runtimes_folder))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _ask(python: Path, exported: Callable[[str], Exported], folder: Path) -> str:
    models = {name: exported(name) for name in RECIPES}
    requests = [_request(name, model, model.folder) for name, model in models.items()]
    t5 = models["t5"]
    for form in FORMS:
        output = folder / f"t5-{form}"
        ran = run(
            "onnx",
            "--base",
            t5.base,
            "--adapter",
            t5.adapter,
            "--output",
            output,
            "--task",
            t5.task,
            "--decoder",
            form,
            "--no-verify",
        )
        assert ran.code == 0, ran
        requests.append(_request(f"t5-{form}", t5, output))
    done = subprocess.run(
        [python, RUNNER],
        input=json.dumps({"models": requests, "new_tokens": NEW_TOKENS}),
        text=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _request(name: str, model: Exported, folder: Path) -> dict[str, Any]:
    """What the runner needs of one model.

    Its inputs as the preprocessing of the exported folder makes them.
    """
    from transformers import AutoFeatureExtractor, AutoTokenizer

    request = {"name": name, "task": model.task, "folder": str(folder)}
    if "image" in model.task:
        # what the folder's image processor does, which needs packages that nothing else here does
        rows = [(np.array(given).transpose(2, 0, 1) / 255 - 0.5) / 0.5 for given in model.inputs]
        return request | {"inputs": [{"pixel_values": [row.tolist()]} for row in rows]}
    if "speech" in model.task:
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        features = [extractor(given, sampling_rate=16000)["input_features"] for given in model.inputs]
        return request | {"inputs": [{"input_features": np.array(one).tolist()} for one in features]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [tokenizer(*([given] if isinstance(given, str) else given)) for given in model.inputs]
    inputs = [{key: [value] for key, value in one.items()} for one in encoded]
    return request | {"inputs": inputs, "mask_token": tokenizer.mask_token_id}


@pytest.mark.parametrize("name", [*RECIPES, *(f"t5-{form}" for form in FORMS)])
def test_ort_models_answer_like_the_live_adapter(
    answers: dict[str, Any], exported: Callable[[str], Exported], name: str
) -> None:
    got, model = answers[name], exported(name.partition("-")[0])
    assert "error" not in got, got
    if "generation" in model.task or "speech" in model.task:
        assert got == list(model.expected)
        return
    for one, expected in zip(got, model.expected, strict=True):
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(one, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
