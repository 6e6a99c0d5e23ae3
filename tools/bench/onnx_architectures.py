"""Every architecture that ``onnx`` is made for, exported from base + adapter and proven at untraced shapes.

    python tools/bench/onnx_architectures.py [--only llama,bert] [--precision fp32,int8,int4]

Tiny models of transformers with an IA3 adapter of PEFT (tests/support/zoo). Prints a Markdown table: the
largest error of ONNX Runtime beside base + live adapters in float64, the bound that rounding explains
(docs/parity.md), the inputs, greedy decoding through the cache, operators, seconds.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

from harness import make_parser

sys.path.insert(0, str(Path(__file__).parents[2]))

from ia3_export import GraphOptions, export_onnx
from ia3_export.errors import IA3ExportError
from tests.support import zoo

ARCHITECTURES = (
    # decoders: PEFT's IA3 table, and more
    "gpt2", "bloom", "opt", "gptj", "gpt_neox", "gpt_neo", "gpt_bigcode", "falcon-multi-query",
    "falcon-new-decoder", "llama", "llama4-text", "mistral", "mixtral", "phi", "gemma", "gemma2",
    "gemma3-text", "qwen2", "qwen3", "phi3", "smollm3", "granite", "olmo2", "glm", "persimmon",
    "codegen", "xglm", "biogpt", "roberta-causal-lm", "qwen2_moe", "olmoe",
    # encoders
    "bert-seq-cls", "bert-masked-lm", "roberta-seq-cls", "roberta-masked-lm", "distilbert", "deberta",
    "deberta-v2", "modernbert", "albert", "mpnet", "electra", "xlm-roberta", "llama-seq-cls", "t5-encoder",
    # encoder-decoders
    "t5", "t5-gated", "mt5", "bart", "marian", "m2m_100", "whisper",
    # images and sound
    "vit", "deit", "beit", "dinov2", "convnext", "resnet-basic", "resnet-bottleneck", "regnet", "swin",
    "wav2vec2", "hubert",
)  # fmt: skip


def main() -> None:
    """The table."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names = arguments.only.split(",") if arguments.only else ARCHITECTURES
    print("| architecture | task | precision | max error | bound | of the bound | greedy | operators | s |")
    print("| --- | --- | --- | --: | --: | --: | --- | --: | --: |")
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            for row in _rows(name, Path(scratch) / name, arguments.precision.split(",")):
                print(row, flush=True)


def _rows(name: str, folder: Path, precisions: list[str]) -> list[str]:
    kind = zoo.by_name(name)
    model = zoo.build(kind)
    model.save_pretrained(folder / "base")
    zoo.adapt(model, kind).save_pretrained(folder / "adapter")
    start = time.perf_counter()
    try:
        done = export_onnx(
            folder / "out",
            base=folder / "base",
            adapters=[folder / "adapter"],
            graphs=GraphOptions(precisions=precisions),
        )
    except IA3ExportError as error:
        return [f"| {name} | {type(error).__name__} | {error} |"]
    seconds = time.perf_counter() - start
    assert done.report is not None
    rows = []
    for step in done.report.steps:
        gate = next((gate for gate in step.gates if gate.name == "max error"), None)
        bound = "" if gate is None else f"{gate.limit:.1e}"
        share = "" if gate is None or not gate.limit else f"{gate.value / gate.limit:.1%}"
        generation = step.generation
        greedy = (
            ""
            if generation is None
            else "equal"
            if generation.first_divergence is None
            else f"from {generation.first_divergence}"
        )
        largest = f"{step.distance.max_error:.1e}" if step.distance else ""
        rows.append(
            f"| {name} | {done.task} | {step.precision} | {largest} | {bound} | {share} | {greedy} | "
            f"{_operators(folder / 'out')} | {seconds:.0f} |"
        )
    return rows


def _operators(folder: Path) -> int:
    import onnx

    return sum(
        len(onnx.load(path, load_external_data=False).graph.node)
        for path in (folder / "onnx").glob("*.onnx")
        if path.stem in ("model", "encoder_model", "decoder_model_merged")
    )


if __name__ == "__main__":
    main()
