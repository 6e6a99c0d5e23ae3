"""A report as one HTML page: no script, nothing loaded, charts as inline SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from ia3_export.drawing import formats, page
from ia3_export.ordering import natural
from ia3_export.report import charts, strips
from ia3_export.report.model import Distance, Gate, Report, SiteSummary, Step
from ia3_export.report.wording import METRICS, ON_PAGE, generation_in_words, reason

#: Above so many vectors their strips become a few pixels high and their numbers fold away.
_ROOMY = 60


@dataclass(frozen=True, slots=True)
class SiteRow:
    """A vector and the label of its row: the layer number, on some rows only where there are many."""

    site: SiteSummary
    layer: str
    labelled: bool


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """The vectors of one adapter on one projection, by layer; `channels` says how many each has."""

    adapter: str
    projection: str
    channels: str
    rows: tuple[SiteRow, ...]


def to_html(report: Report) -> str:
    """`report` as a page that stands alone. Whatever names the report holds appear as text only."""
    filters: dict[str, Callable[..., object]] = {
        "number": formats.number,
        "factor": formats.factor,
        "share": formats.share,
        "times": formats.times,
        "size": formats.size,
        "generation": lambda generation: generation_in_words(generation, ON_PAGE),
        "gate_in_words": _gate_in_words,
        "error_and_bound": _error_and_bound,
        "error_axis": charts.error_axis,
        "layer_plot": charts.layer_plot,
        "histogram": charts.histogram,
        "gauge": charts.effect_gauge,
        "weights_bar": charts.weights_bar,
        "strip": strips.strip,
    }
    scale = strips.colour_scale(report.sites)
    values = {
        "report": report,
        "reason": reason(report),
        "metrics": _metric_rows(report),
        "groups": site_groups(report.sites),
        "roomy": len(report.sites) <= _ROOMY,
        "scale": scale,
        "legend": strips.legend(scale),
        "histogram_range": charts.histogram_range(report.steps, report.reference),
        "watched": any(step.layers for step in report.steps),
        "located": any(step.location for step in report.steps),
        "generated": [step for step in report.steps if step.generation],
        "counted": [step for step in report.steps if step.error_histogram],
    }
    return page.render(files(__package__).joinpath("report.html.j2"), filters, values)


def site_groups(sites: Sequence[SiteSummary]) -> list[SiteGroup]:
    """`sites` by adapter and projection, in order of appearance, each group by layer."""
    names = _projections(site.module for site in sites)
    grouped: dict[tuple[str, str], list[SiteSummary]] = {}
    for site in sites:
        grouped.setdefault((site.adapter, names[site.module]), []).append(site)
    every = 1 if len(sites) <= _ROOMY else 5
    groups = []
    for (adapter, projection), members in grouped.items():
        members.sort(key=lambda site: natural(site.module))
        rows = tuple(SiteRow(site, _layer(site.module), i % every == 0) for i, site in enumerate(members))
        directions = " and ".join(sorted({f"{site.direction}put" for site in members}))
        channels = formats.span(site.size for site in members)
        groups.append(SiteGroup(adapter, projection, f"{directions}, {channels} channels", rows))
    return groups


def _projections(modules: Iterable[str]) -> dict[str, str]:
    """What tells the kinds of modules apart, layers and experts aside."""
    patterns = {
        module: tuple(re.sub(r"^\d+$", "*", part) for part in module.split(".")) for module in modules
    }
    names = formats.shortest_ends(patterns.values())
    return {module: names[pattern] for module, pattern in patterns.items()}


def _layer(module: str) -> str:
    return ".".join(re.findall(r"(?<![^.])\d+(?![^.])", module)) or "—"


def _gate_in_words(gate: Gate) -> tuple[str, str]:
    if gate.value is None:
        return "no value", formats.number(gate.limit)
    return formats.compared(gate.value, gate.limit)


def _error_and_bound(step: Step) -> tuple[str, str]:
    """Largest error and its bound, the latter empty without such a gate."""
    bound = step.bound
    if step.distance is None:
        return "no value", "" if bound is None else formats.number(bound)
    error = step.distance.max_error
    return (formats.number(error), "") if bound is None else formats.compared(error, bound)


def _metric_rows(report: Report) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Headed groups of metric rows: a label and the text of every column, the live model before the steps."""
    unmerged = report.reference.unmerged if report.reference else None
    to_reference = _rows([unmerged, *(step.distance for step in report.steps)])
    to_previous = _rows([None, *(step.loss for step in report.steps)])
    to_library = _rows([None, *(step.library for step in report.steps)])
    groups = [
        ("to the reference", to_reference),
        ("loss to the step before", to_previous),
        ("to the base as its quantization library runs it", to_library),
    ]
    return [(heading, rows) for heading, rows in groups if rows]


def _rows(distances: Sequence[Distance | None]) -> list[tuple[str, list[str]]]:
    rows = []
    for name, metric in METRICS.items():
        values = [None if d is None else getattr(d, name) for d in distances]
        if any(value is not None for value in values):
            show = formats.share if metric.share else formats.number
            rows.append((metric.label, [show(value) for value in values]))
    return rows
