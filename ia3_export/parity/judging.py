"""From runs to the steps of the chain: distances, gates, findings, and the first module that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ia3_export.fold import Array
from ia3_export.parity.gates import EFFECT, at_most, coarser, computes_in, quantized_gates, rounding_bound
from ia3_export.parity.runs.forwards import MergedRuns, UnmergedRuns
from ia3_export.parity.runs.greedy import Decoded, compare_decoded
from ia3_export.parity.runs.metrics import (
    Outputs,
    beyond,
    distance_between,
    effect_present,
    error_histogram,
    largest_magnitude,
    perplexity,
)
from ia3_export.parity.runs.run_torch import ForwardOutputs
from ia3_export.parity.settings import Tolerance
from ia3_export.report.model import (
    MAX_ERROR,
    ArtifactKind,
    Distance,
    FaultLocation,
    Gate,
    Generation,
    LayerError,
    Step,
    WeightsProof,
)
from ia3_export.words import INTEGER_PRECISIONS


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What is known of the weights: the `proofs` of artifacts, and modules with a vector → the stored tensors
    that it is folded into (`sites`).
    """

    proofs: Sequence[WeightsProof]
    sites: Mapping[str, Sequence[str]]

    def proof_of(self, name: str) -> WeightsProof | None:
        """The proof of the artifact called so."""
        return next((proof for proof in self.proofs if proof.name == name), None)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Artifact:
    """One artifact's outputs and what is known of it.

    `weights` is the dtype its weights were rounded to, `cases` the indices of the inputs it was run on,
    `decoded` its greedy decoding.
    """

    name: str
    kind: ArtifactKind
    file: str
    precision: str
    weights: str
    runs_on: str
    outputs: Outputs
    cases: Sequence[int]
    decoded: Sequence[Decoded] | None = None


def judge(
    artifact: Artifact,
    unmerged: UnmergedRuns,
    before: Outputs | None,
    merged: MergedRuns | None,
    evidence: Evidence,
    tolerance: Tolerance | None,
) -> Step:
    """Compare one artifact with the reference.

    `before` are the outputs of the step before it (on all inputs), `merged` the merged model's runs.
    """
    outputs, cases = artifact.outputs, artifact.cases
    reference = _part(unmerged.reference.outputs, outputs, cases)
    plain = _part(unmerged.plain.outputs, outputs, cases)
    if not all(reference):
        theirs = sorted(unmerged.reference.outputs[0])
        return _failed(artifact, f"it has the outputs {sorted(outputs[0])}, the model {theirs}")
    numeric = computes_in(artifact.precision)

    def apart(others: Outputs) -> Distance:
        return _distance(outputs, _part(others, outputs, cases), numeric, unmerged, cases)

    try:
        distance = apart(unmerged.reference.outputs)
    except ValueError as error:
        return _failed(artifact, str(error))
    share = effect_present(outputs, reference, plain) if unmerged.adapters else None
    bound = _bound(artifact, unmerged, reference)
    generation: Generation | None = None
    if unmerged.decoded is not None and artifact.decoded is not None:
        generation = compare_decoded(artifact.decoded, unmerged.decoded, bound)
    if tolerance is not None:
        gates = [at_most("max error beyond rtol", beyond(outputs, reference, tolerance.rtol), tolerance.atol)]
    elif artifact.precision in INTEGER_PRECISIONS:
        gates = list(quantized_gates(artifact.precision, distance, share))
    else:
        gates = [at_most(MAX_ERROR, distance.max_error, bound)]
        gates += _step_gates(artifact, merged, unmerged.adapters)
        if generation is not None:
            value = generation.margin or 0.0
            gates.append(Gate("greedy decoding", value, "<=", 2 * bound, generation.excused))
    layers: tuple[LayerError, ...] = ()
    if artifact.kind == "merged" and merged is not None:
        layers = _layers(artifact, merged.run, unmerged)
    passed, finding = all(gate.passed for gate in gates), "in parity"
    location: FaultLocation | None = None
    if not passed:
        location = _locate(
            layers, unmerged.reference.modules, evidence.proof_of(artifact.name), evidence.sites
        )
        finding = _finding(_Effect(outputs, plain, reference, share), distance, location, gates)
    return Step(
        name=artifact.name,
        kind=artifact.kind,
        file=artifact.file,
        precision=artifact.precision,
        runs_on=artifact.runs_on,
        passed=passed,
        finding=finding,
        gates=tuple(gates),
        distance=distance,
        loss=apart(before) if before is not None else None,
        library=apart(unmerged.library.outputs) if unmerged.library is not None else None,
        effect_present=share,
        generation=generation,
        error_histogram=error_histogram(outputs, reference),
        layers=layers,
        location=location,
    )


def unmerged_distance(unmerged: UnmergedRuns, dtype: str) -> Distance:
    """How far the live model in `dtype` is from the reference."""
    every = range(len(unmerged.cases))
    return _distance(unmerged.runs[dtype].outputs, unmerged.reference.outputs, dtype, unmerged, every)


def failed_step(name: str, kind: ArtifactKind, file: str, precision: str, runs_on: str, finding: str) -> Step:
    """An artifact that could not be run."""
    return Step(
        name=name,
        kind=kind,
        file=file,
        precision=precision,
        runs_on=runs_on,
        passed=False,
        finding=finding,
    )


def _failed(artifact: Artifact, finding: str) -> Step:
    return failed_step(
        artifact.name, artifact.kind, artifact.file, artifact.precision, artifact.runs_on, finding
    )


