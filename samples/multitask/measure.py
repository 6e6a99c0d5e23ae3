"""Four forms of three tasks side by side: bytes, latency, time to switch, right answers. One table.

    cd samples/multitask/run
    python ../measure.py

Prints it and writes it to table.md. One thread, one text at a time, the forms in turns. Exit code 1 when a
float32 form does not give the answer of the unmerged adapter to every test message.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from intent import HERE, TASKS, load
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import ia3_export

HEAD = (
    "form",
    "precision",
    "bytes for 3 tasks",
    "per further task",
    "ms a text",
    "x folded",
    "switch ms",
    *TASKS,
)
INT8 = "model_int8.onnx"
ROUNDS, SWITCHES = 12, 5

Feeds = dict[str, np.ndarray]
#: Logits of a text, given its inputs.
Ask = Callable[[Feeds], np.ndarray]


@dataclass(frozen=True)
class Tests:
    """The test messages of a task: their inputs, and which label is right."""

    labels: list[str]
    feeds: list[Feeds]
    right: list[int]


@dataclass(frozen=True)
class Form:
    """One way to have three tasks: its files, what one more would add, and `switch`, which makes it ready for
    a task and returns how to ask."""

    name: str
    precision: str
    nbytes: int
    further: int
    switch: Callable[[str], Ask]


def read_tests(work: Path, task: str) -> Tests:
    """The test messages of a task, each by itself: without padding."""
    tokenizer = Tokenizer.from_file(str(work / "base" / "tokenizer.json"))
    tokenizer.no_padding()
    labels = json.loads((work / "adapters" / task / "labels.json").read_text(encoding="utf-8"))
    lines = (HERE / "data" / f"{task}_test.jsonl").read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line) for line in lines]
    feeds = []
    for message in messages:
        found = tokenizer.encode(message["text"])
        names = {"input_ids": found.ids, "attention_mask": found.attention_mask}
        names["token_type_ids"] = found.type_ids
        feeds.append({name: np.array([values]) for name, values in names.items()})
    return Tests(labels, feeds, [labels.index(message["label"]) for message in messages])


def open_session(path: Path) -> Any:
    """A graph in ONNX Runtime, in one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = (
        3  # it warns that inputs with defaults are not constants: that is their point
    )
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sessions(file: Callable[[str], Path]) -> Callable[[str], Ask]:
    """The switch to a graph of its own for each task: open its `file`."""

    def switch(task: str) -> Ask:
        session = open_session(file(task))
        return lambda feeds: session.run(["logits"], feeds)[0]

    return switch


def swapping(graph: Path, adapters: Path) -> Callable[[str], Ask]:
    """The switch to another adapter file: load it, and name it in the options of a run."""
    session = open_session(graph)
    active: list[Any] = []

    def switch(task: str) -> Ask:
        adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(str(adapters / f"{task}.onnx_adapter"))
        options.add_active_adapter(adapter)
        active[:] = [adapter]  # the options know it, but do not keep it
        return lambda feeds: session.run(["logits"], feeds, options)[0]

    return switch


def looking_up(graph: Path, rows: dict[str, int]) -> Callable[[str], Ask]:
    """The switch to another row of the tables: another number."""
    session = open_session(graph)

    def switch(task: str) -> Ask:
        row = np.array([rows[task]])
        return lambda feeds: session.run(["logits"], {**feeds, "task": row})[0]

    return switch


def patching(work: Path) -> Callable[[str], Ask]:
    """The switch of files in place: take one patch back, put the next one on, open the file."""
    folder = work / "device" / "model"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(work / "onnx" / "base", folder)
    on: list[str] = []

    def switch(task: str) -> Ask:
        if on:
            ia3_export.revert(folder)
        ia3_export.apply(work / f"{task}.ia3patch", folder)
        on[:] = [task]
        session = open_session(folder / "onnx" / "model.onnx")
        return lambda feeds: session.run(["logits"], feeds)[0]

    return switch


def make_forms(work: Path) -> list[Form]:
    """All forms that run.py makes."""

    def size(*files: Path) -> int:
        return sum(file.stat().st_size for file in files)

    folded = {"fp32": lambda task: work / "onnx" / task / "onnx" / "model.onnx"}
    folded["int8"] = lambda task: work / "int8" / task / "onnx" / INT8
    forms = [
        Form("folded", precision, size(*map(file, TASKS)), size(file(TASKS[0])), sessions(file))
        for precision, file in folded.items()
    ]
    adapters = [work / "swap" / "adapters" / f"{task}.onnx_adapter" for task in TASKS]
    for precision, name in (("fp32", "model.onnx"), ("int8", INT8)):
        graph = work / "swap" / "onnx" / name
        switch = swapping(graph, adapters[0].parent)
        forms.append(Form("swap", precision, size(graph, *adapters), size(adapters[0]), switch))
    manifest = json.loads((work / "table" / "ia3_export.json").read_text(encoding="utf-8"))
    rows = {task: row["row"] for task, row in manifest["tasks"]["adapters"].items()}
    # a row holds what the adapter holds, in float32 in either precision
    values = load_file(work / "adapters" / TASKS[0] / "adapter_model.safetensors")
    row_size = sum(value.nbytes for value in values.values())
    for precision, name in (("fp32", "model.onnx"), ("int8", INT8)):
        graph = work / "table" / "onnx" / name
        forms.append(Form("task table", precision, size(graph), row_size, looking_up(graph, rows)))
    patches = [work / f"{task}.ia3patch" for task in TASKS]
    base = work / "onnx" / "base" / "onnx" / "model.onnx"
    forms.append(Form("patches", "fp32", size(base, *patches), size(patches[0]), patching(work)))
    return forms


