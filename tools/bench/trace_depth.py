"""Seconds to trace a Llama of SmolLM2-135M's shape by number of layers: each kind of layer once, and every
layer.

``python tools/bench/trace_depth.py [--layers 2,4,8,30] [--every-up-to 8]``; random weights, one process, the
median of `--runs`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from harness import make_parser, markdown, positive

_SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--layers", default="2,4,8,30")
    parser.add_argument("--every-up-to", type=int, default=8)
    parser.add_argument("--runs", type=positive, default=1)
    options = parser.parse_args()
    _seconds(2, once=True)  # imports and caches
    rows = []
    for layers in map(int, options.layers.split(",")):
        once = statistics.median(_seconds(layers, once=True) for _ in range(options.runs))
        every = "not run"
        if layers <= options.every_up_to:
            every = f"{statistics.median(_seconds(layers, once=False) for _ in range(options.runs)):.1f} s"
        rows.append((str(layers), f"{once:.1f} s", every))
    print(markdown(("layers", "each kind once", "every layer"), rows))


def _seconds(layers: int, *, once: bool) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    from ia3_export.onnx import trace as tracing
    from ia3_export.onnx.contract import plan_graphs
    from ia3_export.onnx.layers import find_repeated
    from ia3_export.onnx.tasks import TASKS
    from ia3_export.parity.runs.inputs import sample_inputs

    config = LlamaConfig(**_SHAPE, num_key_value_heads=3, num_hidden_layers=layers)
    model = LlamaForCausalLM(config).eval()
    (spec,) = plan_graphs(model, TASKS["text-generation"], sample_inputs(model), "merged", None)

    def none(*_: Any) -> list[Any]:
        return []

    vars(tracing)["find_repeated"] = find_repeated if once else none
    start = time.perf_counter()
    tracing.trace(model, spec, 20)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
