"""The report as JUnit XML (Jenkins' flavour, junit-10.xsd), which Jenkins, GitLab and GitHub's actions read.

One test suite for each artifact of the weights proof and one for each step. A test case fails only where the
report itself counts it: the file has failures exactly when the verdict is NOT in parity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from ia3_export.report.model import Gate, Generation, Report, Step, WeightsProof
from ia3_export.report.wording import IN_JUNIT, NO_FINDING, generation_in_words

#: Longest list in the text of one failure.
MAX_LINES = 200
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class _Case:
    """One check.

    `failure` is None for one that passed, else type, message and text; `note` goes to system-out.
    """

    name: str
    failure: tuple[str, str, str] | None
    note: str = ""


def to_junit(report: Report) -> str:
    """`report` as an XML document. Times are 0: the same findings give the same bytes."""
    suites: list[tuple[str, Mapping[str, str], list[_Case]]] = [
        (f"weights: {proof.name}", {"file": proof.file, "kind": proof.kind}, [_weights_case(proof)])
        for proof in report.weights
    ]
    suites += [
        (
            step.name,
            {"file": step.file, "kind": step.kind, "precision": step.precision, "runs on": step.runs_on},
            _step_cases(step),
        )
        for step in report.steps
    ]
    if not report.in_parity and not any(case.failure for _, _, cases in suites for case in cases):
        suites.append(("verdict", {}, [_Case("verdict", ("verdict", report.verdict, NO_FINDING))]))
    shared = _shared_properties(report)
    root = ElementTree.Element("testsuites", {"name": f"ia3-export verify: {report.verdict}", "time": "0"})
    for name, own, cases in suites:
        root.append(_suite(name, {**own, **shared}, cases))
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _weights_case(proof: WeightsProof) -> _Case:
    counts = (
        f"{proof.changed} changed, {proof.unchanged} unchanged, {proof.computed} computed, "
        f"{proof.nbytes} bytes"
    )
    note = "\n".join([f"{proof.verdict}: {counts}" if proof.unproven else counts, *proof.notes])
    if proof.passed:
        return _Case("weights", None, note)
    lines = [f"{finding.tensor}: {finding.what}: {finding.detail}" for finding in proof.findings]
    message = f"{lines[0]} ({len(lines)} in all)" if lines else "the weights are not proven"
    return _Case("weights", ("weights", message, _listed(lines)), note)


def _step_cases(step: Step) -> list[_Case]:
    cases = [_gate_case(step, gate) for gate in step.gates]
    if step.generation is not None:
        cases.append(_generation_case(step, step.generation))
    if step.layers:
        cases.append(_layers_case(step))
    if not step.passed and not any(case.failure for case in cases):
        cases.append(_Case("verdict", ("verdict", step.finding, step.finding)))
    return cases


def _gate_case(step: Step, gate: Gate) -> _Case:
    value = "no finite value" if gate.value is None else f"{gate.value}"
    message = f"{gate.name}: {value}, must be {gate.relation} {gate.limit}"
    return _Case(gate.name, None if gate.passed else ("gate", message, step.finding), message)


def _generation_case(step: Step, run: Generation) -> _Case:
    message = generation_in_words(run, IN_JUNIT)
    fails = run.first_divergence is not None and not run.excused and not step.passed
    return _Case("greedy generation", ("generation", message, step.finding) if fails else None, message)


def _layers_case(step: Step) -> _Case:
    lines = [
        f"{layer.module}: error {layer.error:.3g}, bound {layer.bound:.3g}, unmerged {layer.unmerged:.3g}"
        for layer in step.layers
        if not layer.passed
    ]
    if not lines:
        return _Case("modules", None, f"{len(step.layers)} modules within their bounds")
    message = f"{len(lines)} of {len(step.layers)} modules out of their bounds, first {lines[0]}"
    where = step.location
    if where is not None:
        near = f"nearest site: {where.site}\n" if where.site else ""
        lines = [f"first module: {where.module}\n{near}its weights: {where.weights}", *lines]
    return _Case("modules", None if step.passed else ("modules", message, _listed(lines)), message)


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "\n".join([*lines[:MAX_LINES], *more])


def _shared_properties(report: Report) -> dict[str, str]:
    sources = {"base": _source(report.base.id, report.base.revision)}
    for number, adapter in enumerate(report.adapters, 1):
        sources[f"adapter {number}"] = _source(adapter.id, adapter.revision)
    properties = sources | {"verdict": report.verdict}
    for prefix, mapping in (
        ("option", report.options),
        ("environment", report.environment),
        ("digest", report.digests),
    ):
        properties |= {f"{prefix}.{key}": value for key, value in mapping.items()}
    return properties | {f"warning {number}": text for number, text in enumerate(report.warnings, 1)}


def _source(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def _suite(name: str, properties: Mapping[str, str], cases: Sequence[_Case]) -> ElementTree.Element:
    failures = sum(case.failure is not None for case in cases)
    suite = ElementTree.Element(
        "testsuite",
        {
            "name": _legal(name),
            "tests": str(len(cases)),
            "failures": str(failures),
            "errors": "0",
            "skipped": "0",
            "time": "0",
        },
    )
    holder = ElementTree.SubElement(suite, "properties")
    for key, value in properties.items():
        ElementTree.SubElement(holder, "property", {"name": _legal(key), "value": _legal(value)})
    for case in cases:
        attributes = {"name": _legal(case.name), "classname": _legal(f"ia3-export.{name}"), "time": "0"}
        element = ElementTree.SubElement(suite, "testcase", attributes)
        if case.failure is not None:
            kind, message, text = map(_legal, case.failure)
            ElementTree.SubElement(element, "failure", {"type": kind, "message": message}).text = text
        if case.note:
            ElementTree.SubElement(element, "system-out").text = _legal(case.note)
    return suite


def _legal(text: str) -> str:
    return _FORBIDDEN.sub("", text)