def _part(whole: Outputs, outputs: Outputs, cases: Sequence[int]) -> list[dict[str, Array]]:
    """The inputs and output names of `whole` that `outputs` have too."""
    return [
        {name: values for name, values in whole[i].items() if name in output}
        for i, output in zip(cases, outputs, strict=True)
    ]


def _distance(
    outputs: Outputs, reference: Outputs, dtype: str, unmerged: UnmergedRuns, cases: Sequence[int]
) -> Distance:
    distance = distance_between(outputs, reference, dtype)
    if not unmerged.causal:
        return distance
    used = [unmerged.cases[i].tensors for i in cases]
    if any("input_ids" not in tensors for tensors in used):
        return distance
    ids = [tensors["input_ids"].numpy() for tensors in used]
    masks = [tensors["attention_mask"].numpy() if "attention_mask" in tensors else None for tensors in used]
    mine, theirs = (perplexity(each, ids, masks) for each in (outputs, reference))
    if mine is None or not theirs:
        return distance
    return replace(distance, perplexity_change=mine / theirs - 1)


def _bound(artifact: Artifact, unmerged: UnmergedRuns, reference: Outputs) -> float:
    dtype = coarser(computes_in(artifact.precision), artifact.weights)
    run = _part(unmerged.runs[dtype].outputs, reference, artifact.cases)
    own = distance_between(run, reference, dtype).max_error
    return rounding_bound(
        own, largest_magnitude(reference), dtype, unmerged.adapters, runtime=artifact.kind == "onnx"
    )


def _step_gates(artifact: Artifact, merged: MergedRuns | None, adapters: int) -> list[Gate]:
    """Hold a graph that computes in float32 with weights of 16 bits to the exactness of float32.

    The bound above is as wide as the rounding of the weights; beside the merged weights themselves, widened,
    the graph must be as exact as float32 is.
    """
    if artifact.kind != "onnx" or merged is None or merged.single is None or merged.double is None:
        return []
    if artifact.precision != "float32":
        return []
    outputs = artifact.outputs
    exact = _part(merged.double.outputs, outputs, artifact.cases)
    own = distance_between(_part(merged.single.outputs, exact, artifact.cases), exact, "float32").max_error
    limit = rounding_bound(own, largest_magnitude(exact), "float32", adapters, runtime=True)
    return [
        at_most(
            "max error to the merged weights", distance_between(outputs, exact, "float32").max_error, limit
        )
    ]


def _layers(artifact: Artifact, run: ForwardOutputs, unmerged: UnmergedRuns) -> tuple[LayerError, ...]:
    dtype = coarser(artifact.precision, artifact.weights)
    own = unmerged.runs[dtype].modules
    rows = []
    for module, exact in unmerged.reference.modules.items():
        mine, theirs = run.modules.get(module), own.get(module)
        if mine is None or theirs is None or not (mine.shape == theirs.shape == exact.shape):
            continue
        scale = float(np.abs(exact).max(initial=0.0))
        error, live = (_largest_error(values, exact) for values in (mine, theirs))
        bound = rounding_bound(live, scale, dtype, unmerged.adapters, layer=True)
        rows.append(
            LayerError(
                module=module, scale=scale, unmerged=live, error=error, bound=bound, passed=error <= bound
            )
        )
    return tuple(rows)


def _largest_error(values: Array, exact: Array) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(values - exact), nan=np.inf).max(initial=0.0))


def _locate(
    layers: Sequence[LayerError],
    order: Mapping[str, Array],
    proof: WeightsProof | None,
    sites: Mapping[str, Sequence[str]],
) -> FaultLocation | None:
    """The first module out of its bound, and its site: the last one executed up to there whose weights are
    wrong, else the last.
    """
    first = next((layer.module for layer in layers if not layer.passed), None)
    if first is None:
        return None
    executed = list(order)
    before = [module for module in reversed(executed[: executed.index(first) + 1]) if module in sites]
    findings = {finding.tensor: finding for finding in proof.findings} if proof is not None else {}
    wrong = next((module for module in before if findings.keys() & sites[module]), None)
    site = wrong or next(iter(before), None)
    if proof is None:
        return FaultLocation(first, site, "its weights were not compared")
    if not findings:
        return FaultLocation(first, site, "every tensor is what it must be")
    chosen = findings.keys() & sites[wrong] if wrong is not None else findings.keys()
    finding = next(finding for name, finding in findings.items() if name in chosen)
    return FaultLocation(
        first, site if wrong else None, f"{finding.tensor}: {finding.what}; {finding.detail}"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Effect:
    """What the adapters do to the outputs, and which `share` of it an artifact's show."""

    outputs: Outputs
    plain: Outputs
    reference: Outputs
    share: float | None


def _finding(
    effect: _Effect, distance: Distance, location: FaultLocation | None, gates: Sequence[Gate]
) -> str:
    whole, share = distance_between(effect.plain, effect.reference, "float64").max_error, effect.share
    text = f"off by {distance.max_error / whole:.2g} of the adapters' effect" if whole else "not in parity"
    broken = [gate for gate in gates if not gate.passed and gate.value is not None]
    if broken and broken[0].name != MAX_ERROR:
        text = (
            f"{broken[0].name} is {broken[0].value:.3g}, must be {broken[0].relation} {broken[0].limit:.3g}"
        )
    if whole and distance_between(effect.outputs, effect.plain, "float64").max_error < 0.1 * whole:
        text = "it computes the base: the adapter is not in it"
    elif share is not None and np.isfinite(share) and not EFFECT[0] <= share <= EFFECT[1]:
        text += f", it shows {share:.0%} of it"
    if location is not None:
        text += f"; first wrong at {location.module}"
    return text
