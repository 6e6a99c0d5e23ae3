"""What a proof costs: ``verify --weights-only`` beside reading both folders, ``verify`` beside its parts.

    python tools/bench/verify_cost.py --folder /tmp/bench [--rounds 7] [--forwards] [--huge]

Interleaved rounds on the 1.1-billion-parameter Llama of fixtures.py, each run a fresh process with its start
included. "cat" is ``cat BASE MERGED > /dev/null``. With --forwards also a whole verify on a smaller model
beside one load and one forward in each precision that the verdict needs (live, float64, base, merged), all in
one process of plain transformers and PEFT. With --huge once more --weights-only, on 100 GB of zeros in sparse
files in the shape of a Llama: every byte is read and folded, none is on the disk. Prints medians and the
median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fixtures import make_llama

PARTS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, merged = sys.argv[1:]
from ia3_export.parity.runs.inputs import make_cases
live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()
cases = make_cases(live.get_base_model())
def run(model):
    with torch.no_grad():
        for case in cases:
            model(**case.tensors)
        generate = getattr(model, "get_base_model", lambda: model)()
        generate.generate(**cases[0].tensors, max_new_tokens=12, min_new_tokens=12, do_sample=False)
run(live)
run(live.double())
with live.disable_adapter():
    run(live)
del live
run(AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval())
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forwards", action="store_true")
    parser.add_argument("--huge", action="store_true")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    options = parser.parse_args()
    base, adapter = make_llama(options.folder, small=options.small)
    merged = options.folder / f"{base.name}-merged"
    ours = [sys.executable, "-m", "ia3_export"]
    inputs = ["--base", str(base), "--adapter", str(adapter)]
    if not merged.exists():
        subprocess.run(
            [*ours, "merge", *inputs, "--output", str(merged), "--digests", "none", "-q"], check=True
        )
    files = [str(file) for folder in (base, merged) for file in sorted(folder.glob("*.safetensors"))]
    nbytes = sum(Path(file).stat().st_size for file in files)
    proof = [*ours, "verify", *inputs, "--merged", str(merged), "-q"]
    report(
        {"cat": ["cat", *files], "verify --weights-only": [*proof, "--weights-only"]}, options.rounds, nbytes
    )
    if options.huge:
        huge, vectors = make_huge(options.folder)
        command = [
            *ours,
            "verify",
            "--base",
            str(huge),
            "--adapter",
            str(vectors),
            "--merged",
            str(huge.with_name("huge-merged")),
        ]
        took, peak = measure([*command, "--weights-only", "-q"])
        print(f"verify --weights-only of 100 GB: {took:.0f} s, peak memory {peak:.0f} MiB")
    if options.forwards:
        parts = [sys.executable, "-c", PARTS, str(base), str(adapter), str(merged)]
        report({"parts": parts, "verify": [*proof, "--device", "cpu"]}, min(options.rounds, 3), nbytes)


def make_huge(folder: Path, *, layers: int = 80, hidden: int = 8192, inner: int = 22016) -> tuple[Path, Path]:
    """A base and its (equal) merge of zeros, ten layers a shard, in sparse files.

    An adapter of ones and twos.
    """
    import numpy as np
    from safetensors.numpy import save_file

    shapes = {"self_attn.k_proj": (hidden // 8, hidden), "self_attn.v_proj": (hidden // 8, hidden)}
    shapes |= {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for name in ("huge", "huge-merged"):
        shards = folder / name
        shards.mkdir(exist_ok=True)
        weight_map = {}
        for start in range(0, layers, 10):
            header: dict[str, object] = {}
            end = 0
            for layer in range(start, start + 10):
                for module, shape in shapes.items():
                    size = 2 * shape[0] * shape[1]
                    tensor = f"model.layers.{layer}.{module}.weight"
                    header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
                    weight_map[tensor] = f"model-{start}.safetensors"
                    end += size
            text = json.dumps(header).encode()
            with (shards / f"model-{start}.safetensors").open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + end)
        (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    adapter = folder / "huge-ia3"
    targets = {"self_attn.k_proj": hidden // 8, "self_attn.v_proj": hidden // 8, "mlp.down_proj": inner}
    adapter.mkdir(exist_ok=True)
    # by hand: a child's peak memory begins at its parent's size, and PEFT would bring torch into this process
    names = [name.rpartition(".")[2] for name in targets]
    config = {"peft_type": "IA3", "target_modules": names, "feedforward_modules": ["down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    vectors = {}
    for layer in range(layers):
        for module, length in targets.items():
            shape = (1, length) if module == "mlp.down_proj" else (length, 1)
            values = 1 + np.arange(length, dtype="<f4") % 2
            vectors[f"base_model.model.model.layers.{layer}.{module}.ia3_l"] = values.reshape(shape)
    save_file(vectors, adapter / "adapter_model.safetensors")
    return folder / "huge", adapter


def report(commands: dict[str, Sequence[str]], rounds: int, nbytes: int) -> None:
    """Run `commands` in turns, the first being what the others are compared with."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, float] = {}
    names = list(commands)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            took, peak = measure(commands[name])
            if number:  # the first round brings files and libraries into memory
                seconds[name].append(took)
                memory[name] = max(memory.get(name, 0.0), peak)
    first = names[0]
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds[first], strict=True)]
        print(
            f"{name}: median {statistics.median(seconds[name]):.2f} s, ratio to {first} "
            f"{statistics.median(ratios):.2f}, peak memory {memory[name]:.0f} MiB "
            f"({nbytes / 1e9:.1f} GB of weights)"
        )


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Seconds, and MiB of the largest process so far, of one run that must succeed."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:4]} exited with {process.returncode}")
    return time.perf_counter() - start, max(usage.ru_maxrss, resource.getpagesize()) / 1024


if __name__ == "__main__":
    main()
