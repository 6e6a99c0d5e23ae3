"""The words of a report that several of its writers use: names of metrics, reasons of verdicts, decoding.

A page has more room than a comment or a terminal, so some words have two forms; all of them stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ia3_export.drawing.formats import number
from ia3_export.report.model import Generation, Report, Step, WeightsProof
from ia3_export.words import INTEGER_PRECISIONS

#: Of a verdict that no finding explains.
NO_FINDING = "a check failed that left no finding"


@dataclass(frozen=True, slots=True)
class Metric:
    """How a field of `Distance` is called on the page and, where that is too long, in Markdown (`brief`).

    `share`: it is shown as a percentage.
    """

    label: str
    brief: str = ""
    share: bool = False

    @property
    def short(self) -> str:
        """The label where there is little room."""
        return self.brief or self.label


#: The fields of `Distance`, in its order.
METRICS: Mapping[str, Metric] = {
    "max_error": Metric("max error"),
    "mean_error": Metric("mean error"),
    "rms_error": Metric("root mean square error"),
    "max_relative": Metric("max relative error"),
    "mean_relative": Metric("mean relative error"),
    "max_ulp": Metric("max error in ulp"),
    "mean_ulp": Metric("mean error in ulp"),
    "cosine": Metric("cosine"),
    "kl": Metric("KL divergence, mean (nats)", "KL, mean (nats)"),
    "max_kl": Metric("KL divergence, max (nats)", "KL, largest (nats)"),
    "top1": Metric("top-1 agreement", share=True),
    "top5": Metric("top-5 agreement", share=True),
    "perplexity_change": Metric("perplexity change", share=True),
}


def first_failure(report: Report) -> Step | WeightsProof | None:
    """What the verdict is about: the first step that failed, else the first proof of weights that did."""
    steps = (step for step in report.steps if not step.passed)
    return next(steps, None) or next((proof for proof in report.weights if not proof.passed), None)


def reason(report: Report) -> str:
    """Why the verdict is what it is, in a sentence: the first finding, or what holds of every artifact."""
    failure = first_failure(report)
    if isinstance(failure, Step):
        return f"{failure.name}: {failure.finding}"
    if failure is not None:
        return f"{failure.name}: {_first_finding(failure)}"
    if not report.in_parity:
        return NO_FINDING.capitalize()
    if not report.steps:
        return "Every tensor is the fold of base and adapters, or the base's own; no forward was run"
    if not any(step.precision in INTEGER_PRECISIONS for step in report.steps):
        return "Every artifact is within the rounding of the live model"
    return (
        "Every artifact is within its bounds, those in floating point within the rounding of the live model"
    )


def _first_finding(proof: WeightsProof) -> str:
    if not proof.findings:
        return "its weights are not what they must be"
    finding = proof.findings[0]
    return f"{finding.tensor} {finding.what}: {finding.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingWords:
    """What one writer says of greedy decoding.

    `run` has places for `tokens` and `sequences`, `differs` for the `token` at which they part, `excused` and
    `unexplained` for the `margin` of the reference there, which `number` writes; `unknown`: there is none.
    """

    run: str
    equal: str
    differs: str
    excused: str
    unexplained: str
    unknown: str = ""
    number: Callable[[float], str] = "{:.3g}".format


ON_PAGE = DecodingWords(
    run="{tokens} tokens x {sequences} sequences: ",
    equal="all equal",
    differs="first differs at token {token} (counted from 0)",
    excused=", where the reference's margin {margin} is within rounding: excused",
    unexplained=", where the reference's margin {margin} is more than rounding explains",
    number=number,
)
ON_TERMINAL = DecodingWords(
    run="greedy decoding of {tokens} tokens after each of {sequences} inputs: ",
    equal="all equal",
    differs="differs from token {token} on",
    excused=", by a margin of {margin}, which rounding explains",
    unexplained=", by a margin of {margin}, which rounding does not explain",
)
IN_JUNIT = DecodingWords(
    run="{sequences} sequences, {tokens} tokens: ",
    equal="all agree",
    differs="token {token} differs",
    excused=", margin of the reference {margin}, within what rounding may decide",
    unexplained=", margin of the reference {margin}",
    unknown=", margin of the reference unknown",
)
#: A cell of Markdown's table, whose other cells have the numbers.
IN_TABLE = DecodingWords(
    run="", equal="all agree", differs="differs at token {token}", excused="", unexplained=""
)


def generation_in_words(generation: Generation, words: DecodingWords) -> str:
    """What greedy decoding showed, in a sentence of `words`."""
    run = words.run.format(tokens=generation.tokens, sequences=generation.sequences)
    if generation.first_divergence is None:
        return run + words.equal
    text = run + words.differs.format(token=generation.first_divergence)
    if generation.margin is None:
        return text + words.unknown
    tail = words.excused if generation.excused else words.unexplained
    return text + tail.format(margin=words.number(generation.margin))
