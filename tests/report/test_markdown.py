"""Markdown as GitHub reads it: what it says, and that nothing from a file becomes markup."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ia3_export.report.markdown import MAX_ROWS, to_markdown
from ia3_export.report.model import FaultLocation, Gate, ModelId, Report, Step, TensorFinding
from tests.report import sample

EVIL = (
    "a|b", "`tick`", "``", "a`", "`", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "</details>", "![x](https://evil.example/x.png)", "[x](https://evil.example)", "https://evil.example",
    "www.evil.example",
    "@everyone", "#1", "$x$", "a\n\n# heading", "- item", "1. one", "12) one", "+ plus", "**bold**",
    "_em_ __strong__", "~~gone~~", "&lt;b&gt;", "\\", "\\|", "a\\", "\u202egpj.exe", "\x00\x1b[31m", "\ud800",
    "", "   ", "a | b | c", "\\`|`", "<!-- ", "-->", "a@b.example", "| --- |", "=====", "> quote", "[ ] task",
    "[^1]", "a`b``c", "_a_b_ _ __c__d",
)  # fmt: skip


def parse(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def inline(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield from token.children or ()


def headings(text: str) -> list[str]:
    tokens = parse(text)
    return [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every table, as the text that a reader sees."""
    found: list[list[list[str]]] = []
    within = False
    for token in parse(text):
        within = token.type != "table_close" and (within or token.type == "table_open")
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and within:
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


def table(text: str, *header: str) -> list[list[str]]:
    return next(rows[1:] for rows in tables(text) if rows[0][: len(header)] == list(header))


def poisoned(name: str) -> Report:
    """A failing report that has `name` in every place that a file may fill."""
    report = sample.failing()
    step = replace(
        report.steps[0],
        finding=name,
        runs_on=name,
        file=name,
        name=name,
        location=FaultLocation(name, name, name),
        gates=(Gate(name, 2.0, "<=", 1.0, False),),
        layers=(),
    )
    proof = replace(
        report.weights[0], name=name, file=name, findings=(TensorFinding(name, name, name),), notes=(name,)
    )
    assert report.reference is not None
    return replace(
        report,
        base=ModelId(name, name),
        adapters=(ModelId(name, name),),
        weights=(proof,),
        steps=(step,),
        reference=replace(report.reference, model_class=name, inputs=(name,), runs_on=name),
        options={name: name},
        environment={name: name},
        digests={name: name},
        warnings=(name,),
    )


HARMLESS_HEADINGS = [
    "❌ ia3-export verify: NOT in parity", "Chain", "Weights", "Failing gates",
    "First module out of its bound", "Findings in the weights", "Warnings",
]  # fmt: skip


def check_nothing_active(text: str) -> None:
    tokens = parse(text)
    allowed = re.compile(r"(<details>\n<summary>[\w -]+</summary>|</details>)\n?")
    assert all(allowed.fullmatch(token.content) for token in tokens if token.type == "html_block")
    assert headings(text) == HARMLESS_HEADINGS
    kinds = {"paragraph", "heading", "bullet_list", "list_item", "table", "thead", "tbody", "tr", "th", "td"}
    assert {re.sub("_(open|close)$", "", token.type) for token in tokens} <= kinds | {"inline", "html_block"}
    assert not any(token.type == "bullet_list_open" and token.level for token in tokens)
    for token in inline(tokens):
        assert token.type in (
            "text",
            "text_special",
            "code_inline",
            "html_inline",
            "strong_open",
            "strong_close",
        )
        if token.type == "html_inline":
            assert token.content == "<!-- -->"
        if token.type == "text":
            # what GitHub links or calls: mentions, issues, mathematics, mail, bare addresses
            assert not re.search(r"[@#$].|https?://|www\.", token.content), token.content
    # parsers fill up and cut off rows silently, so the pipes are counted
    header = 0
    for before, line in pairwise(text.split("\n")):
        pipes = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        header = header if before.startswith("|") else pipes
        assert pipes in (0, header), line
    text.encode()


@pytest.mark.parametrize("name", EVIL)
def test_nothing_from_a_file_becomes_markup(name: str) -> None:
    check_nothing_active(to_markdown(poisoned(name)))


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet=st.one_of(st.sampled_from("`|\\<>&*_[]()#@$~!-+1. \n:/"), st.characters()), max_size=30)
)
def test_nothing_of_any_text_becomes_markup(name: str) -> None:
    check_nothing_active(to_markdown(poisoned(name)))


