"""What `bench` found, and what may be said about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ia3_export.benching.jobs import Runtime, Variant
from ia3_export.benching.settings import FORMS
from ia3_export.report.model import ModelId

SCHEMA = "ia3-export/bench/1"
Measure = Literal["forward", "token"]
_BUSY = 10
#: The measures in words.
MEASURES: Mapping[Measure, str] = {"forward": "one forward", "token": "one token"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one measure of a variant took, in milliseconds.

    `rounds` holds the median of every round, `median` and `iqr` (third less first quartile) are theirs, `p95`
    is that of all `samples` single measurements, `ratio` is `median` over the base's in the same runtime.
    """

    median: float
    p95: float
    iqr: float
    ratio: float
    samples: int
    rounds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant in one runtime.

    `forward` is a whole forward (a generator's prefill), `token` a decoding step with the cache, in which
    `batch` tokens are made. `files` are bytes on disk (weights, or graphs with their external data),
    `imported` and `peak` the resident memory of its process after importing the libraries and at most,
    `operators` the nodes of its graphs (None in PyTorch).
    """

    runtime: Runtime
    variant: Variant
    precision: str
    forward: Timing
    token: Timing | None
    tokens_per_second: float | None
    files: int
    imported: int
    peak: int
    operators: int | None

    def timing(self, measure: Measure) -> Timing | None:
        """`forward` or `token`."""
        return self.forward if measure == "forward" else self.token


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """The document of ``bench``.

    `inputs` are the shapes of a forward's arguments, `tokens` the decoding steps of a round, `interleaved`:
    the variants took turns, round by round; otherwise each ran by itself. `busy` is how much of the CPU
    others took shortly before, in percent.
    """

    base: ModelId
    adapters: tuple[ModelId, ...]
    task: str
    inputs: Mapping[str, tuple[int, ...]]
    tokens: int
    rounds: int
    threads: int
    interleaved: bool
    busy: float
    machine: Mapping[str, Any]
    rows: tuple[Row, ...]

    def groups(self) -> Iterator[tuple[Runtime, list[Row]]]:
        """The rows of each runtime, the base first."""
        for runtime in dict.fromkeys(row.runtime for row in self.rows):
            yield runtime, [row for row in self.rows if row.runtime == runtime]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What was measured."""
        return ("forward",) if self.rows[0].token is None else ("forward", "token")

    @property
    def findings(self) -> list[str]:
        """The ratios in float32 in words, each with the spread below which it says nothing."""
        lines = [
            f"{MEASURES[measure]}, {runtime}: {_compare(rows, measure)}"
            for measure in self.measures
            for runtime, rows in self.groups()
        ]
        lines += [line for measure in self.measures for line in _beside_merged(self.rows, measure)]
        counts = {
            r.variant: r.operators for r in self.rows if r.operators is not None and r.precision == "fp32"
        }
        lines.append("operators of the graphs: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
        if counts["merged"] == counts["base"]:
            lines.append(
                "Merged and base run the same operators: what they differ by is the noise of this machine."
            )
        lines.append(
            "The spread is the larger interquartile range of the two over the base's median: a ratio that "
            "is nearer to 1 than that is no difference."
        )
        if not self.interleaved:
            lines.append(
                "The variants did not take turns, for lack of memory: noise need not have hit them alike."
            )
        if self.busy >= _BUSY:
            lines.append(
                f"Before the first round others took {self.busy:.0f} % of the CPU: expect wide spreads."
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """The JSON document."""
        return {"schema": SCHEMA, **asdict(self), "findings": self.findings}


def _compare(rows: Sequence[Row], measure: Measure) -> str:
    base, *others = [row for row in rows if row.precision == "fp32" and row.variant not in FORMS]
    said = []
    for row in sorted(others, key=lambda row: row.variant):  # merged, unmerged
        mine, its = row.timing(measure), base.timing(measure)
        assert mine is not None and its is not None
        spread = max(mine.iqr, its.iqr) / its.median
        within = "within its spread of" if abs(mine.ratio - 1) <= spread else "spread"
        said.append(f"{row.variant} / base {mine.ratio:.2f}x ({within} {spread:.2f}x)")
    return ", ".join(said)


def _beside_merged(rows: Sequence[Row], measure: Measure) -> Iterator[str]:
    """What graphs of several tasks cost beside the one that has the adapter folded in."""
    for row in rows:
        if row.variant not in FORMS:
            continue
        folded = next(
            r for r in rows if (r.variant, r.precision, r.runtime) == ("merged", row.precision, row.runtime)
        )
        mine, its = row.timing(measure), folded.timing(measure)
        assert mine is not None and its is not None
        ratio, spread = mine.median / its.median, max(mine.iqr, its.iqr) / its.median
        within = "within its spread of" if abs(ratio - 1) <= spread else "spread"
        precision = "" if row.precision == "fp32" else f" {row.precision}"
        yield (
            f"{MEASURES[measure]}, {row.variant}{precision} / merged{precision} {ratio:.2f}x ({within} "
            f"{spread:.2f}x)"
        )


def time_rounds(rounds: Sequence[Sequence[float]], base: Timing | None) -> Timing:
    """The `Timing` of measured seconds, by round; without `base` it is the base's own."""
    medians = [1000 * float(np.median(seconds)) for seconds in rounds]
    everything = 1000 * np.concatenate([np.asarray(seconds) for seconds in rounds])
    median = float(np.median(medians))
    low, high = np.percentile(medians, (25, 75))
    return Timing(
        median=median,
        p95=float(np.percentile(everything, 95)),
        iqr=float(high - low),
        ratio=median / base.median if base else 1.0,
        samples=len(everything),
        rounds=tuple(medians),
    )
