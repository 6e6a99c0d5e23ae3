"""JUnit XML: valid, well counted, and failing exactly when the report does.

``junit-10.xsd`` beside this file is the schema of the Jenkins xunit plugin, unchanged, taken from the sdist
of pytest 8.3.5 (``testing/example_scripts/junit-10.xsd``; pytest is under the MIT licence, and so is the
schema, whose own notice stands at its head: Copyright (c) 2014, Gregory Boissinot).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import xmlschema
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3_export.report.junit import MAX_LINES, to_junit
from ia3_export.report.model import Gate, Generation, ModelId, Report, TensorFinding
from tests.report import sample

XSD = xmlschema.XMLSchema(Path(__file__).parent / "junit-10.xsd")
SAMPLES = {
    "good": sample.good(),
    "failing": sample.failing(),
    "weights only": sample.weights_only(),
    "large": sample.large(300, 40),
    "empty": replace(sample.weights_only(), weights=()),
    "failed without a reason": replace(sample.weights_only(), in_parity=False),
}


def read(report: Report) -> ElementTree.Element:
    text = to_junit(report)
    XSD.validate(text)
    return ElementTree.fromstring(text.encode())


def suite(root: ElementTree.Element, name: str) -> ElementTree.Element:
    return next(entry for entry in root if entry.get("name") == name)


def failures(element: ElementTree.Element) -> dict[str, ElementTree.Element]:
    found = {}
    for case in element.iter("testcase"):
        failure = case.find("failure")
        if failure is not None:
            found[case.get("name") or ""] = failure
    return found


def test_the_schema_itself_refuses_wrong_documents() -> None:
    text = to_junit(sample.good())
    for wrong in (
        text.replace(' tests="', ' count="'),
        text.replace("testcase", "case"),
        text.replace('time="0"', 'time="now"'),
    ):
        assert wrong != text
        with pytest.raises(xmlschema.XMLSchemaValidationError):
            XSD.validate(wrong)


@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_valid_and_its_counts_are_right(name: str) -> None:
    report = SAMPLES[name]
    root = read(report)
    total: Counter[str] = Counter()
    for entry in root:
        counted = {
            "tests": len(entry.findall("testcase")),
            "failures": len(entry.findall("testcase/failure")),
        }
        assert {key: int(entry.attrib[key]) for key in counted} == counted
        assert counted["tests"] and (entry.get("errors"), entry.get("skipped")) == ("0", "0")
        total.update(counted)
    assert (int(root.attrib["tests"]), int(root.attrib["failures"])) == (total["tests"], total["failures"])
    assert (total["failures"] == 0) == report.in_parity
    assert report.verdict in root.attrib["name"]


def test_one_suite_for_each_artifact_and_each_step_with_a_case_for_each_check() -> None:
    root = read(sample.failing())
    cases = {entry.get("name"): [case.get("name") for case in entry.iter("testcase")] for entry in root}
    assert cases == {
        "weights: merged": ["weights"],
        "weights: onnx": ["weights"],
        "merged": ["max error", "effect present", "perplexity change", "greedy generation", "modules"],
        "onnx": ["max error", "effect present"],
        "onnx float16": ["max error", "effect present", "perplexity change", "greedy generation"],
    }
    assert {case.get("classname") for case in suite(root, "onnx").iter("testcase")} == {"ia3-export.onnx"}


def test_failures_say_what_is_wrong() -> None:
    report = sample.failing()
    root = read(report)
    merged = failures(suite(root, "merged"))
    assert set(merged) == {"max error", "greedy generation", "modules"}
    assert merged["max error"].attrib == {"type": "gate", "message": "max error: 0.412, must be <= 0.188"}
    assert merged["max error"].text == report.steps[0].finding
    assert merged["greedy generation"].get("message") == (
        "4 sequences, 64 tokens: token 11 differs, margin of the reference 0.73"
    )
    broken = [layer for layer in report.steps[0].layers if not layer.passed]
    assert broken and (merged["modules"].get("message") or "").startswith(
        f"{len(broken)} of {len(report.steps[0].layers)} modules out of their bounds, first "
        f"{broken[0].module}: "
    )
    assert "nearest site: model.layers.9.mlp.down_proj" in (merged["modules"].text or "")
    weights = failures(suite(root, "weights: merged"))["weights"]
    assert (weights.text or "").splitlines() == [
        f"{finding.tensor}: {finding.what}: {finding.detail}" for finding in report.weights[0].findings
    ]
    assert (weights.get("message") or "").endswith("(2 in all)")
    assert (
        failures(suite(root, "onnx"))["max error"].get("message")
        == "max error: no finite value, must be <= 0.188"
    )
    assert failures(suite(root, "onnx float16")) == {}


def test_an_excused_difference_of_generation_passes() -> None:
    case = suite(read(sample.failing()), "onnx float16").findall("testcase")[-1]
    assert "token 40 differs" in case.findtext("system-out", "")
    assert "within what rounding may decide" in case.findtext("system-out", "")


def test_what_the_step_does_not_count_is_no_failure() -> None:
    report = sample.good()
    layer = replace(report.steps[0].layers[0], error=9.0, passed=False)
    step = replace(report.steps[0], generation=Generation(8, 1, 3, None, False), layers=(layer,))
    root = read(replace(report, steps=(step,)))
    assert failures(root) == {}
    notes = [case.findtext("system-out", "") for case in suite(root, "merged").iter("testcase")]
    assert "token 3 differs, margin of the reference unknown" in notes[-2] and "error 9," in notes[-1]


def test_a_step_that_failed_without_a_failing_gate_still_fails() -> None:
    report = sample.good()
    step = replace(report.steps[1], passed=False, finding="the file cannot be loaded", gates=())
    found = failures(read(replace(report, steps=(step,), in_parity=False)))
    assert {name: failure.get("message") for name, failure in found.items()} == {
        "verdict": "the file cannot be loaded"
    }


def test_errors_that_are_not_finite_are_written() -> None:
    report = sample.good()
    step = replace(report.steps[0], passed=False, gates=(Gate("max error", math.inf, "<=", 1.0, False),))
    found = failures(read(replace(report, steps=(step,), in_parity=False)))
    assert found["max error"].get("message") == "max error: inf, must be <= 1.0"


def test_every_suite_has_the_properties_of_the_run() -> None:
    report = sample.good()
    for entry in read(report):
        properties = {node.attrib["name"]: node.attrib["value"] for node in entry.iter("property")}
        assert len(properties) == len(entry.findall("properties/property"))
        assert {
            f"environment.{key}": value for key, value in report.environment.items()
        }.items() <= properties.items()
        assert {f"option.{key}": value for key, value in report.options.items()}.items() <= properties.items()
        assert {f"digest.{key}": value for key, value in report.digests.items()}.items() <= properties.items()
        assert properties["base"] == f"{report.base.id}@{report.base.revision}"
        assert properties["adapter 1"] == "intent-ia3"
    last = {node.attrib["name"]: node.attrib["value"] for node in read(report)[-1].iter("property")}
    assert (last["precision"], last["runs on"]) == ("int8", "ONNX Runtime 1.23.2, cpu")


def test_the_same_report_gives_the_same_bytes_and_no_time() -> None:
    text = to_junit(sample.failing())
    assert text == to_junit(sample.failing())
    assert "timestamp" not in text and 'time="0"' in text


def test_long_lists_are_cut_with_a_count() -> None:
    report = sample.failing()
    findings = tuple(TensorFinding(f"t{n}", "missing", "gone") for n in range(MAX_LINES + 7))
    root = read(replace(report, weights=(replace(report.weights[0], findings=findings),)))
    lines = (failures(suite(root, "weights: merged"))["weights"].text or "").splitlines()
    assert len(lines) == MAX_LINES + 1
    assert lines[-1] == "and 7 more"


def poisoned(name: str) -> Report:
    report = sample.failing()
    step = replace(
        report.steps[0],
        name=name,
        file=name,
        runs_on=name,
        finding=name,
        gates=(Gate(name, 2.0, "<=", 1.0, False),),
    )
    proof = replace(report.weights[0], name=name, findings=(TensorFinding(name, name, name),), notes=(name,))
    return replace(
        report,
        base=ModelId(name, name),
        adapters=(ModelId(name, None),),
        weights=(proof,),
        steps=(step,),
        options={name: name},
        environment={name: name},
        digests={name: name},
        warnings=(name,),
    )


@pytest.mark.parametrize(
    "bad", ["\x00", "\x08", "\x0b", "\x0c", "\x1b", "\x1f", "\ud800", "\udfff", "\ufffe", "\uffff"]
)
def test_characters_that_xml_forbids_are_removed(bad: str) -> None:
    root = read(poisoned(f"a{bad}b"))
    assert suite(root, "ab") is not None
    assert failures(root)["weights"].text == "ab: ab: ab"


@pytest.mark.parametrize(
    "kept", ["<a>&amp;\"'", "]]>", "<!--", "\t", "\u00e9\U0001f600", "\ue000", "\ufffd", "\u0085", "a\nb"]
)
def test_everything_else_comes_through(kept: str) -> None:
    root = read(poisoned(kept))
    assert [entry.get("name") for entry in root] == [f"weights: {kept}", kept]
    assert failures(root)["weights"].text == f"{kept}: {kept}: {kept}"


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec=None), max_size=20))
def test_any_text_gives_a_valid_document(name: str) -> None:
    assert int(read(poisoned(name)).attrib["failures"]) >= 1