@pytest.mark.parametrize(
    "name",
    ["a|b", "`tick`", "a`", "``x|``", "self_attn.k_proj", "<b>", "&amp;", "a\\|b", "\\", "@me", "a`b``c"],
)
def test_a_name_is_shown_as_it_is(name: str) -> None:
    text = to_markdown(poisoned(name))
    assert [name, name] in table(text, "option", "value")
    findings = text[text.index("### Findings") :]
    first = next(token for token in inline(parse(findings)) if token.type == "code_inline")
    assert first.content == name


@pytest.mark.parametrize(
    "text",
    [
        "1. a_b_c * d",
        "x < y & z > 0 | [k] ~ `q`",
        "mail a@b #3 $4 www.x https://y",
        "- dash",
        "&lt;b&gt; &amp;",
    ],
)
def test_a_sentence_is_shown_as_it_is(text: str) -> None:
    shown = to_markdown(poisoned(text))
    row = next(
        token
        for token in parse(shown[shown.index("### Warnings") :])
        if token.type == "inline" and token.level > 1
    )
    assert "".join(t.content for t in row.children or () if t.type != "html_inline") == text


def test_good_says_that_everything_is_within_rounding() -> None:
    report = sample.good()
    text = to_markdown(replace(report, steps=report.steps[:3]))
    assert text.startswith(
        "## ✅ ia3-export verify: in parity\n\nEverything is within the rounding of the live model.\n"
    )
    assert "❌" not in text
    assert "### Failing gates" not in text and "### Findings" not in text and "### Warnings" not in text


def test_only_steps_held_to_rounding_claim_it() -> None:
    report = sample.good()
    assert to_markdown(report).split("\n")[2] == (
        "Everything is within the rounding of the live model, `onnx int8` within the limits of its gates."
    )
    tolerated = tuple(
        replace(step, gates=(Gate("max error beyond rtol", 0.0, "<=", 1.0, True),)) for step in report.steps
    )
    text = to_markdown(replace(report, steps=tolerated))
    assert text.split("\n")[2] == "Everything is within the limits of its gates."


def test_the_chain_has_the_live_model_and_every_step() -> None:
    rows = table(to_markdown(sample.good()), "step", "precision", "runs on", "max error")
    assert [row[0] for row in rows] == ["unmerged, live", "merged", "onnx", "onnx float16", "onnx int8"]
    assert rows[1] == [
        "merged",
        "float32",
        "PyTorch 2.13.0, cpu",
        "3.1e-06",
        "1.17e-05",
        "4.64e-14",
        "100 %",
        "100 %",
        "10 times",
        "✅",
    ]
    assert rows[4][6:] == ["98 %", "98.7 %", "10 times", "✅"]


def test_the_bound_is_that_of_the_gate_on_the_error() -> None:
    report = sample.good()
    first, last = report.steps[0], report.steps[-1]
    quantized = replace(last, gates=last.gates[2:])
    turned = replace(first, gates=first.gates[::-1])
    rows = table(to_markdown(replace(report, steps=(turned, quantized))), "step", "precision")
    assert [row[4] for row in rows] == ["—", "1.17e-05", "—"]


def test_failing_names_step_reason_gates_module_and_tensors() -> None:
    report = sample.failing()
    text = to_markdown(report)
    lines = text.split("\n")
    assert lines[0] == "## ❌ ia3-export verify: NOT in parity"
    assert lines[2].startswith(
        "`merged`: the vector of model.layers.9.mlp.down_proj is not in the merged weights"
    )
    assert headings(text) == HARMLESS_HEADINGS
    assert table(text, "step", "gate", "value", "must be") == [
        ["merged", "max error", "0.412", "≤ 0.188"],
        ["onnx", "max error", "—", "≤ 0.188"],
        ["onnx", "effect present", "—", "≥ 0.9"],
    ]
    location = text[text.index("### First module") : text.index("### Findings")]
    assert "`merged`: `model.layers.9.mlp.down_proj`, nearest site `model.layers.9.mlp.down_proj`" in location
    assert [row[-1] for row in table(text, "step", "precision")] == ["—", "❌", "❌", "✅"]
    assert [row[-2:] for row in table(text, "artifact", "file")] == [["2", "❌"], ["63", "❌"]]
    assert all(f"- {warning}" in text for warning in report.warnings)


def test_findings_stop_at_twenty_and_say_how_many_are_left() -> None:
    text = to_markdown(sample.failing())
    block = text[text.index("### Findings") : text.index("### Warnings")]
    assert block.count("\n- ") == MAX_ROWS == 20
    assert "\n\nand 45 more\n" in block


