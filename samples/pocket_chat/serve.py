"""Serve the page and the two models to this machine's browsers, with the server of samples/browser.

python samples/pocket_chat/serve.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = HERE.parent / "browser" / "serve.py"
NODE_MODULES = HERE.parents[1] / "tests" / "runtimes" / "javascript" / "node_modules"


@contextmanager
def start_server(work: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a process, and its address; it ends with the context. Port 0 is any free one."""
    models = [work / "exported" / name for name in ("Mog", "SmolLM2")]
    command = [sys.executable, SERVER, *models, "--page", HERE / "page", "--node-modules", NODE_MODULES]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().strip()
        finally:
            server.terminate()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve the chat page on 127.0.0.1.")
    parser.add_argument("--work", type=Path, default=HERE / "run", help="where run.py worked")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    arguments = parser.parse_args()
    with start_server(arguments.work, arguments.port) as (server, address):
        print(address, flush=True)
        with suppress(KeyboardInterrupt):
            server.wait()


if __name__ == "__main__":
    main()
