"""The report as GitHub-flavoured Markdown, for a pull-request comment or ``$GITHUB_STEP_SUMMARY``.

Names and findings hold text from files that nobody vouches for. Names become code spans, in which nothing is
active; sentences are escaped, also against what GitHub adds to Markdown: mentions, issue links, mathematics,
bare links.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from ia3_export.drawing.formats import compared, number, share, times
from ia3_export.report.model import Distance, Gate, Report, Step, WeightsProof
from ia3_export.report.wording import (
    IN_TABLE,
    METRICS,
    NO_FINDING,
    Metric,
    first_failure,
    generation_in_words,
)
from ia3_export.words import INTEGER_PRECISIONS

#: GitHub refuses comments of more than 65,536 characters.
MAX_CHARACTERS = 65_000
MAX_ROWS = 20
_MAX_LIST, _MAX_NAME, _MAX_SENTENCE = 10_000, 160, 400
_NOTHING = "—"
#: Categories that show nothing or turn the text around them: control, format, surrogate,
#: unassigned, separators.
_INVISIBLE = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def to_markdown(report: Report) -> str:
    """`report` as Markdown: verdict, chain and weights proof first, all else folded away in ``<details>``.

    The text stays below GitHub's limit for a comment: lists are cut at `MAX_ROWS` with a count of what is
    missing, and details that do not fit are left out and named.
    """
    parts = [
        f"## {_mark(report.in_parity)} ia3-export verify: {report.verdict}",
        f"{_reason(report)}\n\n{_subject(report)}",
        _chain(report),
        _weights(report.weights),
        _failing_gates(report.steps),
        _locations(report.steps),
        _findings(report.weights),
        _bullets("Warnings", [_sentence(text) for text in report.warnings[:MAX_ROWS]], len(report.warnings)),
    ]
    text = _join(parts)
    left_out = []
    for title, content in _details(report):
        block = f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"
        if content and len(text) + len(block) + 1000 <= MAX_CHARACTERS:
            text = _join([text, block])
        elif content:
            left_out.append(title)
    if left_out:
        text = _join(
            [text, f"Too long for a comment, so left out: {', '.join(left_out)}. The JSON report has them."]
        )
    return text + "\n"


def _reason(report: Report) -> str:
    failure = first_failure(report)
    if isinstance(failure, Step):
        return f"{_code(failure.name)}: {_sentence(failure.finding)}"
    if failure is not None and failure.findings:
        found = failure.findings[0]
        return (
            f"{_code(found.tensor)} in {_code(failure.name)}, {_sentence(found.what)}: "
            f"{_sentence(found.detail)}"
        )
    if failure is not None:
        return f"The weights of {_code(failure.name)} are not proven."
    if not report.in_parity:
        return f"{NO_FINDING.capitalize()}."
    if report.steps:
        return _why_in_parity(report.steps)
    if report.weights:
        return "Every weight is what folding the adapters into the base gives; no forward was run."
    return "Nothing was compared."


def _why_in_parity(steps: Sequence[Step]) -> str:
    # integers are held to what their precision may cost, and --atol replaces the bound altogether
    others = [
        _code(step.name) for step in steps if step.precision in INTEGER_PRECISIONS or step.bound is None
    ]
    if not others:
        return "Everything is within the rounding of the live model."
    if len(others) == len(steps):
        return "Everything is within the limits of its gates."
    return (
        f"Everything is within the rounding of the live model, {', '.join(others)} within the "
        "limits of its gates."
    )


def _subject(report: Report) -> str:
    adapters = " + ".join(_code(source.id) for source in report.adapters) or _NOTHING
    reference = report.reference
    if reference is None:
        return f"Adapters {adapters} on {_code(report.base.id)}."
    return (
        f"Adapters {adapters} on {_code(report.base.id)} ({_code(reference.model_class)}). Reference: "
        f"vectors applied live by {_sentence(reference.applied_by)} in {_sentence(reference.precision)}, "
        f"inputs: {len(reference.inputs)}, {reference.origin}; the adapters change the outputs by up to "
        f"{number(reference.effect)}."
    )


def _chain(report: Report) -> str:
    header = (
        "step",
        "precision",
        "runs on",
        "max error",
        "bound",
        "KL",
        "top-1",
        "effect present",
        "a wrong one",
        "verdict",
    )
    rows = []
    if report.reference is not None:
        own = report.reference.unmerged
        rows.append(
            (
                "unmerged, live",
                _sentence(report.reference.dtype),
                _sentence(report.reference.runs_on),
                number(own.max_error),
                _NOTHING,
                number(own.kl),
                share(own.top1),
                _NOTHING,
                _NOTHING,
                _NOTHING,
            )
        )
    for step in report.steps:
        distance = step.distance
        error = None if distance is None else distance.max_error
        rows.append(
            (
                _code(step.name),
                _sentence(step.precision),
                _sentence(step.runs_on),
                *_pair(error, step.bound),
                number(None if distance is None else distance.kl),
                share(None if distance is None else distance.top1),
                share(step.effect_present),
                times(step.told_by),
                _mark(step.passed),
            )
        )
    return _section("Chain", _table(header, rows, left=("step", "precision", "runs on", "verdict")))


def _weights(proofs: Sequence[WeightsProof]) -> str:
    header = ("artifact", "file", "changed", "unchanged", "computed", "bytes", "findings", "verdict")
    rows = [
        (
            _code(proof.name),
            _code(proof.file),
            f"{proof.changed:,}",
            f"{proof.unchanged:,}",
            f"{proof.computed:,}",
            f"{proof.nbytes:,}",
            f"{len(proof.findings):,}",
            proof.verdict if proof.unproven else _mark(proof.passed),
        )
        for proof in proofs
    ]
    return _section("Weights", _table(header, rows, left=("artifact", "file", "verdict")))


def _failing_gates(steps: Sequence[Step]) -> str:
    rows = [_gate_cells(step, gate) for step in steps for gate in step.gates if not gate.passed]
    table = _table(("step", "gate", "value", "must be"), rows[:MAX_ROWS], left=("step", "gate"))
    return _section("Failing gates", _join([table, _more(len(rows) - MAX_ROWS)]))


def _locations(steps: Sequence[Step]) -> str:
    lines = []
    for step in steps:
        where = step.location
        if where is not None and not step.passed:
            site = "no site near it" if where.site is None else f"nearest site {_code(where.site)}"
            lines.append(
                f"{_code(step.name)}: {_code(where.module)}, {site}. Its weights: {_sentence(where.weights)}"
            )
    return _bullets("First module out of its bound", lines, len(lines))


def _findings(proofs: Sequence[WeightsProof]) -> str:
    found = [(proof, finding) for proof in proofs for finding in proof.findings]
    lines = [
        (
            f"{_code(finding.tensor)} in {_code(proof.name)}, **{_sentence(finding.what)}**: "
            f"{_sentence(finding.detail)}"
        )
        for proof, finding in found[:MAX_ROWS]
    ]
    return _bullets("Findings in the weights", lines, len(found))


def _details(report: Report) -> list[tuple[str, str]]:
    reference = report.reference
    notes = [f"{_code(proof.name)}: {_sentence(note)}" for proof in report.weights for note in proof.notes]
    sources = [("base", report.base), *(("adapter", source) for source in report.adapters)]
    rows = [
        (kind, _code(source.id), _code(source.revision) if source.revision else _NOTHING)
        for kind, source in sources
    ]
    unmerged = [] if reference is None else [("unmerged, live", reference.unmerged)]
    distances = unmerged + [(_code(step.name), step.distance) for step in report.steps]
    losses = [(_code(step.name), step.loss) for step in report.steps]
    library = [(_code(step.name), step.library) for step in report.steps]
    return [
        ("Every gate", _every_gate(report.steps)),
        ("Distance to the reference", _metrics(distances)),
        ("Loss against the step before", _metrics(losses)),
        ("Distance to the base as its quantization library runs it", _metrics(library)),
        ("Greedy generation", _generation(report.steps)),
        (
            "Inputs",
            _join([_table(("", "id", "revision"), rows, left=("", "id", "revision")), *_inputs(report)]),
        ),
        ("Notes", _lines(notes)),
        ("Options", _pairs(("option", "value"), report.options)),
        ("Environment", _pairs(("what", "version"), report.environment)),
        ("Digests", _pairs(("file", "digest"), report.digests)),
    ]


def _inputs(report: Report) -> list[str]:
    return [] if report.reference is None else [_lines([_sentence(name) for name in report.reference.inputs])]


def _every_gate(steps: Sequence[Step]) -> str:
    rows = [(*_gate_cells(step, gate), _mark(gate.passed)) for step in steps for gate in step.gates]
    return _table(("step", "gate", "value", "must be", "verdict"), rows, left=("step", "gate", "verdict"))


def _gate_cells(step: Step, gate: Gate) -> tuple[str, ...]:
    value, limit = _pair(gate.value, gate.limit)
    return _code(step.name), _sentence(gate.name), value, f"{'≤' if gate.relation == '<=' else '≥'} {limit}"


def _pair(value: float | None, limit: float | None) -> tuple[str, str]:
    if value is None or limit is None:
        return number(value), number(limit)
    return compared(value, limit)


def _metrics(columns: Sequence[tuple[str, Distance | None]]) -> str:
    known = [(title, distance) for title, distance in columns if distance is not None]
    if not known:
        return ""
    rows = [
        (metric.short, *(_value(name, metric, distance) for _, distance in known))
        for name, metric in METRICS.items()
    ]
    return _table(
        ("", *(title for title, _ in known)), [row for row in rows if set(row[1:]) != {_NOTHING}], left=("",)
    )


def _value(name: str, metric: Metric, distance: Distance) -> str:
    value = getattr(distance, name)
    if metric.share:
        return share(value)
    return _NOTHING if value is None else f"{value:.9f}" if name == "cosine" else number(value)


def _generation(steps: Sequence[Step]) -> str:
    rows = []
    for step in steps:
        run = step.generation
        if run is not None:
            excused = "" if run.first_divergence is None else "yes" if run.excused else "no"
            rows.append(
                (
                    _code(step.name),
                    str(run.sequences),
                    str(run.tokens),
                    generation_in_words(run, IN_TABLE),
                    number(run.margin),
                    excused or _NOTHING,
                )
            )
    header = ("step", "sequences", "tokens", "result", "margin", "a tie within rounding")
    return _table(header, rows, left=("step", "result"))


def _pairs(header: tuple[str, str], pairs: Mapping[str, str]) -> str:
    return _table(header, [(_code(key), _code(value)) for key, value in pairs.items()], left=header)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Iterable[str]) -> str:
    if not rows:
        return ""
    marks = [":---" if title in set(left) else "---:" for title in header]
    # a table ends its cells before it looks for code spans, so pipes in those need a backslash
    lines = [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (header, marks, *rows)
    ]
    return "\n".join(lines)


def _bullets(title: str, lines: Sequence[str], total: int) -> str:
    return _section(title, _cut([f"- {line}" for line in lines], total)) if lines else ""


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cut(lines: Sequence[str], total: int) -> str:
    kept = 0
    while kept < min(len(lines), MAX_ROWS) and sum(map(len, lines[: kept + 1])) <= _MAX_LIST:
        kept += 1
    return _join(["\n".join(lines[:kept]), _more(total - kept)])


def _more(left: int) -> str:
    return f"and {left:,} more" if left > 0 else ""


def _section(title: str, content: str) -> str:
    return f"### {title}\n\n{content}" if content else ""


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _mark(passed: bool) -> str:
    return "✅" if passed else "❌"


def _code(name: str) -> str:
    """`name` as a code span. A fence longer than any run of backticks inside keeps it closed."""
    name = _visible(name, _MAX_NAME) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", name)), default=0))
    space = " " if name.startswith("`") or name.endswith("`") or not name.strip() else ""
    return f"{fence}{space}{name}{space}{fence}"


def _sentence(text: str) -> str:
    """`text` with nothing in it that Markdown or GitHub would act on."""
    text = _visible(text, _MAX_SENTENCE)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]~])", r"\\\1", text)
    # only at the end of a word can an underscore close emphasis, and most names have some inside
    text = re.sub(r"_(?![^\W_])", r"\\_", text)
    # GitHub looks for addresses, mentions, issues and formulas, but not across a comment
    text = re.sub(r"[@#$]|:(?=//)|www(?=\.)", r"\g<0><!-- -->", text, flags=re.IGNORECASE)
    if re.match(r"[-+]|\d+[.)]", text):  # would begin a list in a list
        text = f"&#{ord(text[0])};{text[1:]}"
    return text


def _visible(text: str, limit: int) -> str:
    text = " ".join(text[: 4 * limit].split())
    text = "".join("�" if unicodedata.category(letter) in _INVISIBLE else letter for letter in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
