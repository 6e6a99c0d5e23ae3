"""Serve the page, exported models and transformers.js on this machine, to this machine only.

python samples/browser/serve.py                          # the model of samples/minilm_intent
python samples/browser/serve.py my-folder other-folder   # folders that `ia3-export onnx` wrote
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
INTENTS = HERE.parent / "minilm_intent" / "run" / "exported"
LIBRARIES = ("@huggingface/transformers", "onnxruntime-web")
PAGE = ("index.html", "main.js")
# how transformers.js calls a precision, and how it calls the file
DTYPES = {"q8": "_quantized", "fp32": "", "fp16": "_fp16", "q4": "_q4"}

# the machine's own table of types may lack these, and browsers insist on them for modules and WebAssembly
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
HEADERS = {
    # the browser itself refuses to talk to anyone else
    "Content-Security-Policy": (
        "default-src 'self' blob:; script-src 'self' blob: 'wasm-unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data:"
    ),
    # without these two a page gets one thread
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",
}


class Handler(SimpleHTTPRequestHandler):
    """Answers GET and HEAD with the `page`, files of `folders` by their prefix, and the list of models."""

    def __init__(self, *args: Any, page: Path, folders: Mapping[str, Path], verbose: bool) -> None:
        self.page = page
        self.folders = folders
        self.verbose = verbose
        super().__init__(*args)

    def translate_path(self, path: str) -> str:
        """The file behind a URL; one that does not exist where the URL leaves the folders."""
        wanted = unquote(urlsplit(path).path).lstrip("/") or "index.html"
        if wanted in PAGE:
            return str(self.page / wanted)
        for prefix, folder in self.folders.items():
            file = (folder / wanted.removeprefix(f"{prefix}/")).resolve()
            if wanted.startswith(f"{prefix}/") and file.is_file() and file.is_relative_to(folder):
                return str(file)
        return str(HERE / "no such file")

    def send_head(self) -> Any:
        """The headers of an answer, and what to send after them."""
        # a foreign page can have its name point here, but cannot help sending that name
        if urlsplit(f"//{self.headers.get('Host')}").hostname not in ("127.0.0.1", "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        if urlsplit(self.path).path != "/models.json":
            return super().send_head()
        models = [
            describe(k.removeprefix("models/"), v) for k, v in self.folders.items() if k.startswith("models/")
        ]
        body = json.dumps(models).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return io.BytesIO(body)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file; a browser that does not want the rest is no error."""
        with suppress(ConnectionError):
            super().copyfile(source, outputfile)

    def guess_type(self, path: Any) -> str:
        """The media type of a file."""
        return TYPES.get(Path(path).suffix) or super().guess_type(path)

    def end_headers(self) -> None:
        """Close the headers with those that every answer has."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print a request, if asked to."""
        if self.verbose:
            super().log_message(format, *args)


def describe(name: str, folder: Path) -> dict[str, Any]:
    """What the page has to know of a model before it loads it."""
    manifest = json.loads((folder / "ia3_export.json").read_text(encoding="utf-8"))
    stems = {path.stem for path in (folder / "onnx").glob("*.onnx")}
    dtypes = [
        dtype for dtype, suffix in DTYPES.items() if {f"model{suffix}", f"encoder_model{suffix}"} & stems
    ]
    # PEFT keeps no label names; samples/minilm_intent writes them beside the adapter
    labels = next(
        (p for p in (folder / "labels.json", folder.parent / "adapter" / "labels.json") if p.is_file()), None
    )
    return {
        "name": name,
        "task": manifest["task"],
        "dtypes": dtypes,
        "chat_template": read_chat_template(folder) if manifest["task"] == "text-generation" else None,
        "labels": None if labels is None else json.loads(labels.read_text(encoding="utf-8")),
    }


def read_chat_template(folder: Path) -> str | None:
    """The template of a model for dialogues: a file of its own, or in the tokenizer's configuration."""
    own, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = (
        json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    )
    return template if isinstance(template, str) else None


def name_of(folder: Path) -> str:
    """How the page calls a model: its path from here."""
    here = Path.cwd()
    return (folder.relative_to(here) if folder.is_relative_to(here) else folder).as_posix().lstrip("/")


def check_model(folder: Path) -> Path:
    """`folder` as an absolute path; ends the program if no model was exported to it."""
    folder = folder.resolve()
    if not (folder / "ia3_export.json").is_file() or not (folder / "onnx").is_dir():
        hint = (
            f"python {INTENTS.parents[1] / 'run.py'}"
            if folder == INTENTS
            else "ia3-export onnx --output FOLDER"
        )
        sys.exit(f"error: no exported model in {folder}\nhint: make one with: {hint}")
    return folder


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Serve the page and exported models on 127.0.0.1.")
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        default=[INTENTS],
        metavar="FOLDER",
        help="written by `ia3-export onnx` (default: the model of samples/minilm_intent)",
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any free one")
    parser.add_argument(
        "--node-modules",
        type=Path,
        default=HERE / "node_modules",
        metavar="DIR",
        help="where npm put transformers.js",
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=HERE,
        metavar="DIR",
        help="another page: its index.html and main.js (default: this sample's)",
    )
    parser.add_argument("--verbose", action="store_true", help="print every request")
    return parser.parse_args()


def main() -> None:
    """Serve until interrupted."""
    arguments = parse_arguments()
    models = [check_model(folder) for folder in arguments.folders]
    if not (arguments.node_modules / LIBRARIES[0]).is_dir():
        sys.exit(f"error: transformers.js is not installed\nhint: npm ci --ignore-scripts --prefix {HERE}")
    folders = {f"models/{name_of(folder)}": folder for folder in models}
    folders |= {f"node_modules/{name}": (arguments.node_modules / name).resolve() for name in LIBRARIES}
    handler = partial(Handler, page=arguments.page, folders=folders, verbose=arguments.verbose)
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(0)
