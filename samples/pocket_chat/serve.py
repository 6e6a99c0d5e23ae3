"""Serve the page and the two models to this machine's browsers, with the server of samples/browser.

python samples/pocket_chat/serve.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = HERE.parent / "browser" / "serve.py"
NODE_MODULES = HERE.parents[1] / "tests" / "runtimes" / "javascript" / "node_modules"


def make_command(work: Path, port: int) -> list[str]:
    """The command line of the server; port 0 is any free one."""
    models = [work / "exported" / name for name in ("Mog", "SmolLM2")]
    options = ["--page", HERE / "page", "--node-modules", NODE_MODULES, "--port", port]
    return [sys.executable, *map(str, [SERVER, *models, *options])]


@contextmanager
def start_server(work: Path) -> Iterator[str]:
    """The server as a process that ends with the context; its address."""
    with subprocess.Popen(make_command(work, port=0), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def main() -> None:
    """Become the server, which runs until it is interrupted."""
    parser = argparse.ArgumentParser(description="Serve the chat page on 127.0.0.1.")
    parser.add_argument("--work", type=Path, default=HERE / "run", help="where run.py worked")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    arguments = parser.parse_args()
    os.execv(sys.executable, make_command(arguments.work, arguments.port))


if __name__ == "__main__":
    main()
