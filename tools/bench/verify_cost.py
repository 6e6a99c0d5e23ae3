"""What a proof costs: ``verify --weights-only`` beside reading both folders, ``verify`` beside its parts.

    python tools/bench/verify_cost.py --folder /tmp/bench [--rounds 7] [--forwards] [--huge]

Interleaved rounds on the 1.1-billion-parameter Llama of fixtures.py, each run a fresh process with its start
included. "cat" is ``cat BASE MERGED > /dev/null``. With --forwards also a whole verify beside one load, and
the forwards and greedy decodings that the verdict needs (live in bfloat16 and float32, base, merged in both)
in one process of plain transformers and PEFT; and a verify that may take --max-memory only, layer by layer.
With --huge once more --weights-only, on 100 GB of zeros in sparse files in the shape of a Llama: every byte
is read and folded, none is on the disk. Prints medians and the median of the ratios within a round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fixtures import make_in_child, make_llama
from harness import (
    MIB,
    CommandFailed,
    Usage,
    make_parser,
    measure,
    median_ratio,
    positive,
    size_mib,
    take_turns,
)

PARTS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from ia3_export.parity.runs.greedy import prompts
from ia3_export.parity.runs.inputs import make_cases
base, adapter, merged = sys.argv[1:]
live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()
cases = make_cases(live.get_base_model())
def run(model):
    with torch.no_grad():
        for case in cases:
            model(**case.tensors)
def decode(model):
    for case in prompts(cases):
        model.generate(**case.tensors, max_new_tokens=12, min_new_tokens=12, do_sample=False)
run(live)
run(live.float())
decode(live.get_base_model())
with live.disable_adapter():
    run(live)
del live
model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
run(model)
decode(model)
run(model.float())
"""

#: Too little for 1.1 billion parameters in float32: layers are read from disk for every forward.
OFFLOADED = ("4GB",)


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--forwards", action="store_true")
    parser.add_argument("--huge", action="store_true")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    options = parser.parse_args()
    try:
        benchmark(
            options.folder, options.rounds, forwards=options.forwards, huge=options.huge, small=options.small
        )
    except CommandFailed as problem:
        sys.exit(str(problem))


def benchmark(folder: Path, rounds: int, *, forwards: bool, huge: bool, small: bool) -> None:
    """Measure and print."""
    make_in_child(folder, small=small)
    base, adapter = make_llama(folder)  # which finds it made
    merged = folder / f"{base.name}-merged"
    ours = [sys.executable, "-m", "ia3_export"]
    inputs = ["--base", str(base), "--adapter", str(adapter)]
    if not merged.exists():
        subprocess.run(
            [*ours, "merge", *inputs, "--output", str(merged), "--digests", "none", "-q"], check=True
        )
    files = [str(file) for folder in (base, merged) for file in sorted(folder.glob("*.safetensors"))]
    gigabytes = sum(size_mib(part, "*.safetensors") for part in (base, merged)) * MIB / 1e9
    proof = [*ours, "verify", *inputs, "--merged", str(merged), "-q"]
    report({"cat": ["cat", *files], "verify --weights-only": [*proof, "--weights-only"]}, rounds, gigabytes)
    if huge:
        zeros, vectors = make_huge(folder)
        command = [
            *ours,
            "verify",
            "--base",
            str(zeros),
            "--adapter",
            str(vectors),
            "--merged",
            str(zeros.with_name("huge-merged")),
        ]
        usage = measure([*command, "--weights-only", "-q"])
        print(
            f"verify --weights-only of 100 GB: {usage.wall_s:.0f} s, peak memory {usage.peak_rss_mib:.0f} MiB"
        )
    if forwards:
        parts = [sys.executable, "-c", PARTS, str(base), str(adapter), str(merged)]
        whole = [*proof, "--device", "cpu"]
        report({"parts": parts, "verify": whole}, min(rounds, 3), gigabytes)
        offloaded = {f"verify --max-memory {limit}": [*whole, "--max-memory", limit] for limit in OFFLOADED}
        report(offloaded, 1, gigabytes)


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


def report(commands: dict[str, Sequence[str]], rounds: int, gigabytes: float) -> None:
    """Run `commands` in turns, the first being what the others are compared with."""
    runs: dict[str, list[Usage]] = {name: [] for name in commands}
    for number, name in take_turns(list(commands), rounds + 1):
        usage = measure(commands[name])
        if number:  # the first round brings files and libraries into memory
            runs[name].append(usage)
    first = next(iter(runs))
    for name, own in runs.items():
        median = statistics.median(usage.wall_s for usage in own)
        ratio = median_ratio((usage.wall_s for usage in own), (usage.wall_s for usage in runs[first]))
        peak = max(usage.peak_rss_mib for usage in own)
        print(
            f"{name}: median {median:.2f} s, ratio to {first} {ratio:.2f}, peak memory {peak:.0f} MiB "
            f"({gigabytes:.1f} GB of weights)"
        )


if __name__ == "__main__":
    main()
