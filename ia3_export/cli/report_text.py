"""The report of `verify` on a terminal, readable at 80 columns."""

from __future__ import annotations

from ia3_export.cli.output import Output
from ia3_export.drawing.formats import human_bytes, times
from ia3_export.report.model import Report, Step, WeightsProof
from ia3_export.report.wording import ON_TERMINAL, generation_in_words

_FINDINGS = 10


def show_report(out: Output, report: Report, verdict: str = "") -> None:
    """Show weights, chain, control, and at the end the verdict (or another); ``--verbose`` adds inputs, gates
    and all metrics.
    """
    for proof in report.weights:
        _show_proof(out, proof)
    if report.reference is not None:
        _show_chain(out, report)
    for warning in report.warnings:
        out.text(f"warning: {warning}")
    out.text(verdict or report.verdict)


def _show_proof(out: Output, proof: WeightsProof) -> None:
    made = f", {proof.computed:,} made by the exporter" if proof.computed else ""
    out.text(
        f"weights of {proof.name}: {proof.verdict if proof.passed else 'WRONG'}. {proof.changed:,} folded "
        f"and {proof.unchanged:,} untouched tensors equal bit for bit{made} ({human_bytes(proof.nbytes)})"
    )
    shown = proof.findings if out.verbose else proof.findings[:_FINDINGS]
    for finding in shown:
        out.text(f"  {finding.tensor}: {finding.what}; {finding.detail}")
    if len(proof.findings) > len(shown):
        out.text(f"  ... and {len(proof.findings) - len(shown)} more (--verbose shows all)")
    for note in proof.notes:
        out.text(f"  note: {note}")


def _show_chain(out: Output, report: Report) -> None:
    reference = report.reference
    assert reference is not None
    live = (
        f"base + live adapters (applied by {reference.applied_by})" if report.adapters else "the model itself"
    )
    out.text(
        f"{reference.model_class} in {reference.dtype}, {reference.runs_on}; reference: {live} in "
        f"{reference.precision}"
    )
    if out.verbose:
        for name in reference.inputs:
            out.text(f"  input: {name}")
    rows: list[tuple[str, ...]] = [
        (
            "unmerged" if report.adapters else "model",
            f"{reference.unmerged.max_error:.2e}",
            "",
            "",
            _share(reference.unmerged.top1),
            "",
        )
    ]
    rows += [_row(step) for step in report.steps]
    columns = ("", "max error", "bound", "effect", "top-1", "verdict")
    out.table(columns, rows, numbers=columns[1:5], optional=("top-1",))
    if report.adapters:
        out.text(f"control: the adapters change the base's outputs by up to {reference.effect:.3g}")
    for step in report.steps:
        if step.told_by is not None:
            out.text(
                f"{step.name}: a wrong artifact would be {times(step.told_by)} beyond the gates, or more"
            )
        _show_step(out, step)


def _row(step: Step) -> tuple[str, ...]:
    verdict = "ok" if step.passed else "FAILED"
    if step.distance is None:
        return step.name, "", "", "", "", verdict
    bound = "" if step.bound is None else f"{step.bound:.2e}"
    error, top1 = f"{step.distance.max_error:.2e}", _share(step.distance.top1)
    return step.name, error, bound, _share(step.effect_present), top1, verdict


def _show_step(out: Output, step: Step) -> None:
    if not step.passed:
        out.text(f"{step.name}: {step.finding}")
        for gate in step.gates:
            if not gate.passed:
                against = f"must be {gate.relation} {gate.limit:.3g}"
                out.text(
                    f"  {gate.name} is {gate.value:.3g}, {against}" if gate.value is not None else gate.name
                )
        if step.location is not None:
            site = f", site {step.location.site}" if step.location.site else ""
            out.text(
                f"  first module out of its bound: {step.location.module}{site} ({step.location.weights})"
            )
    if step.library is not None:
        out.text(
            f"{step.name}: max error {step.library.max_error:.3g} (mean {step.library.mean_error:.3g}) to "
            "the base as its own quantization library runs it, with live adapters"
        )
    if step.generation is not None and (out.verbose or step.generation.first_divergence is not None):
        out.text(f"{step.name}: {generation_in_words(step.generation, ON_TERMINAL)}")
    if out.verbose:
        _show_metrics(out, step)


def _show_metrics(out: Output, step: Step) -> None:
    for gate in step.gates:
        out.text(f"  gate: {gate.name} {gate.value:.3g} {gate.relation} {gate.limit:.3g}")
    for title, distance in (("to the reference", step.distance), ("to the step before", step.loss)):
        if distance is None:
            continue
        out.text(
            f"  {title}: mean {distance.mean_error:.2e}, relative {distance.max_relative:.2e} (mean "
            f"{distance.mean_relative:.2e}), {distance.max_ulp:.3g} ulp (mean {distance.mean_ulp:.3g}), "
            f"cosine {distance.cosine:.9f}"
        )
        if distance.kl is not None and distance.max_kl is not None:
            more = f", top-5 {_share(distance.top5)}" if distance.top5 is not None else ""
            more += (
                f", perplexity {distance.perplexity_change:+.2e}"
                if distance.perplexity_change is not None
                else ""
            )
            out.text(
                f"    KL {distance.kl:.2e} (largest {distance.max_kl:.2e}) nats, top-1 "
                f"{_share(distance.top1)}{more}"
            )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
