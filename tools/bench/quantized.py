"""Time and memory of a merge into a quantized base, beside `cp -r` and what one would write with its library.

    python tools/bench/quantized.py --folder /tmp/bench --cold \
        --ct-python /tmp/ct/bin/python --json quantized.json

The 1.1-billion-parameter Llama of fixtures.py, quantized by the true writers (made once), and its IA3
adapter. Rounds, processes, caches, CPU time and peak RSS are those of harness.py. "cp" copies the quantized
base, "cp-dense" the bf16 model that a dequantizing merge writes, and "dd-fsync" writes as many zeros to the
disk and waits for it. MB/s is of output; "a core" divides it by the CPU seconds of the process, start
included. The
reload check is off except in "keep-checked" and "dense-checked", where it reads weight by weight, and in
"keep-loaded" and "dense-loaded", where it loads the model.

PEFT refuses to merge IA3 into these bases. The peers are what people write instead: "library-loop" reads the
files, dequantizes every tensor with bitsandbytes, folds, and saves; "peft-dequantized" loads with
transformers, calls `model.dequantize()`, attaches, merges and saves with PEFT; for compressed-tensors
"library-load" loads dequantized with transformers, folds, and saves. The first computes in float32 and rounds
once, so the dense merge has to be bit-identical to it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import harness
from fixtures import QUANTIZED, make_in_child, make_llama
from harness import (
    MIB,
    SHARD_SIZE,
    CommandFailed,
    Comparison,
    Place,
    Run,
    Variant,
    chosen,
    clear,
    compare,
    copy_variant,
    machine_line,
    make_parser,
    markdown,
    measure,
    our_variant,
    positive,
    print_left_out,
    processor,
    run_rounds,
    size_mib,
    why_no_cold,
)

VECTORS = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
base, adapter, output = map(Path, sys.argv[1:])
vectors = load_file(adapter / "adapter_model.safetensors")
vectors = {
    n.removeprefix("base_model.model.").removesuffix(".ia3_l") + ".weight": v for n, v in vectors.items()
}
def fold(name, weight):
    # (out, 1) or (1, in): PEFT stores them so that they broadcast
    return weight * vectors[name] if name in vectors else weight
"""
BITSANDBYTES_LOOP = f"""{VECTORS}
import bitsandbytes.functional as bnb
stored = {{
    name: tensor for path in sorted(base.glob("*.safetensors")) for name, tensor in load_file(path).items()
}}
dense = {{}}
for name, tensor in stored.items():
    module = name.removesuffix(".weight")
    if name + ".absmax" in stored:
        own = {{n: t for n, t in stored.items() if n.startswith(name + ".")}}
        state = bnb.QuantState.from_dict(own, torch.device("cpu"))
        state.dtype = torch.float32
        dense[name] = fold(name, bnb.dequantize_4bit(tensor, state)).bfloat16()
    elif module + ".SCB" in stored:
        dense[name] = fold(name, bnb.int8_vectorwise_dequant(tensor, stored[module + ".SCB"])).bfloat16()
    elif name.endswith((".weight", ".bias")):
        dense[name] = tensor
output.mkdir()
save_file(dense, output / "model.safetensors", metadata={{"format": "pt"}})
"""
PEFT_DEQUANTIZED = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map="cpu").dequantize()
model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # still set, and PEFT refuses by them
model.hf_quantizer = None
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged._weight_conversions = []  # those of the quantizer, which cannot be turned round
merged.config.__dict__.pop("quantization_config", None)
merged.save_pretrained(output, max_shard_size="{SHARD_SIZE}")
"""
COMPRESSED_TENSORS_LOAD = f"""{VECTORS}
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
how = CompressedTensorsConfig(run_compressed=False)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map="cpu", quantization_config=how)
with torch.no_grad():
    dense = {{name: fold(name, tensor).to(tensor.dtype) for name, tensor in model.state_dict().items()}}
