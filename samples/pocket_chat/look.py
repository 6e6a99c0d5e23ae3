"""Open the page in a headless Chromium, talk to both models, and take a picture of it.

    cd samples/pocket_chat/run
    python ../look.py --output page.png

Needs Node, Chromium, and the packages of tests/runtimes/javascript; says so, and does nothing, where one is
missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from serve import NODE_MODULES, start_server

HERE = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The first Chromium on the path."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Talk to the page in a headless Chromium.")
    parser.add_argument(
        "--work", type=Path, default=Path(), help="where run.py worked (default: this folder)"
    )
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    return parser.parse_args()


def main() -> None:
    """Serve, look, show what was said; fails unless every answer came piece by piece."""
    arguments = parse_arguments()
    node, browser = shutil.which("node"), find_browser()
    if node is None or browser is None or not (NODE_MODULES / "playwright-core").is_dir():
        print("skipped: needs node, chromium, and npm ci --ignore-scripts --prefix tests/runtimes/javascript")
        return
    with start_server(arguments.work) as address:
        done = subprocess.run(
            [node, HERE / "look.mjs", address, browser, NODE_MODULES, arguments.output],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        sys.exit("error: the page did not answer")
    answers = json.loads(done.stdout)
    for said in answers:
        print(f"{said['question']}\n    {said['answer']}\n    {said['below']}, in {said['pieces']} pieces")
    unmerged = json.loads((arguments.work / "unmerged.json").read_text(encoding="utf-8"))
    mogs = [said for said in answers if said["name"] == "Mog"]
    same = sum(said["answer"].strip() == unmerged[said["question"]] for said in mogs)
    print(f"\n{same} of Mog's {len(mogs)} answers are, word for word, those of the unmerged model")
    if any(said["pieces"] < 3 for said in answers):
        sys.exit("error: an answer did not come piece by piece")


if __name__ == "__main__":
    main()
