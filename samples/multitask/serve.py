"""Serve the page and what run.py made to this machine's browsers, with the server of samples/browser.

python samples/multitask/serve.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

from intent import HERE

ROOT = HERE.parents[1]
NODE_MODULES = ROOT / "tests" / "runtimes" / "javascript" / "node_modules"
LIBRARIES = ("@huggingface/tokenizers", "onnxruntime-web")


def load_server() -> ModuleType:
    """The program ``samples/browser/serve.py`` as a module."""
    spec = importlib.util.spec_from_file_location("browser_serve", ROOT / "samples" / "browser" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_server(work: Path, port: int) -> ThreadingHTTPServer:
    """The server, not running yet; port 0 is any free one. Ends the program where something is missing."""
    if not (work / "table.md").is_file():
        sys.exit(f"error: no finished run in {work}\nhint: make one with: python {HERE / 'run.py'}")
    if not all((NODE_MODULES / library).is_dir() for library in LIBRARIES):
        sys.exit(
            "error: onnxruntime-web is not installed\n"
            "hint: npm ci --ignore-scripts --prefix tests/runtimes/javascript"
        )
    folders = {"run": work.resolve(), "javascript": ROOT / "javascript"}
    folders |= {f"node_modules/{name}": (NODE_MODULES / name).resolve() for name in LIBRARIES}
    handler = partial(load_server().Handler, page=HERE / "page", folders=folders, verbose=False)
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


@contextmanager
def start_server(work: Path) -> Iterator[str]:
    """The server in a thread that ends with the context; its address."""
    with make_server(work, port=0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve the page of three tasks on 127.0.0.1.")
    parser.add_argument("--work", type=Path, default=HERE / "run", help="where run.py worked")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any free one")
    arguments = parser.parse_args()
    with make_server(arguments.work, arguments.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(0)
