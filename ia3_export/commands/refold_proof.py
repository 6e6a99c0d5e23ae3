"""The proof of a refolded folder: its initializers, and its forwards beside the base's graphs with live
multiplications. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint.side_files import mapping
from ia3_export.commands.export_verdict import require
from ia3_export.commands.refolding import OnnxBase
from ia3_export.errors import Unsupported, first_line
from ia3_export.fold import Array
from ia3_export.onnx.exported import ENCODER
from ia3_export.onnx.live_graph import LiveFold, write_live
from ia3_export.onnx.places import read_graph_file
from ia3_export.onnx.refold import Rewriting
from ia3_export.onnx.runtime import OnnxModel, call, first_step, next_step, open_model
from ia3_export.parity.bits.graph_files import read_graphs
from ia3_export.parity.bits.refolded import prove_refolded
from ia3_export.parity.facts import digests, environment, model_id, summarize_sites
from ia3_export.parity.gates import at_most
from ia3_export.parity.runs.metrics import distance_between, effect_present, largest_magnitude
from ia3_export.planning.plan import Plan
from ia3_export.report.model import MAX_ERROR, Reference, Report, Step, WeightsProof
from ia3_export.words import CODED_PRECISIONS, TORCH_NAMES
from ia3_export.writing.stage import scratch_folder

#: Share of the adapters' effect that the error may be: rounding alone; vectors folded into 16-bit weights,
#: which were rounded again; activations that codes round to 8 bits, once before a vector and once after it.
_EXACT, _HALF, _CODED = 1e-3, 0.02, 0.1
#: Rounding of float32 in a forward, of the largest value.
_NOISE = {"fp32": 2e-5, "fp16": 2e-3}
_TOKENS = 12
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "In 1969, 3 astronauts flew to the Moon; 2 of them walked on it for hours.",
)
Outputs = list[dict[str, Array]]


def prove_refold(
    held: OnnxBase, plan: Plan, written: Sequence[Sequence[Rewriting]], stage: Path, target: Path
) -> Report:
    """The report of the folder in `stage`, made of `held`.

    Raises `CheckFailed`, with the stage kept aside, where it finds something wrong.
    """
    proofs: list[WeightsProof] = []
    steps: list[Step] = []
    references: list[Reference] = []
    with scratch_folder() as scratch:
        for number, (model, rewritten) in enumerate(zip(held.models, written, strict=True)):
            folds = {
                graph.path: [LiveFold(place, laid) for place, laid in rewriting.placed]
                for graph, rewriting in zip(model, rewritten, strict=True)
            }
            for graph, rewriting in zip(model, rewritten, strict=True):
                fresh = read_graph_file(graph.path)
                after = read_graph_file(stage / graph.path.relative_to(held.folder))
                name = f"onnx {read_graphs([graph.path]).precision}"
                name += f" {graph.path.name}" if len(model) > 1 else ""
                proofs.append(prove_refolded(fresh, after, folds[graph.path], rewriting.brought, name))
            live = [scratch / str(number) / graph.path.name for graph in model]
            for graph, rewriting, path in zip(model, rewritten, live, strict=True):
                write_live(graph.path, folds[graph.path], path, rewriting.heads)
            paths = [stage / graph.path.relative_to(held.folder) for graph in model]
            step, reference = _forwards(held, plan, paths, live, [graph.path for graph in model])
            steps.append(step)
            references.append(reference)
    report = Report(
        in_parity=all(proof.passed for proof in proofs) and all(step.passed for step in steps),
        base=model_id(plan.base.stored.location),
        adapters=tuple(model_id(adapter.location) for adapter in plan.adapters),
        weights=tuple(proofs),
        reference=references[0],
        steps=tuple(steps),
        sites=summarize_sites(plan.adapters),
        options={},
        environment=environment(),
        digests=digests(plan.base.stored, plan.adapters, None, [r.graph.path for rs in written for r in rs]),
        warnings=tuple(plan.warnings),
    )
    require(report, None, stage, target)
    return report


def _forwards(
    held: OnnxBase, plan: Plan, paths: Sequence[Path], live: Sequence[Path], base: Sequence[Path]
) -> tuple[Step, Reference]:
    """The graphs `paths` beside those with `live` multiplications, and the base's."""
    inputs, origin = _inputs(held, plan, base)
    size = _head_size(plan.base.stored.config or {})
    wanted, got, plain = (_run(_sized(open_model(some), size), inputs) for some in (live, paths, base))
    scale = largest_magnitude(wanted)
    effect = distance_between(plain, wanted, "float32").max_error
    distance = distance_between(got, wanted, "float32")
    precision = read_graphs(paths).precision
    limit = _limit(plan, precision, effect, scale)
    gate = at_most(MAX_ERROR, distance.max_error, limit)
    told = None if not effect else effect / limit
    finding = "" if gate.passed else "it does not compute what the base computes with live vectors"
    step = Step(
        name=f"onnx {precision}",
        kind="onnx",
        file=" + ".join(path.name for path in paths),
        precision=precision,
        runs_on="ONNX Runtime CPU",
        passed=gate.passed,
        finding=finding
        or ("equal" if told is None else f"the base would be {told:.0f} times beyond the gate"),
        gates=(gate,),
        distance=distance,
        effect_present=effect_present(got, wanted, plain),
    )
    none = distance_between(wanted, wanted, "float32")
    reference = Reference(
        applied_by="graph",
        model_class="ONNX Runtime",
        precision=precision,
        dtype=precision,
        runs_on="CPU",
        inputs=tuple(f"{len(ids)} texts" for ids in inputs[:1]),
        origin=origin,
        unmerged=none,
        effect=effect,
        scale=scale,
    )
    return step, reference


