"""Reports as `verify` would make them, without any model: what the writers' tests draw."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from ia3_export.report.model import (
    Discrimination,
    Distance,
    FaultLocation,
    Gate,
    Generation,
    LayerError,
    ModelId,
    Reference,
    Report,
    SiteSummary,
    Step,
    TensorFinding,
    WeightsProof,
)

_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "output.dense")  # fmt: skip
_LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def good() -> Report:
    """MiniLM with a classification adapter: merged, ONNX, float16 and int8, all in parity."""
    modules = [f"bert.encoder.layer.{i}.{part}" for i in range(6) for part in _BERT] + ["classifier"]
    scale = 8.31
    merged = _step("merged", "merged", "float32", 3.1e-06, 1.17e-05, scale, modules=modules)
    onnx = _step("onnx", "onnx", "float32", 4.4e-06, 1.17e-05, scale, loss=2.6e-06)
    half = _step("onnx float16", "onnx", "float16", 0.0031, 0.0183, scale, loss=0.0031)
    int8 = _step("onnx int8", "onnx", "int8", 0.141, 0.42, scale, loss=0.141, effect=0.987)
    int8 = replace(
        int8,
        gates=(
            *int8.gates,
            Gate("top-1 agreement", 1.0, ">=", 0.99, True),
            Gate("cosine", 0.9997, ">=", 0.999, True),
        ),
    )
    digest = f"{random.Random(9).getrandbits(256):064x}"
    return Report(
        in_parity=True,
        base=ModelId("sentence-transformers/all-MiniLM-L6-v2", "8b3219a92973c328a8e22fadcfa821b5dc75636a"),
        adapters=(ModelId("intent-ia3", None),),
        weights=(
            WeightsProof(
                name="merged",
                kind="merged",
                file="merged",
                passed=True,
                changed=38,
                unchanged=66,
                nbytes=90_868_376,
                notes=("pooler.dense is in the base only by name: its 2 tensors were never trained",),
            ),
            WeightsProof(
                name="onnx",
                kind="onnx",
                file="model.onnx",
                passed=True,
                changed=38,
                unchanged=61,
                computed=14,
                nbytes=91_004_112,
            ),
        ),
        reference=_reference("BertForSequenceClassification", "peft", 2.9e-06, 3.94, scale),
        steps=(merged, onnx, half, int8),
        sites=tuple(
            _site("intent-ia3", f"bert.encoder.layer.{i}.{part}", i, 1536 if part == "output.dense" else 384)
            for i in range(6)
            for part in (
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
                "output.dense",
            )
        ),
        options={"combine": "product", "device": "cpu", "seed": "0", "precisions": "float16, int8"},
        environment={
            "ia3-export": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.17.1",
            "peft": "0.19.0",
            "onnxruntime": "1.23.2",
            "python": "3.11.7",
            "cpu": "AMD EPYC 9R14, 2 cores",
        },
        digests={"merged/model.safetensors": f"sha256:{digest}", "onnx/model.onnx": f"sha256:{digest[::-1]}"},
        warnings=(),
    )


def failing() -> Report:
    """A Llama of 22 blocks with two adapters, a vector left out of the merge, an ONNX file that holds NaN."""
    modules = ["model.embed_tokens"] + [f"model.layers.{i}.{part}" for i in range(22) for part in _LLAMA]
    modules += ["model.norm", "lm_head"]
    scale, broken = 21.4, "model.layers.9.mlp.down_proj"
    finding = (
        f"the vector of {broken} is not in the merged weights; "
        "0.412 of 18.9 (2.18 %) of the effect is missing"
    )
    left_out = (
        TensorFinding(
            f"{broken}.weight",
            "left out",
            "equals the base's bytes, though the adapter domain-vocabulary-ia3 scales its 5,632 columns",
        ),
        TensorFinding(
            "model.layers.3.self_attn.k_proj.weight",
            "applied twice",
            "256 of 256 rows are the base times the square of the vector",
        ),
    )
    missing = tuple(
        TensorFinding(
            f"onnx::MatMul_{4000 + i}",
            "missing",
            f"no initializer equals the fold of model.layers.{i % 22}.{_LLAMA[i % 7]}.weight",
        )
        for i in range(63)
    )
    merged = _step(
        "merged",
        "merged",
        "bfloat16",
        0.412,
        0.188,
        scale,
        loss=0.43,
        effect=0.961,
        modules=modules,
        broken=broken,
        finding=finding,
        causal=True,
        generation=Generation(64, 4, 11, 0.73, False),
    )
    nan = Step(
        name="onnx",
        kind="onnx",
        file="model.onnx",
        precision="bfloat16",
        runs_on="ONNX Runtime 1.23.2, CUDA:0",
        passed=False,
        finding="the output holds NaN on input 'batch 3, length 17, padded'",
        gates=(Gate("max error", None, "<=", 0.188, False), Gate("effect present", None, ">=", 0.9, False)),
    )
    half = _step(
        "onnx float16",
        "onnx",
        "float16",
        0.021,
        0.151,
        scale,
        loss=0.4,
        effect=0.9991,
        causal=True,
        generation=Generation(64, 4, 40, 1e-04, True),
    )
    return Report(
        in_parity=False,
        base=ModelId("TinyLlama/TinyLlama_v1.1", None),
        adapters=(ModelId("support-tone-ia3", "main"), ModelId("domain-vocabulary-ia3", None)),
        weights=(
            WeightsProof(
                name="merged",
                kind="merged",
                file="merged",
                passed=False,
                changed=65,
                unchanged=135,
                nbytes=2_200_119_864,
                findings=left_out,
            ),
            WeightsProof(
                name="onnx",
                kind="onnx",
                file="model.onnx",
                passed=False,
                changed=64,
                unchanged=130,
                computed=22,
                nbytes=2_212_004_100,
                findings=missing,
                notes=("22 initializers were computed by the exporter (rotary tables, masks)",),
            ),
        ),
        reference=_reference("LlamaForCausalLM", "hooks", 0.047, 18.9, scale, dtype="bfloat16"),
        steps=(merged, nan, half),
        sites=tuple(
            _site(
                ("support-tone-ia3", "domain-vocabulary-ia3")[i % 2],
                f"model.layers.{i}.{part}",
                i,
                size,
                negative=i == 9,
            )
            for i in range(22)
            for part, size in (("self_attn.k_proj", 256), ("self_attn.v_proj", 256), ("mlp.down_proj", 5632))
        ),
        options={"combine": "delta", "weights": "1.0, 0.5", "device": "cuda", "seed": "7"},
        environment={"ia3-export": "0.1.0", "torch": "2.13.0", "gpu": "NVIDIA H200", "python": "3.12.3"},
        digests={},
        warnings=(
            "PEFT does not know how to combine by delta: the vectors were applied by hooks",
            "1 of 4 sequences ends before 64 tokens",
        ),
    )


def weights_only() -> Report:
    """``--weights-only``: no forward, so neither reference nor steps."""
    return replace(
        good(), reference=None, steps=(), options={"combine": "product", "weights only": "yes"}, digests={}
    )


def large(modules: int, sites: int) -> Report:
    """Two steps that watch `modules` modules each, and `sites` vectors; one module is out of bound."""
    names = [f"model.layers.{i // 7}.{_LLAMA[i % 7]}" for i in range(modules)]
    broken = names[modules * 9 // 10]
    failed = _step(
        "merged float16",
        "merged",
        "float16",
        0.9,
        0.12,
        30.0,
        loss=0.9,
        effect=0.93,
        modules=names,
        broken=broken,
        finding=f"off by 0.9, first at {broken}",
        causal=True,
    )
    passed = _step("merged", "merged", "float32", 8e-06, 2e-05, 30.0, modules=names, causal=True)
    parts = (("self_attn.k_proj", 1024), ("self_attn.v_proj", 1024), ("mlp.down_proj", 28672))
    return replace(
        failing(),
        steps=(passed, failed),
        sites=tuple(
            _site("big-ia3", f"model.layers.{i // 3}.{parts[i % 3][0]}", i, parts[i % 3][1])
            for i in range(sites)
        ),
    )


def _reference(
    model_class: str, by: str, unmerged: float, effect: float, scale: float, dtype: str = "float32"
) -> Reference:
    return Reference(
        applied_by="peft" if by == "peft" else "hooks",
        model_class=model_class,
        precision="float64",
        dtype=dtype,
        runs_on="PyTorch 2.13.0, cpu",
        inputs=("batch 1, length 8", "batch 3, length 17, padded", "batch 2, length 5, padded"),
        origin="random token ids",
        unmerged=_distance(unmerged, scale, dtype, causal=False),
        effect=effect,
        scale=scale,
    )


def _distance(error: float, scale: float, precision: str, *, causal: bool) -> Distance:
    epsilon = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}.get(
        precision
    )
    ulp = error / scale / epsilon if epsilon else 0.0
    share = min(1.0, error / scale)
    return Distance(
        max_error=error,
        mean_error=error / 7.3,
        rms_error=error / 5.1,
        max_relative=error / scale * 31,
        mean_relative=error / scale * 2.1,
        max_ulp=ulp,
        mean_ulp=ulp / 9,
        cosine=1 - share**2,
        kl=share**2 / 3,
        max_kl=share**2,
        top1=1 - round(share, 2),
        top5=1 - round(share / 2, 2),
        perplexity_change=share / 5 if causal else None,
    )


def _step(
    name: str,
    kind: str,
    precision: str,
    error: float,
    bound: float,
    scale: float,
    *,
    loss: float | None = None,
    effect: float = 1.0,
    modules: list[str] | None = None,
    broken: str | None = None,
    finding: str = "within the rounding of the live model",
    causal: bool = False,
    generation: Generation | None = None,
) -> Step:
    passed = error <= bound
    layers = _layers(modules or [], broken, error / scale, bound / scale)
    gates = [
        Gate("max error", error, "<=", bound, passed),
        Gate("effect present", effect, ">=", 0.9, effect >= 0.9),
    ]
    if causal:
        gates.append(Gate("perplexity change", error / scale / 5, "<=", 0.01, error / scale / 5 <= 0.01))
    failed = next((layer.module for layer in layers if not layer.passed), None)
    told = f"{failed}.weight is left out: it equals the base's bytes"
    return Step(
        name=name,
        kind="merged" if kind == "merged" else "onnx",
        file="merged" if kind == "merged" else "model.onnx",
        precision=precision,
        runs_on="PyTorch 2.13.0, cpu" if kind == "merged" else "ONNX Runtime 1.23.2, cpu",
        passed=all(gate.passed for gate in gates),
        finding=finding,
        gates=tuple(gates),
        distance=_distance(error, scale, precision, causal=causal),
        loss=_distance(loss if loss is not None else error * 0.7, scale, precision, causal=causal),
        effect_present=effect,
        discrimination=Discrimination(40.0, 12.5, 10.0, "model.layers.3 left out") if effect else None,
        generation=generation or (Generation(12, 2, None, None, False) if causal else None),
        error_histogram=_histogram(error / scale),
        layers=layers,
        location=None if failed is None else FaultLocation(failed, failed, told),
    )


def _layers(modules: list[str], broken: str | None, error: float, bound: float) -> tuple[LayerError, ...]:
    draw = random.Random(len(modules))
    after, rows = False, []
    for i, module in enumerate(modules):
        after = after or module == broken
        grown = 0.15 + 0.85 * i / max(1, len(modules))
        scale = math.exp(draw.gauss(0.5, 0.9))
        limit = bound * scale * grown
        rounding = limit / 4 * math.exp(draw.gauss(0, 0.25))
        off = limit * draw.uniform(1.4, 9) if after else rounding * math.exp(draw.gauss(0, 0.2))
        rows.append(
            LayerError(
                module=module,
                scale=scale,
                unmerged=rounding,
                error=min(off, scale),
                bound=limit,
                passed=off <= limit,
            )
        )
    return tuple(rows)


def _histogram(worst: float) -> tuple[tuple[int, int], ...]:
    top = math.floor(math.log10(worst))
    counts = [(top - k, int(9000 * math.exp(-((k - 1.2) ** 2) / 2))) for k in range(5, -1, -1)]
    return ((-99, 212), *counts)


def _site(adapter: str, module: str, seed: int, size: int, *, negative: bool = False) -> SiteSummary:
    draw = random.Random(f"{module}{seed}")
    spread = 0.05 + 0.3 * (seed % 5) / 5
    values = [1 + draw.gauss(0.01, spread) * draw.random() for _ in range(min(size, 128))]
    if negative:
        values[7], values[70] = -0.31, -0.05
    amplified = sum(v > 1.01 for v in values) * size // len(values)
    inhibited = sum(abs(v) < 0.99 for v in values) * size // len(values)
    direction = "in" if size in (1536, 5632, 28672) else "out"
    return SiteSummary(
        adapter=adapter,
        module=module,
        direction="in" if direction == "in" else "out",
        size=size,
        minimum=min(values),
        maximum=max(values),
        mean=sum(values) / len(values),
        amplified=amplified,
        inhibited=inhibited,
        negative=sum(v < 0 for v in values),
        values=tuple(values),
    )
