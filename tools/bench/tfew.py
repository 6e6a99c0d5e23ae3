"""The T-Few authors' own T0-3B checkpoint, merged into a base of T0-3B's shape, beside `cp -r` and PEFT.

And how exactly a merge with its vectors can be undone.

    python tools/bench/tfew.py --checkpoint ../shared/data/tfew/t03b_ia3_finish.pt \
        --folder /tmp/bench --json tfew.json

The base has the names, shapes and dtype of bigscience/T0_3B in bfloat16 (5.7 GB, random weights, written
once). PEFT cannot read the checkpoint: "peft" gets what `ia3-export convert` makes of it, loads the whole
model, merges and saves. Rounds, processes and peak RSS are those of harness.py. The exactness of `unmerge` is
measured against the true base, in three dtypes, on matrices of 64 columns under the same 192 names.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import (
    Place,
    Variant,
    copy_variant,
    machine_line,
    make_parser,
    markdown,
    measure,
    our_program,
    our_variant,
    positive,
    run_rounds,
    size_mib,
    summarize,
)

DTYPES = ("bfloat16", "float16", "float32")
PEFT_IMPORTS = "import sys; from peft import PeftModel; from transformers import T5ForConditionalGeneration"
PEFT_MERGE = f"""{PEFT_IMPORTS}
base, adapter, output = sys.argv[1:]
model = T5ForConditionalGeneration.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size="2GB")
"""


def make_base(folder: Path) -> Path:
    """A checkpoint of T0-3B's shape in bfloat16, shard by shard; made once."""
    base = folder / "t0-3b"
    if (base / "config.json").exists():
        return base
    import torch
    from safetensors.torch import save_file
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["T5ForConditionalGeneration"],
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in T5ForConditionalGeneration(config).state_dict().items()}
    for tied in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        shapes.pop(tied, None)
    base.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{}]
    torch.manual_seed(0)
    weight_map, size = {}, 0
    for name, shape in shapes.items():
        if size > 1_900_000_000:
            shards.append({})
            size = 0
        weight_map[name] = len(shards)
        shards[-1][name] = shape
        size += 2 * torch.Size(shape).numel()
    total = 0
    for i, shard in enumerate(shards, 1):
        tensors = {name: (torch.randn(shape) * 0.05).to(torch.bfloat16) for name, shape in shard.items()}
        total += sum(t.nbytes for t in tensors.values())
        save_file(tensors, base / f"model-{i:05}-of-{len(shards):05}.safetensors", metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: f"model-{i:05}-of-{len(shards):05}.safetensors" for n, i in weight_map.items()},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (base / "config.json").write_text(config.to_json_string())
    return base


def exactness(checkpoint: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """Merge and unmerge of matrices (n, 64) under the checkpoint's names, compared with what they were."""
    import torch
    from safetensors.torch import save_file

    place = folder / f"unmerge-{dtype}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    torch.manual_seed(1)
    vectors = torch.load(checkpoint, weights_only=True)
    weights = {
        key.replace(".multi_lora_b", ".weight"): (torch.randn(len(v), 64) * 0.05).to(getattr(torch, dtype))
        for key, v in vectors.items()
    }
    base = place / "model.safetensors"  # the name under which a folder's weights are found again
    save_file(weights, base)
    program, adapter = our_program(), str(checkpoint)
    merge = [program, "merge", "--base", str(base), "--adapter", adapter]
    subprocess.run([*merge, "--output", str(place / "merged"), "-q"], check=True)
    undo = [program, "unmerge", "--model", str(place / "merged"), "--adapter", adapter]
    done = subprocess.run(
        [*undo, "--base", str(base), "--output", str(place / "undone"), "-q", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = json.loads(done.stdout)["exactness"]
    shutil.rmtree(place)
    total = sum(row["elements"] for row in rows)
    return {
        "dtype": dtype,
        "elements": total,
        "certain": sum(row["certain"] for row in rows) / total,
        "equal": sum(row["equal"] for row in rows) / total,
        "unfolded": sum(row["unfolded"] for row in rows),
        "distance": max(row["distance"] for row in rows),
    }


def main() -> None:
    if sys.argv[1:2] == ["--make-base"]:
        make_base(Path(sys.argv[2]))
        return
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the base and the outputs go (18 GB)"
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--peft-rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder, checkpoint = options.folder, options.checkpoint
    # in a process of its own: a child's peak RSS is never below its parent's
    subprocess.run([sys.executable, __file__, "--make-base", str(folder)], check=True)
    base = folder / "t0-3b"
    place = Place(base, checkpoint, folder / "tfew-run")
    converted = folder / "tfew-peft"
    subprocess.run(
        [our_program(), "convert", str(checkpoint), "--output", str(converted), "--overwrite", "-q"],
        check=True,
    )
    variants = [
        copy_variant(place),
        our_variant("ours-no-digests", place, ("--digests", "none", "-q")),
        our_variant("ours", place, ("-q",)),
        Variant(
            name="peft",
            command=(sys.executable, "-c", PEFT_MERGE, str(base), str(converted), str(place.output)),
            warm_up=(sys.executable, "-c", PEFT_IMPORTS),
            slow=True,
        ),
    ]
    left_out: dict[str, str] = {} if options.peft_rounds else {"peft": "--peft-rounds 0"}
    runs = run_rounds(
        variants,
        place,
        cache="warm",
        rounds=options.rounds,
        slow_rounds=options.peft_rounds,
        left_out=left_out,
    )
    start_up = measure((our_program(), "inspect", str(checkpoint), "-q"))
    shutil.rmtree(place.run, ignore_errors=True)
    print(machine_line(folder))
    print(f"base of T0-3B's shape: {size_mib(base):,.0f} MiB; 192 vectors, 540,672 elements\n")
    measured = (
        (
            row.variant,
            str(row.runs),
            f"{row.wall_median_s:.2f}",
            f"{row.ratio_to_cp:.2f}",
            f"{row.peak_rss_mib:,.0f}",
        )
        for row in summarize(runs, [variant.name for variant in variants])
    )
    print(markdown(("variant", "runs", "s", "to cp", "peak RSS MiB"), measured))
    print(f"\ninspect of the checkpoint alone: {start_up.wall_s:.2f} s, {start_up.peak_rss_mib:,.0f} MiB\n")
    rows = [exactness(checkpoint, folder, dtype) for dtype in DTYPES]
    undone = (
        (
            row["dtype"],
            f"{row['elements']:,}",
            f"{row['certain']:.2%}",
            f"{row['equal']:.2%}",
            f"{row['unfolded']:,}",
            str(row["distance"]),
        )
        for row in rows
    )
    head = ("unmerge", "elements", "certain", "equal to the base", "do not fold back", "farthest, ulp")
    print(markdown(head, undone))
    if options.json:
        options.json.write_text(
            json.dumps({"runs": [asdict(run) for run in runs], "unmerge": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
