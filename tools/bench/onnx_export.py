"""Time and memory of ``ia3-export onnx`` beside the other exporters, interleaved on the same Llama.

    python tools/bench/onnx_export.py --folder /tmp/bench --optimum /tmp/opt/bin/python \
        [--rounds 5] [--only ours,genai]

One model with random weights: 12 layers, 207 million parameters, float32, made once by transformers in
--folder. Every run is a fresh process tree on a warm page cache, timed from its start to its end; each round
runs every exporter once and starts one exporter later than the round before. The first round, which brings
libraries into memory, is not counted.

optimum-cli works in an environment of its own (--optimum: its python) and runs its validation, as it does by
default; so do we, and once more with --no-verify. onnxruntime-genai's builder checks nothing. Peak memory is
that of the whole tree: the largest sum of resident sizes that a look every 20 ms found, or the largest
process if that was larger between two looks.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1024 * 1024
NAMES = ("ours", "ours --no-verify", "optimum", "genai")


@dataclass(frozen=True)
class Usage:
    """One run."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    files_mib: float


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="keeps the model from run to run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--optimum", type=Path, help="python of the environment that holds optimum-onnx")
    options = parser.parse_args()
    model = options.folder / "llama-207m"
    if not (model / "model.safetensors").exists():
        # a child's peak memory begins at its parent's size, so torch stays out of this process
        subprocess.run([sys.executable, "-c", MAKE, str(model)], check=True)
    output = options.folder / "exported"
    commands = {
        name: command
        for name, command in make_commands(model, output, options.optimum).items()
        if name in options.only.split(",")
    }
    runs: dict[str, list[Usage]] = {name: [] for name in commands}
    for number in range(options.rounds + 1):
        shift = number % len(commands)
        for name in (*list(commands)[shift:], *list(commands)[:shift]):
            shutil.rmtree(output, ignore_errors=True)
            for file in model.iterdir():
                file.read_bytes()
            usage = measure(commands[name], output)
            if number:
                runs[name].append(usage)
            print(
                f"{number}/{options.rounds} {name:<18}{usage.wall_s:7.1f} s{usage.peak_mib:8.0f} MiB",
                file=sys.stderr,
            )
    shutil.rmtree(output, ignore_errors=True)
    weights = (model / "model.safetensors").stat().st_size / MIB
    print(
        f"{len(os.sched_getaffinity(0))} cores, python {platform.python_version()}, "
        f"{weights:.0f} MiB of weights\n"
    )
    print(table(runs, weights))


def make_commands(model: Path, output: Path, optimum: Path | None) -> dict[str, list[str]]:
    """The command of every exporter that can be run here."""
    ours = [sys.executable, "-m", "ia3_export", "onnx", "--model", str(model), "--output", str(output)]
    ours += ["--task", "text-generation-with-past", "--quiet"]
    genai = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(output)]
    commands = {
        "ours": ours,
        "ours --no-verify": [*ours, "--no-verify"],
        "genai": [*genai, "-p", "fp32", "-e", "cpu", "-c", str(output / "cache")],
    }
    if optimum is not None:
        program = str(optimum.with_name("optimum-cli"))
        commands["optimum"] = [
            program,
            "export",
            "onnx",
            "--model",
            str(model),
            "--task",
            "text-generation-with-past",
            str(output),
        ]
    return {name: commands[name] for name in NAMES if name in commands}


def measure(command: Sequence[str], output: Path) -> Usage:
    """Run a command that must succeed and leave a graph in `output`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        sums = [0]
        watch = threading.Thread(target=sample, args=(child.pid, sums), daemon=True)
        watch.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        watch.join()
        if child.returncode or not list(output.rglob("*.onnx")):
            log.seek(0)
            tail = log.read().decode(errors="replace").strip().splitlines()[-12:]
            raise SystemExit("\n".join([f"exit code {child.returncode}: {' '.join(command)}", *tail]))
    return Usage(
        wall_s=wall,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_mib=max(sums[0] / MIB, usage.ru_maxrss / 1024),
        files_mib=sum(file.stat().st_size for file in output.rglob("*.onnx*")) / MIB,
    )


def sample(pid: int, largest: list[int]) -> None:
    """Keep the largest sum of the resident sizes of a process and its descendants in ``largest[0]``."""
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in (root, *root.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            largest[0] = max(largest[0], total)
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        return


def table(runs: Mapping[str, Sequence[Usage]], weights: float) -> str:
    """Medians over the rounds, and the medians of the ratios within a round to the first row's wall time."""
    first = next(iter(runs))
    lines = [
        (
            f"| exporter | runs | median s | min s | x {first} | CPU s | peak MiB | x weights | x {first} "
            "| graph MiB |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in runs.items():
        peaks = [usage.peak_mib for usage in own]
        slower = statistics.median(a.wall_s / b.wall_s for a, b in zip(own, runs[first], strict=True))
        bigger = statistics.median(a.peak_mib / b.peak_mib for a, b in zip(own, runs[first], strict=True))
        lines.append(
            f"| {name} | {len(own)} | {statistics.median(u.wall_s for u in own):.1f} | "
            f"{min(u.wall_s for u in own):.1f} | {slower:.2f} | "
            f"{statistics.median(u.cpu_s for u in own):.1f} | {statistics.median(peaks):.0f} | "
            f"{statistics.median(peaks) / weights:.1f} | {bigger:.2f} | {own[-1].files_mib:.0f} |"
        )
    return "\n".join(lines)


MAKE = """
import sys, torch
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=False,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer = GPT2Tokenizer()
tokenizer = tokenizer.train_new_from_iterator(["the cat sat on the mat"], vocab_size=300, show_progress=False)
tokenizer.save_pretrained(sys.argv[1])
"""


if __name__ == "__main__":
    main()
