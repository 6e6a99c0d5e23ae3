"""One adapter in every precision of ours beside the peers' files of the same model: size, quality, speed.

    python tools/bench/quantize_peers.py --base DIR --adapter DIR --gguf-base FILE [--budget 110MB]
        [--work DIR] [--rounds 5] [--threads 1]

Ours are ``onnx --precision fp32,int8,q8,int4`` of base and adapter with --budget for int4, and again without.
Of onnxruntime-genai the builder's int4 of the merged folder. For llama.cpp the adapter is merged into
--gguf-base, the file that the dense base was made of, and llama.cpp itself makes Q8_0 and Q4_K_M of that
(llama-cpp-python; without it these rows are missing). quantize_quality.py then measures all of them in turns.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from harness import machine_line, make_parser, our_program, positive

PRECISIONS = "fp32,int8,q8,int4"
KINDS = ("Q8_0", "Q4_K_M")


def main() -> None:
    """Make all files, then print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--gguf-base", type=Path, required=True)
    parser.add_argument("--budget", default="110MB")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args()
    work: Path = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    sources = ("--base", options.base, "--adapter", options.adapter)
    ours("onnx", *sources, "--output", work / "ours", "--precision", PRECISIONS, "--budget", options.budget)
    ours("onnx", *sources, "--output", work / "free", "--precision", "int4")
    ours("onnx", "--model", options.base, "--output", work / "plain")
    ours("merge", *sources, "--output", work / "merged")
    free = work / "model_q4_smallest.onnx"
    shutil.copyfile(work / "free" / "onnx" / "model_q4.onnx", free)
    builder = ("-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu")
    run(sys.executable, *builder, "-m", work / "merged", "-o", work / "genai", "-c", work / "cache")
    table = [sys.executable, Path(__file__).with_name("quantize_quality.py"), "--files", free]
    table += ["--exported", work / "ours", "--base", work / "plain", "--genai", work / "genai"]
    table += ["--rounds", options.rounds, "--threads", options.threads]
    gguf = [*make_gguf(options.gguf_base, options.adapter, work)]
    print(machine_line(work), flush=True)
    run(*table, *(["--gguf", *gguf] if gguf else []), shown=True)


def make_gguf(base: Path, adapter: Path, work: Path) -> Iterator[Path]:
    """What llama.cpp makes of our merge into `base`."""
    if find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: no rows of llama.cpp", file=sys.stderr)
        return
    import llama_cpp

    ours("merge", "--base", base, "--adapter", adapter, "--output", work / "merged-gguf")
    [merged] = (work / "merged-gguf").glob("*.gguf")
    for kind in KINDS:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        settings.allow_requantize = True  # the dense base holds what these codes stand for
        target = work / f"merged-{kind}.gguf"
        if llama_cpp.llama_model_quantize(bytes(merged), bytes(target), ctypes.byref(settings)):
            sys.exit(f"llama.cpp cannot write {target}")
        yield target


def ours(command: str, *arguments: str | Path) -> None:
    """Run our program, without the proof where it would prove."""
    unproven = ("--no-verify",) if command == "onnx" else ()
    run(our_program(), command, *arguments, *unproven, "--overwrite", "--quiet")


def run(*command: object, shown: bool = False) -> None:
    """Run a command, and end where it fails; its output is for the eye only if it is `shown`."""
    print(f"$ {' '.join(map(str, command))}", file=sys.stderr, flush=True)
    subprocess.run([*map(str, command)], check=True, stdout=None if shown else subprocess.DEVNULL)


if __name__ == "__main__":
    main()
