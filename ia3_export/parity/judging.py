"""From runs to the steps of the chain: distances, gates, findings, and the first module that is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ia3_export.fold import Array
from ia3_export.parity.discrimination import (
    BASE,
    Likeness,
    discrimination,
    likeness_gates,
    likenesses,
)
from ia3_export.parity.gates import (
    EFFECT,
    at_least,
    at_most,
    coarser,
    computes_in,
    quantized_gates,
    rms_bound,
    rounding_bound,
)
from ia3_export.parity.localisation import layer_errors, locate
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
    root_mean_square,
)
from ia3_export.parity.runs.wrong import thinned
from ia3_export.parity.settings import Tolerance
from ia3_export.report.model import (
    MAX_ERROR,
    ArtifactKind,
    Discrimination,
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
    bounds = _bounds(artifact, unmerged, reference)
    excuse = min(bounds.largest, distance.max_error)
    generation = _generation(artifact, unmerged, excuse)
    likes = _likenesses(artifact, merged, unmerged) if unmerged.adapters else []
    if tolerance is not None:
        gates = [at_most("max error beyond rtol", beyond(outputs, reference, tolerance.rtol), tolerance.atol)]
    elif artifact.precision in INTEGER_PRECISIONS:
        gates = [*quantized_gates(artifact.precision, distance, share), *likeness_gates(likes)]
    else:
        gates = [
            at_most(MAX_ERROR, distance.max_error, bounds.largest),
            at_most("root mean square error", distance.rms_error, bounds.rms),
            *_step_gates(artifact, merged, unmerged),
            *likeness_gates(likes),
            *_greedy_gate(generation, excuse),
        ]
    told, proof = None, evidence.proof_of(artifact.name)
    if unmerged.adapters and tolerance is None:
        told = discrimination(likes, _sizes(artifact, unmerged, bounds))
        gates += _needed(told, proof)
    layers: tuple[LayerError, ...] = ()
    if artifact.kind == "merged" and merged is not None:
        layers = layer_errors(merged.run, unmerged, coarser(artifact.precision, artifact.weights))
    passed, finding = all(gate.passed for gate in gates), "in parity"
    location: FaultLocation | None = None
    if not passed:
        location = locate(layers, unmerged.reference.modules, proof, evidence.sites)
        finding = _finding(_Effect(outputs, plain, reference, share), distance, location, gates)
    return replace(
        _failed(artifact, finding),
        passed=passed,
        gates=tuple(gates),
        distance=distance,
        loss=apart(before) if before is not None else None,
        library=apart(unmerged.library.outputs) if unmerged.library is not None else None,
        effect_present=share,
        discrimination=told,
        generation=generation,
        error_histogram=error_histogram(outputs, reference),
        layers=layers,
        location=location,
    )


def _generation(artifact: Artifact, unmerged: UnmergedRuns, excuse: float) -> Generation | None:
    if unmerged.decoded is None or artifact.decoded is None:
        return None
    return compare_decoded(artifact.decoded, unmerged.decoded, excuse)


def _greedy_gate(generation: Generation | None, excuse: float) -> Iterator[Gate]:
    if generation is not None:
        yield Gate("greedy decoding", generation.margin or 0.0, "<=", 2 * excuse, generation.excused)


def _needed(told: Discrimination, proof: WeightsProof | None) -> Iterator[Gate]:
    """Where the weights are not proven, the forwards must be able to tell."""
    proven = proof is not None and proof.passed and not proof.unproven
    if not proven and told.least is not None and told.least < 1:
        yield at_least("discrimination", told.least, 1.0)


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


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What rounding explains of the largest error and of its root mean square."""

    largest: float
    rms: float

    def times(self, apart: Distance) -> float:
        """How many times as large `apart` is, in the larger of the two."""
        return max(apart.max_error / self.largest, apart.rms_error / self.rms)


def _bounds(artifact: Artifact, unmerged: UnmergedRuns, reference: Outputs) -> _Bounds:
    dtype = coarser(computes_in(artifact.precision), artifact.weights)
    run = _part(unmerged.runs[dtype].outputs, reference, artifact.cases)
    return _bounds_of(run, reference, dtype, unmerged.adapters, runtime=artifact.kind == "onnx")


def _bounds_of(run: Outputs, exact: Outputs, dtype: str, adapters: int, *, runtime: bool) -> _Bounds:
    """From a right `run` in `dtype` beside the `exact` outputs."""
    own = distance_between(run, exact, dtype)
    scale, count = root_mean_square(exact)
    return _Bounds(
        rounding_bound(own.max_error, largest_magnitude(exact), dtype, adapters, runtime=runtime),
        rms_bound(own.rms_error, scale, count, dtype, adapters, runtime=runtime),
    )


def _step_gates(artifact: Artifact, merged: MergedRuns | None, unmerged: UnmergedRuns) -> list[Gate]:
    """Hold a graph that computes with weights of 16 bits to the exactness of its own arithmetic.

    The bound above is as wide as the rounding of the weights; beside the merged weights themselves, widened,
    the graph must be as exact as float32 (or float16) is.
    """
    if artifact.kind != "onnx" or merged is None or merged.single is None or merged.double is None:
        return []
    outputs, cases = artifact.outputs, artifact.cases
    dtype = "float32" if artifact.precision == "keep" else artifact.precision
    exact = _part(merged.double.outputs, outputs, cases)
    if dtype == "float32":
        bounds = _bounds_of(
            _part(merged.single.outputs, exact, cases), exact, dtype, unmerged.adapters, runtime=True
        )
    elif dtype in unmerged.runs:
        run = _part(unmerged.runs[dtype].outputs, exact, cases)
        reference = _part(unmerged.reference.outputs, exact, cases)
        bounds = _bounds_of(run, reference, dtype, unmerged.adapters, runtime=True)
    else:
        return []
    apart = distance_between(outputs, exact, dtype)
    return [
        at_most("max error to the merged weights", apart.max_error, bounds.largest),
        at_most("root mean square error to the merged weights", apart.rms_error, bounds.rms),
    ]


def _likenesses(artifact: Artifact, merged: MergedRuns | None, unmerged: UnmergedRuns) -> list[Likeness]:
    """Those of the artifact; of a merged model of 16 bits those of its weights, without 16-bit products."""
    if artifact.kind == "merged" and merged is not None and merged.single is not None:
        return likenesses(merged.single.outputs, artifact.cases, unmerged)
    return likenesses(artifact.outputs, artifact.cases, unmerged)


def _sizes(artifact: Artifact, unmerged: UnmergedRuns, bounds: _Bounds) -> dict[str, float]:
    """How many times the gates of an error's size the errors of the base and of wrong models are."""
    exact = _part(unmerged.reference.outputs, artifact.outputs, artifact.cases)
    plain = _part(unmerged.plain.outputs, exact, artifact.cases)
    apart = distance_between(plain, exact, "float64")
    if artifact.precision in INTEGER_PRECISIONS:
        return {BASE: max(map(_times, quantized_gates(artifact.precision, apart, None)), default=0.0)}
    if not bounds.largest:  # all outputs are zero
        return {BASE: 0.0}
    exact = thinned([unmerged.reference.outputs[i] for i in unmerged.wrong.cases])
    wrong = {
        name: bounds.times(distance_between(outputs, exact, "float64"))
        for name, outputs in unmerged.wrong.outputs.items()
    }
    return {BASE: bounds.times(apart)} | wrong


def _times(gate: Gate) -> float:
    """How many times the distance that `gate` allows its value is."""
    assert gate.value is not None
    return gate.value / gate.limit if gate.relation == "<=" else (1 - gate.value) / (1 - gate.limit)


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
