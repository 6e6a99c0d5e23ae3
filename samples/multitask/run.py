"""Three tasks on one base, in four forms: folded, swapped, in a table, as patches. What does each cost?

    python samples/multitask/run.py

README.md says what to install. Every step is a program of its own, and its command line is printed: each can
be repeated by hand. What an earlier run made is not made again, unless something that it is made of is.
Nothing uses the network.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from intent import HERE, TASKS, load

intent = load("run")
EXPORT = "-m ia3_export onnx --quiet --overwrite"
ADAPTERS = " ".join(f"--adapter adapters/{task}" for task in TASKS)


class Step(NamedTuple):
    """A program for Python to run in the working folder, and the file or folder that it makes there."""

    title: str
    output: str
    command: str


def steps(training: str) -> Iterator[Step]:
    """All of them; "{sample}" stands for the folder of this file, `training` for options of it."""
    yield Step(
        "Train three IA3 adapters",
        "adapters",
        f"{{sample}}/train.py --base base --output adapters {training}",
    )
    yield Step(
        "The base as a classifier that has learned nothing yet: what is deployed first",
        "blank",
        "{sample}/base.py --base base --output blank",
    )
    yield Step("Export that to ONNX", "onnx/base", f"{EXPORT} --model blank --output onnx/base")
    for task in TASKS:
        yield Step(
            f"Folded: {task} in the weights of that graph, in float32",
            f"onnx/{task}",
            f"{EXPORT} --onnx-base onnx/base --base blank --adapter adapters/{task} --output onnx/{task}",
        )
        yield Step(
            f"Folded: {task} in 8 bits",
            f"int8/{task}",
            f"{EXPORT} --base base --adapter adapters/{task} --output int8/{task} --precision int8",
        )
    yield Step(
        "Swap: one graph, and a file of kilobytes for each task",
        "swap",
        f"{EXPORT} --base base {ADAPTERS} --output swap --swappable --precision fp32,int8",
    )
    yield Step(
        "Task table: one graph that holds all tasks, and takes the number of one as an input",
        "table",
        f"{EXPORT} --base base {ADAPTERS} --output table --task-table --precision fp32,int8,q8",
    )
    for task in TASKS:
        yield Step(
            f"Patch: what makes {task} of the base's files",
            f"{task}.ia3patch",
            f"-m ia3_export patch --from onnx/base --to onnx/{task} --output {task}.ia3patch --overwrite",
        )
    yield Step("Measure them, and ask all of them for what the tests ask", "table.md", "{sample}/measure.py")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train three tasks, export them in four forms, compare.")
    parser.add_argument(
        "--work", type=Path, default=HERE / "run", help="working folder (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="train less, for a first look or for CI")
    return parser.parse_args()


def main() -> None:
    """All steps that are not done yet, and where to find the page."""
    arguments = parse_arguments()
    work: Path = arguments.work.resolve()
    source = intent.locate_base()
    if not (work / "base").is_dir():
        shutil.copytree(source, work / "base")
    print(f"$ cd {intent.shortest(work, Path.cwd())}")
    anew = False
    sample = shlex.quote(intent.shortest(HERE, work))
    for step in steps("--epochs 8" if arguments.quick else ""):
        intent.title(step.title)
        if (work / step.output).exists() and not anew:
            print(f"{step.output} is there")
            continue
        # what follows is made of this
        anew = True
        intent.run(work, *shlex.split(step.command.format(sample=sample)))

    intent.title("Try them in your browser (from the folder where you started)")
    where = "" if work == HERE / "run" else f" --work {shlex.quote(intent.shortest(work, Path.cwd()))}"
    print(f"$ python {intent.shortest(HERE / 'serve.py', Path.cwd())}{where}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
