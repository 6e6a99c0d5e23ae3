"""The HTML page: it stands alone, tells all that the report holds, and lets nothing foreign through."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from ia3_export.drawing import formats
from ia3_export.report.charts import error_axis, histogram, layer_plot
from ia3_export.report.html import site_groups, to_html
from ia3_export.report.model import Gate, Generation, LayerError, Report, SiteSummary
from ia3_export.report.strips import colour_scale, strip
from ia3_export.report.wording import ON_PAGE, generation_in_words, reason
from tests.report import sample

REPORTS: dict[str, Callable[[], Report]] = {
    "good": sample.good,
    "failing": sample.failing,
    "weights only": sample.weights_only,
    "large": lambda: sample.large(2000, 300),
    "small": lambda: sample.large(10, 6),
}
every_report = pytest.mark.parametrize(
    "report", [pytest.param(make(), id=name) for name, make in REPORTS.items()]
)
HOSTILE = "\"'><script>alert('&')</script><img src=x onerror=y>{{ 7 * 7 }}</style>"


def parse(html: str) -> ElementTree.Element:
    """The page as XML, which is stricter than any browser: unclosed, unquoted or unescaped is an error."""
    assert html.startswith("<!DOCTYPE html>")
    return ElementTree.fromstring(html)


def shown(html: str) -> str:
    """Text of the page on one line, without styles."""
    root = parse(html)
    root.remove(root[0])
    return " ".join(" ".join(root.itertext()).split())


def section(html: str, name: str) -> ElementTree.Element | None:
    return next((e for e in parse(html).iter("section") if e.get("id") == name), None)


def layer(
    module: str,
    *,
    scale: float = 1.0,
    unmerged: float = 1e-7,
    error: float = 1e-7,
    bound: float = 1e-6,
    passed: bool = True,
) -> LayerError:
    return LayerError(module=module, scale=scale, unmerged=unmerged, error=error, bound=bound, passed=passed)


@every_report
def test_the_page_loads_nothing_and_runs_nothing(report: Report) -> None:
    html = to_html(report)
    root = parse(html)
    assert not re.search(r"https?:|url\(|@import|javascript:|data:", html)
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "link", "img", "image", "iframe", "object", "embed", "use", "base", "form"}
    ids = {element.get("id") for element in root.iter()}
    for element in root.iter():
        for name, value in element.attrib.items():
            assert name not in ("src", "srcset", "action") and not name.startswith("on")
            assert name != "href" or (value[0] == "#" and value[1:] in ids), value
    policy = next(e for e in root.iter("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy.get("content") == "default-src 'none'; style-src 'unsafe-inline'"


@every_report
def test_ids_are_unique_and_charts_have_a_text(report: Report) -> None:
    root = parse(to_html(report))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    images = [e for e in root.iter("svg") if e.get("role") == "img"]
    assert images and all(e.get("aria-label") for e in images)
    levels = [int(e.tag[1]) for e in root.iter() if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))


def replaced(value: Any, text: str) -> Any:
    """`value` with every string that may come from a file replaced."""
    if isinstance(value, str):
        return text
    if isinstance(value, tuple):
        return tuple(replaced(entry, text) for entry in value)
    if isinstance(value, dict):
        return {f"{text}{i}": text for i in range(len(value))}
    if is_dataclass(value) and not isinstance(value, type):
        fixed = ("kind", "direction", "relation", "applied_by")
        new = {f.name: replaced(getattr(value, f.name), text) for f in fields(value) if f.name not in fixed}
        return replace(value, **new)
    return value


@pytest.mark.parametrize("make", [sample.good, sample.failing, lambda: sample.large(500, 70)])
def test_hostile_names_stay_text(make: Callable[[], Report]) -> None:
    html = to_html(replaced(make(), HOSTILE))
    harmless = to_html(replaced(make(), "x"))
    structure = [(e.tag, sorted(e.attrib)) for e in parse(html).iter()]
    assert structure == [(e.tag, sorted(e.attrib)) for e in parse(harmless).iter()]
    assert "<script" not in html and "<img" not in html
    assert " ".join(HOSTILE.split()) in shown(html)


@pytest.mark.parametrize("nasty", ["a\x00b", "\x1b[31mred", "\ud800", "\u202egnp.exe", "\uffff", "a\u2066b"])
def test_characters_that_break_or_turn_text_are_shown_as_replaced(nasty: str) -> None:
    html = to_html(replaced(sample.failing(), nasty))
    html.encode("utf-8")
    parse(html)
    assert "\ufffd" in html
    assert not any(c in html for c in nasty if c not in "ab[31mredgnp.x")


@pytest.mark.parametrize(("make", "words"), [(sample.good, "In parity"), (sample.failing, "NOT in parity")])
def test_the_verdict_is_the_only_first_heading(make: Callable[[], Report], words: str) -> None:
    report = make()
    root = parse(to_html(report))
    headings = ["".join(e.itertext()) for e in root.iter("h1")]
    assert headings == [words]
    header = next(root.iter("header"))
    text = " ".join(header.itertext())
    assert reason(report) in text and report.base.id in text
    assert all(adapter.id in text for adapter in report.adapters)
    assert report.reference is not None and report.reference.model_class in text
    assert next(e for e in root.iter("title")).text == (
        f"{report.verdict}: {report.base.id} + {' + '.join(a.id for a in report.adapters)}"
    )


@every_report
def test_every_step_gate_and_weights_proof_is_told(report: Report) -> None:
    html = to_html(report)
    chain, gates, weights = (section(html, name) for name in ("chain", "gates", "weights"))
    if report.steps:
        assert chain is not None and gates is not None
        boxes = next(chain.iter("ol")).findall("li")
        assert len(boxes) == 1 + len(report.steps)
        for step, box in zip(report.steps, boxes[1:], strict=True):
            text = " ".join(box.itertext())
            assert step.name in text and ("✓ pass" in text) == step.passed == ("FAIL" not in text)
            assert step.passed or step.finding in text
        rows = [
            ["".join(cell.itertext()).strip() for cell in row] for row in next(gates.iter("tbody")).iter("tr")
        ]
        assert rows[0] == [report.steps[0].name, "✓ pass" if report.steps[0].passed else "✗ FAIL"]
        told = [row[:3] for body in next(gates.iter("table")).iter("tbody") for row in _cells(body)[1:]]
        assert told == [_gate_row(gate) for step in report.steps for gate in step.gates]
    else:
        assert chain is None and gates is None
    assert weights is not None
    for proof, article in zip(report.weights, weights.iter("article"), strict=True):
        text = " ".join(article.itertext())
        assert (
            f"{proof.changed:,}" in text
            and f"{proof.unchanged:,}" in text
            and formats.size(proof.nbytes) in text
        )
        assert ("NOT proven" in text) != proof.passed
        assert all(f.tensor in text and f.detail in text for f in proof.findings[:50])
        assert all(f.tensor not in text for f in proof.findings[50:])
        assert all(note in text for note in proof.notes)


def _cells(body: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()).strip() for cell in row] for row in body.iter("tr")]


def _gate_row(gate: Gate) -> list[str]:
    value = "no value" if gate.value is None else formats.number(gate.value)
    return [gate.name, value, ("≤ " if gate.relation == "<=" else "≥ ") + formats.number(gate.limit)]


def test_findings_beyond_fifty_are_counted() -> None:
    assert "… and 13 more" in shown(to_html(sample.failing()))


def test_warnings_come_before_the_chain() -> None:
    text = shown(to_html(sample.failing()))
    assert 0 < text.index(sample.failing().warnings[1]) < text.index("The chain")


def test_the_first_failing_module_is_named_and_marked() -> None:
    report = sample.failing()
    layers = section(to_html(report), "layers")
    assert layers is not None
    location = report.steps[0].location
    assert location is not None
    text = " ".join(" ".join(layers.itertext()).split())
    assert f"First out of bound: {location.module}" in text and location.weights in text
    failed = [layer for layer in report.steps[0].layers if not layer.passed]
    assert f"{len(failed)} of {len(report.steps[0].layers)} modules out of bound" in text
    plot = next(e for e in layers.iter("svg") if e.get("class") == "chart layers")
    assert sum(e.get("class") == "cross" for e in plot.iter("text")) == len(failed)
    assert f"first: {location.module}" in "".join(plot.itertext())


def test_no_mark_where_every_module_is_within_its_bound() -> None:
    layers = section(to_html(sample.good()), "layers")
    assert layers is not None
    plot = next(e for e in layers.iter("svg") if e.get("class") == "chart layers")
    assert not [e for e in plot.iter("text") if e.get("class") in ("cross", "first")]
    assert "all 37 modules within bound" in " ".join(layers.itertext())


def test_inputs_options_environment_and_digests_are_listed() -> None:
    report = sample.good()
    last = section(to_html(report), "inputs")
    assert last is not None and report.reference is not None
    text = " ".join(last.itertext())
    for mapping in (report.options, report.environment, report.digests):
        assert all(key in text and value in text for key, value in mapping.items())
    assert all(name in text for name in report.reference.inputs)


def test_metrics_that_no_step_has_are_hidden() -> None:
    assert "perplexity change" not in shown(to_html(sample.good()))
    assert "top-5 agreement" in shown(to_html(sample.good()))
    assert "perplexity change" in shown(to_html(sample.failing()))


def test_weights_only_has_no_word_of_a_forward() -> None:
    html = to_html(sample.weights_only())
    assert section(html, "chain") is section(html, "layers") is section(html, "errors") is None
    assert section(html, "vectors") is not None
    assert "no forward was run" in shown(html)


def test_two_thousand_modules_and_three_hundred_sites_make_a_page_of_sane_size() -> None:
    report = sample.large(2000, 300)
    html = to_html(report)
    assert len(html.encode()) < 1_500_000
    root = parse(html)
    strips = [e for e in root.iter("svg") if e.get("class") == "strip"]
    assert len(strips) == 300
    location = report.steps[1].location
    assert location is not None and f"…{location.module[-29:]}" in shown(html)


def test_thinning_keeps_the_worst_module_and_every_failing_stretch() -> None:
    layers = [layer(f"m.{i}") for i in range(4001)]
    layers[1234] = layer("m.1234", error=5e-7)
    # fails with a smaller error than a passing neighbour
    layers[3000] = layer("m.3000", unmerged=1e-9, error=2e-7, bound=1e-8, passed=False)
    layers[3001] = layer("m.3001", error=9e-7)
    plot = str(layer_plot(layers, "m.3000"))
    assert len(re.findall('class="hover"', plot)) == 400
    assert "m.1234\n" in plot and plot.count('class="cross"') == 1 and "m.3000 OUT OF BOUND" in plot


def test_the_axis_orders_error_and_bound() -> None:
    report = sample.failing()
    assert report.reference is not None
    chart = ElementTree.fromstring(str(error_axis(report.steps, report.reference)))
    rows = list(chart.iter("g"))
    assert len(rows) == 3
    for step, row in zip(report.steps, rows, strict=True):
        limit = next(
            float(e.get("x1", "").rstrip("%")) for e in row.iter("line") if e.get("class") == "limit"
        )
        dots = [float(e.get("cx", "").rstrip("%")) for e in row.iter("circle")]
        crosses = [float(e.get("x", "").rstrip("%")) for e in row.iter("text") if e.get("class") == "cross"]
        if step.passed:
            assert dots and not crosses and dots[0] < limit
        else:
            assert crosses and not dots and crosses[0] > limit
        excess = [e for e in row.iter("line") if e.get("class") == "excess"]
        assert bool(excess) != step.passed


def test_no_number_breaks_a_chart() -> None:
    report = sample.failing()
    assert report.reference is not None
    step = report.steps[0]
    assert step.distance is not None
    nothing = layer("zero", scale=0.0, unmerged=0.0, error=0.0, bound=0.0)
    infinite = layer("broken", scale=0.0, unmerged=0.0, error=math.inf, bound=1e-3, passed=False)
    undefined = layer("nan", unmerged=math.nan, error=math.nan, bound=1e-3, passed=False)
    for error in (0.0, math.inf, math.nan, 1e-320, 1e300):
        distance = replace(step.distance, max_error=error)
        odd = replace(
            step,
            distance=distance,
            effect_present=error,
            layers=(nothing, infinite, undefined),
            error_histogram=((-300, 4), (-99, 1), (2, 0)),
        )
        reference = replace(report.reference, unmerged=distance, effect=0.0, scale=0.0)
        html = to_html(replace(report, steps=(odd,), reference=reference))
        charts = re.sub(r">[^<]*<", "><", "".join(re.findall(r"<svg class=.chart.*?</svg>", html, re.DOTALL)))
        attributes = re.sub(r'aria-label="[^"]*"', "", charts)
        assert "nan" not in attributes and "inf" not in attributes
        parse(html)
    bare = replace(
        odd, layers=(), error_histogram=(), gates=(), distance=None, effect_present=None, loss=None
    )
    parse(to_html(replace(report, steps=(bare,), sites=(), weights=(), adapters=())))
    site = replace(report.sites[0], values=(0.0, math.inf, math.nan, -1.0))
    parse(to_html(replace(report, sites=(site, replace(site, values=())))))


def test_the_histogram_tells_every_count() -> None:
    report = sample.good()
    step = replace(report.steps[0], error_histogram=((-99, 12345), (-9, 7), (-7, 1)))
    chart = str(histogram(step, report.reference, -9, -7))
    parse(f"<!DOCTYPE html>{chart}")
    for told in ("exact: 12,345 (99.9352 %)", "1e-9 to 1e-8: 7 (", "1e-7 to 1e-6: 1 ("):
        assert told in chart


def test_strips_tell_amplified_inhibited_and_negative_apart() -> None:
    site = replace(sample.good().sites[0], values=(0.4, 0.4, 1.0, 1.005, 2.5, -0.3, 0.98))
    root = ElementTree.fromstring(str(strip(site, colour_scale([site]))))
    runs = {e.get("class"): e.get("d") for e in root.iter("path")}
    assert runs == {"i4": "M0 .5h2", "a4": "M4 .5h1", "neg": "M5 .5h1", "i1": "M6 .5h1"}


def test_sites_are_grouped_by_projection_and_ordered_by_layer() -> None:
    names = [
        "b.layer.10.key",
        "b.layer.2.key",
        "b.layer.2.attention.output.dense",
        "b.layer.2.output.dense",
        "pooler",
    ]
    first = sample.good().sites[0]
    groups = site_groups([replace(first, module=name) for name in names])
    assert [(g.projection, [row.layer for row in g.rows]) for g in groups] == [
        ("key", ["2", "10"]),
        ("attention.output.dense", ["2"]),
        ("*.output.dense", ["2"]),
        ("pooler", ["—"]),
    ]


def test_one_group_per_adapter() -> None:
    first: SiteSummary = sample.good().sites[0]
    assert [g.adapter for g in site_groups([first, replace(first, adapter="other")])] == [
        "intent-ia3",
        "other",
    ]


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        (Generation(12, 2, None, None, False), "12 tokens x 2 sequences: all equal"),
        (
            Generation(9, 1, 5, 1e-4, True),
            "at token 5 (counted from 0), where the reference's margin 0.0001 is within rounding: excused",
        ),
        (
            Generation(9, 1, 0, 0.7, False),
            "at token 0 (counted from 0), where the reference's margin 0.7 is more than rounding explains",
        ),
    ],
)
def test_generation_is_told_in_words(generation: Generation, words: str) -> None:
    assert generation_in_words(generation, ON_PAGE).endswith(words)
    report = sample.good()
    shown_step = replace(report.steps[0], generation=generation)
    assert words in shown(to_html(replace(report, steps=(shown_step,))))


def test_the_reason_is_the_first_failing_finding() -> None:
    report = sample.failing()
    assert reason(report) == f"merged: {report.steps[0].finding}"
    passed = tuple(replace(step, passed=True) for step in report.steps)
    assert reason(replace(report, steps=passed)).startswith(
        "merged: model.layers.9.mlp.down_proj.weight left out: equals"
    )
    assert reason(sample.good()) == (
        "Every artifact is within its bounds, those in floating point within the rounding of the live model"
    )
    floats = replace(sample.good(), steps=sample.good().steps[:3])
    assert reason(floats) == "Every artifact is within the rounding of the live model"
