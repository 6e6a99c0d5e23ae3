"""How far right merges stay below the default gate, over all model kinds of the zoo in three dtypes.

    python tools/bench/parity_margins.py [--dtypes float32,bfloat16,float16] [--seeds 1] \
        [--only llama,t5] [--onnx]

For every kind: a tiny model written by transformers, an adapter by PEFT, our merge, `verify` with its
defaults. Prints the kinds that fail or cannot be run, and (with --onnx, of the encoders' exports through ONNX
Runtime) the distribution of error/bound and of err(merged)/err(unmerged).
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from harness import make_parser, positive

from ia3_export import RunSettings

sys.path.insert(0, str(Path(__file__).parents[2]))


def main() -> None:
    """Print one line per dtype."""
    parser = make_parser(__doc__)
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--seeds", type=positive, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--onnx", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    from ia3_export import export_onnx, verify
    from ia3_export.errors import IA3ExportError
    from ia3_export.models.model_class import quiet
    from tests.support import zoo

    torch.set_num_threads(1)
    kinds = [k for k in zoo.KINDS if not options.only or k.name in options.only.split(",")]
    for dtype in options.dtypes.split(","):
        shares, factors, layers, failed, refused = [], [], [], [], []
        for kind in kinds:
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as folder, quiet():
                    model = zoo.build(kind, dtype=dtype)
                    model.save_pretrained(f"{folder}/base")
                    zoo.adapt(model, kind, seed=seed + 1).save_pretrained(f"{folder}/adapter")
                    try:
                        graphs = [f"{folder}/onnx"] if options.onnx else []
                        if options.onnx:
                            export_onnx(graphs[0], base=f"{folder}/base", adapters=[f"{folder}/adapter"])
                        report = verify(
                            f"{folder}/base",
                            [f"{folder}/adapter"],
                            onnx=graphs,
                            settings=RunSettings(seed=seed),
                        )
                    except IA3ExportError as error:
                        refused.append(f"{kind.name}: {error}")
                        continue
                step = report.steps[0]
                if not report.in_parity:
                    failed.append(
                        f"{kind.name} seed {seed}: {[g for g in step.gates if not g.passed]} "
                        f"{report.weights[0].findings[:2]}"
                    )
                gate = next(g for g in step.gates if g.name == "max error")
                assert step.distance is not None and report.reference is not None
                shares.append(step.distance.max_error / gate.limit)
                if report.reference.unmerged.max_error:
                    factors.append(step.distance.max_error / report.reference.unmerged.max_error)
                layers += [row.error / row.bound for row in step.layers if row.bound]
        print(
            f"{dtype}: {len(shares)} verified, {len(failed)} false alarms, {len(refused)} without a forward"
        )
        for name, values in (
            ("error / bound", shares),
            ("err(merged) / err(unmerged)", factors),
            ("layer error / bound", layers),
        ):
            q = np.quantile(values, [0.5, 0.9, 0.99, 1.0]) if values else [float("nan")] * 4
            print(f"  {name}: median {q[0]:.2f}, 90 % {q[1]:.2f}, 99 % {q[2]:.2f}, largest {q[3]:.2f}")
        for line in (*failed, *refused):
            print(f"  {line}")


if __name__ == "__main__":
    main()
