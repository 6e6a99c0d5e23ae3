"""What came of an export: whether its files are put in place, and what quantization lost."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ia3_export.errors import CheckFailed
from ia3_export.report.model import Report, Step
from ia3_export.words import INTEGER_PRECISIONS
from ia3_export.writing.stage import set_aside


def require(report: Report, max_loss: float | None, stage: Path, target: Path) -> None:
    """Raise `CheckFailed`, with the `stage` set aside, where the `report` of an export for `target` finds
    something wrong, or quantization lost more than `max_loss`."""
    findings = [f"{f.tensor}: {f.what}" for proof in report.weights for f in proof.findings]
    findings += [f"{s.file}: {s.finding}" for s in report.steps if not s.passed and not _only_loses(s)]
    costly = []
    if max_loss is not None:
        costly = [
            lost(s) for s in report.steps if s.precision in INTEGER_PRECISIONS and loss_of(s) > max_loss
        ]
    if not findings and not costly:
        return
    (stage / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    aside = set_aside(stage, target)
    if not findings:
        raise CheckFailed(
            f"{costly[0]}, more than --max-loss {max_loss:g}",
            hint=f"the files and report.json are kept in {aside}, {target} was not written; try another "
            "--precision, or allow more",
        )
    raise CheckFailed(
        f"the exported graph does not compute what was trained: {findings[0]}",
        hint=f"the files and report.json are kept in {aside}, {target} was not written; try another "
        "--precision or --opset, and please report the architecture",
    )


def loss_of(step: Step) -> float:
    """What a quantized graph lost: mean KL divergence in nats, one minus the cosine where there are no
    logits."""
    if step.distance is None:
        return math.inf
    return 1 - step.distance.cosine if step.distance.kl is None else step.distance.kl


def lost(step: Step) -> str:
    """What a quantized graph lost, for people."""
    distance = step.distance
    if distance is None or distance.kl is None or distance.top1 is None:
        return f"{step.file} loses {loss_of(step):.3g} of the cosine"
    change = distance.perplexity_change
    perplexity = "" if change is None else f", perplexity {change:+.1%}"
    return f"{step.file} loses {distance.kl:.3g} nats (top-1 {distance.top1:.1%}{perplexity})"


def _only_loses(step: Step) -> bool:
    """Whether a quantized graph is wrong by nothing but its quantization.

    Its codes are those of the weights (the proof of the weights says so), and it gives numbers. How much may
    be lost is the user's choice, and `verify`'s gate.
    """
    error = step.distance.max_error if step.distance is not None else math.inf
    return step.precision in INTEGER_PRECISIONS and math.isfinite(error)