def ask_unmerged(work: Path, tests: dict[str, Tests]) -> dict[str, list[int]]:
    """The answers of the base with each adapter live on it, as PEFT computes them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    load("train").quiet_libraries()
    answers = {}
    for task, asked in tests.items():
        base = AutoModelForSequenceClassification.from_pretrained(work / "base", num_labels=len(asked.labels))
        model = PeftModel.from_pretrained(base, work / "adapters" / task).eval()
        with torch.inference_mode():
            logits = [
                model(**{k: torch.from_numpy(v) for k, v in feeds.items()}).logits for feeds in asked.feeds
            ]
        answers[task] = [int(row.argmax()) for row in logits]
    return answers


def time_texts(forms: Sequence[Form], tests: Tests) -> list[list[float]]:
    """Seconds of each text in each form. The forms take turns in random order: what one finds in the
    processor's caches depends on which ran before."""
    asks = [form.switch(TASKS[0]) for form in forms]
    for ask in asks:
        ask(tests.feeds[0])
    taken: list[list[float]] = [[] for _ in forms]
    chance = random.Random(0)
    for feeds in tests.feeds * ROUNDS:
        for form in chance.sample(range(len(forms)), len(forms)):
            start = time.perf_counter()
            asks[form](feeds)
            taken[form].append(time.perf_counter() - start)
    return taken


def time_switch(form: Form) -> float:
    """The median of the seconds from one task to the next one, ready to be asked."""
    taken = []
    form.switch(TASKS[-1])
    for number in range(SWITCHES):
        start = time.perf_counter()
        form.switch(TASKS[number % len(TASKS)])
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure(
    forms: Sequence[Form], tests: dict[str, Tests], unmerged: dict[str, list[int]]
) -> list[tuple[str, ...]]:
    """The rows of the table. Ends the program if a float32 form does not answer as the unmerged adapter."""
    first = tests[TASKS[0]]
    times = time_texts(forms, first)
    folded = {
        form.precision: taken for form, taken in zip(forms, times, strict=True) if form.name == "folded"
    }
    rows = []
    for form, taken in zip(forms, times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(taken, folded[form.precision], strict=True))
        right = []
        for task, asked in tests.items():
            ask = form.switch(task)
            answers = [int(ask(feeds).argmax()) for feeds in asked.feeds]
            if form.precision == "fp32" and answers != unmerged[task]:
                sys.exit(f"error: {form.name} does not answer {task} as the unmerged adapter does")
            right.append(share(answers, asked))
        cells = (f"{form.nbytes:,}", f"{form.further:,}", f"{1000 * statistics.median(taken):.2f}")
        switch = f"{1000 * time_switch(form):.2f}"
        rows.append((form.name, form.precision, *cells, f"{ratio:.3f}", switch, *right))
    return rows


def share(answers: list[int], tests: Tests) -> str:
    """How many answers are right."""
    right = sum(a == b for a, b in zip(answers, tests.right, strict=True))
    return f"{right}/{len(answers)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table with its first two columns to the left."""
    lines = [HEAD, ("---", "---", *["--:"] * (len(HEAD) - 2)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Ask, measure, print."""
    parser = argparse.ArgumentParser(description="Compare four forms of three tasks.")
    parser.add_argument(
        "--work", type=Path, default=Path(), help="where run.py worked (default: this folder)"
    )
    work: Path = parser.parse_args().work.resolve()
    tests = {task: read_tests(work, task) for task in TASKS}
    unmerged = ask_unmerged(work, tests)
    live = tuple(share(unmerged[task], tests[task]) for task in TASKS)
    adapters = [work / "adapters" / task / "adapter_model.safetensors" for task in TASKS]
    sizes = [file.stat().st_size for file in (work / "base" / "model.safetensors", *adapters)]
    rows = [("unmerged, PEFT", "fp32", f"{sum(sizes):,}", f"{sizes[1]:,}", "", "", "", *live)]
    rows += measure(make_forms(work), tests, unmerged)
    shutil.rmtree(work / "device")
    table = markdown(rows)
    print(f"onnxruntime {onnxruntime.__version__}, one thread\n\n{table}")
    print("every float32 form gives the unmerged adapter's answer to each test message of each task")
    (work / "table.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
