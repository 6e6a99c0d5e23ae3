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

import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import (
    CommandFailed,
    Usage,
    cores,
    make_parser,
    markdown,
    measure,
    median_ratio,
    positive,
    read_into_cache,
    size_mib,
    take_turns,
)

NAMES = ("ours", "ours --no-verify", "optimum", "genai")


def main() -> None:
    """Measure and print a Markdown table."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the model from run to run")
    parser.add_argument("--rounds", type=positive, default=5)
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
    graphs: dict[str, float] = {}
    for number, name in take_turns(list(commands), options.rounds + 1):
        shutil.rmtree(output, ignore_errors=True)
        read_into_cache(model)
        try:
            usage = measure(commands[name], whole_tree=True)
        except CommandFailed as problem:
            sys.exit(str(problem))
        graphs[name] = size_mib(output, "*.onnx*")
        if not graphs[name]:
            sys.exit(f"no graph: {' '.join(commands[name])}")
        if number:
            runs[name].append(usage)
        print(
            f"{number}/{options.rounds} {name:<18}{usage.wall_s:7.1f} s{usage.peak_rss_mib:8.0f} MiB",
            file=sys.stderr,
        )
    shutil.rmtree(output, ignore_errors=True)
    weights = size_mib(model, "model.safetensors")
    print(f"{cores()} cores, python {platform.python_version()}, {weights:.0f} MiB of weights\n")
    print(table(runs, graphs, weights))


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


def table(runs: Mapping[str, Sequence[Usage]], graphs: Mapping[str, float], weights: float) -> str:
    """Medians over the rounds, and of the ratios to the first row's time and memory within a round."""
    first = next(iter(runs))
    head = (
        "exporter",
        "runs",
        "median s",
        "min s",
        f"x {first}",
        "CPU s",
        "peak MiB",
        "x weights",
        f"x {first}",
        "graph MiB",
    )
    rows = []
    for name, own in runs.items():
        walls, peaks = ([u.wall_s for u in own], [u.peak_rss_mib for u in own])
        slower = median_ratio(walls, (u.wall_s for u in runs[first]))
        bigger = median_ratio(peaks, (u.peak_rss_mib for u in runs[first]))
        peak = statistics.median(peaks)
        rows.append(
            (
                name,
                str(len(own)),
                f"{statistics.median(walls):.1f}",
                f"{min(walls):.1f}",
                f"{slower:.2f}",
                f"{statistics.median(u.cpu_s for u in own):.1f}",
                f"{peak:.0f}",
                f"{peak / weights:.1f}",
                f"{bigger:.2f}",
                f"{graphs[name]:.0f}",
            )
        )
    return markdown(head, rows)


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