model.config.__dict__.pop("quantization_config", None)
model.hf_quantizer = None
model.save_pretrained(output, state_dict=dense, max_shard_size="{SHARD_SIZE}")
"""


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    kind: str
    output_mb_s: float | None
    output_mb_s_a_core: float | None


@dataclass(frozen=True)
class Report:
    machine: str
    load: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    runs: dict[str, list[Run]] = field(default_factory=dict)
    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def make_bases(
    folder: Path, kinds: Iterable[str], ct_python: Path | None, left_out: dict[str, str]
) -> list[str]:
    """The kinds that are there or could be made. In children, so that this process stays small."""
    made = []
    make_in_child(folder)
    for kind in kinds:
        python = ct_python if kind == "w4a16" else sys.executable
        if (folder / f"llama-1.1b-{kind}" / "config.json").exists():
            made.append(kind)
        elif python is None:
            left_out[kind] = "no --ct-python given"
        else:
            make_in_child(folder, kind, python=python)
            made.append(kind)
    return made


def make_variants(place: Place, dense: Path, kind: str, ct_python: Path | None) -> list[Variant]:
    """All of one base. The writers of a dense model have names that start with "dense" or are peers."""
    inputs = (str(place.base), str(place.adapter), str(place.output))
    files = tuple(str(path) for path in sorted(dense.glob("*.safetensors")))
    megabytes = int(size_mib(dense, "*.safetensors"))
    no_reload, fast = ("--no-reload-check",), ("--digests", "none")
    keep = ("--quantized", "keep")
    core = str(min(os.sched_getaffinity(0)))
    one_core = our_variant("dense-one-core", place, (*fast, *no_reload))
    variants = [
        copy_variant(place),
        our_variant("keep-no-digests", place, (*keep, *fast, *no_reload)),
        our_variant("keep", place, (*keep, *no_reload)),
        Variant(name="cp-dense", command=("cp", "-r", str(dense), inputs[2]), warm_up=("cat", *files)),
        Variant(
            name="dd-fsync",
            command=("dd", "if=/dev/zero", f"of={inputs[2]}", "bs=1M", f"count={megabytes}", "conv=fsync"),
            warm_up=("dd", "--version"),
        ),
        our_variant("dense-no-digests", place, (*fast, *no_reload)),
        our_variant("dense", place, no_reload),
        replace(one_core, command=("taskset", "-c", core, *one_core.command)),
    ]
    for name, options in (("keep", keep), ("dense", ())):
        variants.append(our_variant(f"{name}-checked", place, options))
        loaded = our_variant(f"{name}-loaded", place, (*options, "--reload-check"))
        variants.append(replace(loaded, slow=True, optional=True))

    def peer(name: str, python: str, program: str) -> Variant:
        imports = (python, "-c", "import torch, transformers")
        command = (python, "-c", program, *inputs)
        return Variant(name=name, command=command, warm_up=imports, slow=True, optional=True)

    if kind != "w4a16":
        variants.append(peer("library-loop", sys.executable, BITSANDBYTES_LOOP))
        variants.append(peer("peft-dequantized", sys.executable, PEFT_DEQUANTIZED))
    elif ct_python is not None:
        variants.append(peer("library-load", str(ct_python), COMPRESSED_TENSORS_LOAD))
    return variants


def compare_outputs(place: Place, variants: Sequence[Variant], keep: Path) -> list[Comparison]:
    """The dense merge beside the library's own, and what `--quantized keep` changed of the base.

    Imports torch: last.
    """
    by_name = {variant.name: variant for variant in variants}
    found = []
    for name, reference in (("dense", "library-loop"), ("keep", None)):
        other = place.base
        if reference is not None:
            if reference not in by_name:
                continue
            clear(place.run)
            measure(by_name[reference].command)
            shutil.rmtree(keep, ignore_errors=True)
            place.output.rename(keep)
            other = keep
        clear(place.run)
        measure(by_name[name].command)
        found.append(compare(name, place.output, other, place.base))
    shutil.rmtree(keep, ignore_errors=True)
    return found


def summarize(kind: str, runs: Sequence[Run], variants: Sequence[Variant], dense_bytes: int) -> list[Row]:
    """One row per variant; all runs of the same base and cache state.

    What writes a dense model is not compared with `cp`.
    """
    rows = []
    for row in harness.summarize(runs, [variant.name for variant in variants]):
        dense = row.variant != "cp" and not row.variant.startswith("keep")
        figures = asdict(row) | ({"ratio_to_cp": None} if dense else {})
        rows.append(
            Row(
                **figures,
                kind=kind,
                output_mb_s=dense_bytes / 1e6 / row.wall_median_s if dense else None,
                output_mb_s_a_core=dense_bytes / 1e6 / row.cpu_median_s if dense else None,
            )
        )
    return rows


def table(rows: Iterable[Row]) -> str:
    """Markdown."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    head = (
        "base", "", "runs", "median s", "min s", "ratio to `cp`", "CPU s", "MB/s", "MB/s a core", "peak MiB",
        "disk read MiB",
    )  # fmt: skip
    cells = (
        (
            row.kind,
            row.variant,
            str(row.runs),
            number(row.wall_median_s, 2),
            number(row.wall_min_s, 2),
            number(row.ratio_to_cp, 2),
            number(row.cpu_median_s, 2),
            number(row.output_mb_s, 0),
            number(row.output_mb_s_a_core, 0),
            number(row.peak_rss_mib, 0),
            number(row.disk_read_median_mib, 0),
        )
        for row in rows
    )
    return markdown(head, cells, words=2)


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench"), help="keeps the models")
    parser.add_argument(
        "--kinds", type=partial(chosen, names=QUANTIZED), default=tuple(QUANTIZED), metavar="KIND,..."
    )
    parser.add_argument("--only", metavar="NAME,...", help="of the variants; default all")
    parser.add_argument("--rounds", type=positive, default=7, help="default 7")
    parser.add_argument("--slow-rounds", type=positive, default=5, help="of them with the peers; default 5")
    parser.add_argument("--cold", action="store_true", help="also with the page cache dropped; needs root")
    parser.add_argument("--no-compare", action="store_true", help="leave out the comparison of the results")
    parser.add_argument(
        "--ct-python", type=Path, metavar="FILE", help="python of llmcompressor's environment"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run and every figure")
    given = parser.parse_args()
    folder: Path = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    left_out: dict[str, str] = {}
    kinds = make_bases(folder, given.kinds, given.ct_python, left_out)
    dense, adapter = make_llama(folder)
    report = Report(f"{machine_line(folder)}, {processor()}", left_out=left_out)
    print(report.machine)
    reason = why_no_cold() if given.cold else "not asked for"
    if given.cold and reason:
        left_out["cold cache"] = reason
    caches = ("warm",) if reason else ("warm", "cold")
    slow_rounds = min(given.slow_rounds, given.rounds)
    with tempfile.TemporaryDirectory(prefix="quantized-", dir=folder) as scratch:
        for kind in kinds:
            place = Place(folder / f"llama-1.1b-{kind}", adapter, Path(scratch) / "run")
            variants = make_variants(place, dense, kind, given.ct_python)
            if given.only:
                variants = [variant for variant in variants if variant.name in given.only.split(",")]
            for cache in caches:
                failed: dict[str, str] = {}
                try:
                    runs = run_rounds(
                        variants,
                        place,
                        cache=cache,
                        rounds=given.rounds,
                        slow_rounds=slow_rounds,
                        left_out=failed,
                    )
                except CommandFailed as problem:
                    sys.exit(str(problem))
                left_out.update({f"{kind}, {name}": problem for name, problem in failed.items()})
                report.load.append(f"{kind} {cache}: {os.getloadavg()[1]:.1f}")
                report.runs[f"{kind} {cache}"] = runs
                rows = summarize(kind, runs, variants, int(size_mib(dense, "*.safetensors") * MIB))
                report.rows.extend(rows)
                print(f"\n{cache} cache, load {report.load[-1].split()[-1]}\n\n{table(rows)}", flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
        # only now: compare imports torch, and no child shows a smaller peak RSS than the process
        # it comes from
        for kind in kinds if not given.no_compare and not given.only else ():
            place = Place(folder / f"llama-1.1b-{kind}", adapter, Path(scratch) / "run")
            variants = make_variants(place, dense, kind, given.ct_python)
            report.comparisons[kind] = compare_outputs(place, variants, Path(scratch) / "reference")
            for found in report.comparisons[kind]:
                print_comparison(kind, found)
    print_left_out(left_out)
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


def print_comparison(kind: str, found: Comparison) -> None:
    unlike = found.unlike
    if found.variant == "keep":
        leaves = sorted({name.rpartition(".")[2] for name in unlike})
        print(f"{kind} keep: of {found.tensors} tensors {len(unlike)} unlike the base's: {', '.join(leaves)}")
    else:
        verdict = (
            "all bit-identical to the library's" if not unlike else f"{len(unlike)} unlike, as {unlike[0]}"
        )
        print(f"{kind} dense: {found.tensors} tensors, {verdict}")


if __name__ == "__main__":
    main()