def test_exactly_twenty_findings_leave_nothing_over() -> None:
    report = sample.failing()
    twenty = replace(report.weights[1], findings=report.weights[1].findings[:20])
    text = to_markdown(replace(report, weights=(twenty,)))
    assert "more" not in text[text.index("### Findings") : text.index("### Warnings")]


def test_the_first_failing_weights_proof_speaks_when_no_step_does() -> None:
    text = to_markdown(replace(sample.failing(), steps=(), reference=None))
    assert text.split("\n")[2].startswith(
        "`model.layers.9.mlp.down_proj.weight` in `merged`, left out: equals the base"
    )


def test_weights_only_has_no_chain() -> None:
    text = to_markdown(sample.weights_only())
    assert headings(text) == ["✅ ia3-export verify: in parity", "Weights"]
    assert "no forward was run" in text


def test_details_hold_inputs_options_environment_digests_and_metrics() -> None:
    report = sample.good()
    text = to_markdown(report)
    folded = text[text.index("<details>") :]
    assert text.count("<details>") == text.count("</details>") == folded.count("<summary>")
    assert table(text, "option", "value") == [list(pair) for pair in report.options.items()]
    assert table(text, "what", "version") == [list(pair) for pair in report.environment.items()]
    assert table(text, "file", "digest") == [list(pair) for pair in report.digests.items()]
    assert report.reference is not None
    assert all(f"- {name}\n" in folded for name in report.reference.inputs)
    metrics = next(rows for rows in tables(text) if rows[0][:2] == ["", "unmerged, live"])
    assert [row[0] for row in metrics[1:]] == [
        "max error",
        "mean error",
        "root mean square error",
        "max relative error",
        "mean relative error",
        "max error in ulp",
        "mean error in ulp",
        "cosine",
        "KL, mean (nats)",
        "KL, largest (nats)",
        "top-1 agreement",
        "top-5 agreement",
    ]
    assert metrics[1] == ["max error", "2.9e-06", "3.1e-06", "4.4e-06", "0.0031", "0.141"]


def test_generation_tells_an_excused_difference_from_another() -> None:
    rows = table(to_markdown(sample.failing()), "step", "sequences")
    assert rows == [
        ["merged", "4", "64", "differs at token 11", "0.73", "no"],
        ["onnx float16", "4", "64", "differs at token 40", "0.0001", "yes"],
    ]


def with_gate(gate: Gate) -> Report:
    report = sample.good()
    step: Step = replace(report.steps[0], gates=(gate,), passed=gate.passed)
    return replace(report, steps=(step,), in_parity=gate.passed)


@pytest.mark.parametrize(
    "gate, shown",
    [
        (Gate("max error", 0.18804, "<=", 0.188, False), ["0.18804", "≤ 0.188"]),
        (Gate("cosine", 0.9989996, ">=", 0.999, False), ["0.9989996", "≥ 0.999"]),
        (Gate("cosine", 0.9997, ">=", 0.999, True), ["0.9997", "≥ 0.999"]),
        (Gate("max error", math.inf, "<=", 0.188, False), ["not finite", "≤ 0.188"]),
        (Gate("max error", math.nan, "<=", 0.188, False), ["not finite", "≤ 0.188"]),
    ],
)
def test_a_gate_shows_enough_digits_to_see_its_verdict(gate: Gate, shown: list[str]) -> None:
    row = table(to_markdown(with_gate(gate)), "step", "gate")[0]
    assert [row[2], row[3]] == shown


def test_a_share_that_is_not_all_does_not_look_like_all() -> None:
    report = sample.good()
    step = report.steps[0]
    assert step.distance is not None
    nearly = replace(step, distance=replace(step.distance, top1=0.99998))
    row = table(to_markdown(replace(report, steps=(nearly,))), "step", "precision")[1]
    assert row[6] == "99.998 %"


@pytest.mark.parametrize("letter", ["x", "@", "|", "<", "`", "\U0001f600"])
def test_it_fits_into_a_comment_whatever_the_report_holds(letter: str) -> None:
    long = letter * 3000
    report = sample.failing()
    findings = tuple(TensorFinding(f"{long}{n}", long, long) for n in range(500))
    big = replace(
        report,
        warnings=(long,) * 300,
        digests={f"{n}{long}": long for n in range(2000)},
        weights=(replace(report.weights[0], findings=findings),),
    )
    text = to_markdown(big)
    assert len(text) <= 65_536
    assert "left out: Digests. The JSON report has them." in text
    assert "### Chain" in text and "### Warnings" in text and "<summary>Options</summary>" in text


def test_a_large_model_stays_short() -> None:
    assert len(to_markdown(sample.large(500, 300))) < 20_000