def _sized(model: OnnxModel, size: int) -> OnnxModel:
    """`model` with the head size of the cache, which the builder of onnxruntime-genai leaves open."""

    def shape(name: str, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        is_open = name.startswith("past") and len(axes) == 4 and isinstance(axes[-1], str)
        return (*axes[:-1], size) if is_open else axes

    return OnnxModel(
        {
            stem: replace(graph, inputs={name: shape(name, axes) for name, axes in graph.inputs.items()})
            for stem, graph in model.graphs.items()
        }
    )


def _head_size(config: Mapping[str, Any]) -> int:
    given = (config.get(name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    heads, width, size = (value if type(value) is int and value > 0 else None for value in given)
    return size or (width or 1) // (heads or 1) or 1


def _limit(plan: Plan, precision: str, effect: float, scale: float) -> float:
    """What rounding may make of the error."""
    stored = TORCH_NAMES.get(plan.base.dense.main_dtype, "float32")
    if precision in CODED_PRECISIONS:
        return _CODED * effect
    if precision == "float16" or stored in ("float16", "bfloat16"):
        return _HALF * effect + (_NOISE["fp16"] * scale if precision == "float16" else 0)
    return _EXACT * effect + _NOISE["fp32"] * scale


def _run(model: OnnxModel, inputs: Sequence[Mapping[str, Array]]) -> Outputs:
    """Outputs of every input, and where there is a cache of one more token after it.

    Raises `Unsupported` for a graph that does not run on them.
    """
    try:
        return _outputs(model, inputs)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise Unsupported(
            f"the graph does not run on inputs that were made up for it: {first_line(error)}",
            hint="--no-verify writes it unproven; ia3-export verify --inputs proves it on yours",
        ) from error


def _outputs(model: OnnxModel, inputs: Sequence[Mapping[str, Array]]) -> Outputs:
    results: Outputs = []
    for feed in inputs:
        if not model.cached and ENCODER not in model.graphs:
            results.append({n: v.numpy() for n, v in call(model.decoder, feed).items()})
            continue
        ids = feed["decoder_input_ids" if ENCODER in model.graphs else "input_ids"]
        step = first_step(model, feed, ids)
        results.append({name: value.numpy() for name, value in step.outputs.items()})
        if model.cached:
            step = next_step(model, step, ids[:, -1:])
            results.append({name: value.numpy() for name, value in step.outputs.items()})
    return [{name: np.asarray(value, "<f8") for name, value in result.items()} for result in results]


def _inputs(held: OnnxBase, plan: Plan, paths: Sequence[Path]) -> tuple[list[dict[str, Array]], str]:
    """Two texts of one length, by the folder's tokenizer where it has one; noise for images and sounds."""
    graph = next(iter(open_model(paths[:1]).graphs.values()))
    if "input_ids" not in graph.inputs:
        feed = {name: _noise(shape) for name, shape in graph.inputs.items()}
        return [feed | {"decoder_input_ids": _tokens(held, plan)[0][:, :4]}], "noise"
    tokens, origin = _tokens(held, plan)
    end = (plan.base.stored.config or {}).get("eos_token_id")
    if isinstance(end, int):  # BART's classifier reads the last of equally many ends
        tokens = np.where(tokens == end, end - 1 if end else 1, tokens)
        tokens[:, -1] = end
    mask = np.ones_like(tokens)
    return [{"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens[:, :4]}], origin


def _noise(shape: Sequence[Any]) -> Array:
    sizes = [axis if isinstance(axis, int) else 2 if i == 0 else 400 for i, axis in enumerate(shape)]
    return np.random.default_rng(0).standard_normal(sizes).astype("<f4")


def _tokens(held: OnnxBase, plan: Plan) -> tuple[Array, str]:
    path = held.folder / "tokenizer.json"
    vocabulary = _vocabulary(plan)
    if path.is_file():
        try:
            from tokenizers import Tokenizer

            reader = Tokenizer.from_file(str(path))
            rows = [reader.encode(text).ids[:_TOKENS] for text in _SENTENCES]
            if all(len(row) == _TOKENS and max(row) < vocabulary for row in rows):
                return np.array(rows, "<i8"), "two sentences"
        except Exception:  # the library's errors are of no class of their own; random tokens serve as well
            pass
    return np.random.default_rng(0).integers(0, vocabulary, (2, _TOKENS)), "random tokens"


def _vocabulary(plan: Plan) -> int:
    config = plan.base.stored.config or {}
    found = config.get("vocab_size") or mapping(config.get("text_config")).get("vocab_size")
    return found if isinstance(found, int) and found > 0 else 100
