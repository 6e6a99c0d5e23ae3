"""Which module is the first that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ia3_export.fold import Array
from ia3_export.parity.gates import rounding_bound
from ia3_export.parity.runs.forwards import UnmergedRuns
from ia3_export.parity.runs.run_torch import ForwardOutputs
from ia3_export.report.model import FaultLocation, LayerError, WeightsProof


def layer_errors(run: ForwardOutputs, unmerged: UnmergedRuns, dtype: str) -> tuple[LayerError, ...]:
    """The error of every module's output in `run`, in the order of execution, beside what rounding in `dtype`
    explains."""
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


def locate(
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
