"""A comparison of two adapters for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ia3_export.cli.output import Output

if TYPE_CHECKING:
    from ia3_export.commands.compare import Comparison, SiteComparison
    from ia3_export.commands.inspect import SiteStatistics

_SHOWN = 12


def show_comparison(out: Output, compared: Comparison) -> None:
    """Totals, the sites that differ most (all with --verbose), and the tensors besides the vectors."""
    a, b = compared.a, compared.b
    for letter, adapter in (("a", a), ("b", b)):
        out.text(
            f"{letter}: {adapter.name}, {adapter.format}, {len(adapter.sites)} vectors, "
            f"{adapter.parameters:,} parameters, task {adapter.task_type or 'not stated'}"
        )
    both = [site for site in compared.sites if site.where == "both"]
    alike = (
        "no direction in common"
        if compared.cosine is None
        else f"cosine of their changes {compared.cosine:+.3f}"
    )
    channels = sum(site.a.length for site in both if site.a is not None)
    opposite, agreeing = sum(s.opposite or 0 for s in both), sum(s.agreeing or 0 for s in both)
    out.text(
        f"{len(both)} of {len(compared.sites)} sites in both: {alike}; of {channels:,} channels "
        f"{agreeing:,} are treated alike, {opposite:,} inhibited by one and amplified by the other"
    )
    shown = compared.sites if out.verbose else compared.sites[:_SHOWN]
    out.table(
        (
            "module path",
            "in",
            "cosine",
            "rms apart",
            "most apart",
            "channel",
            "opposite",
            "a: inhibits, amplifies",
            "b: inhibits, amplifies",
        ),
        [_row(site) for site in shown],
        numbers=("cosine", "rms apart", "most apart", "channel", "opposite"),
        optional=("channel", "most apart", "opposite"),
    )
    if len(shown) < len(compared.sites):
        out.text(f"... and {len(compared.sites) - len(shown)} sites that differ less (--verbose shows all)")
    for what, names in (("equal", compared.extras_equal), ("different", compared.extras_different)):
        if names:
            out.text(f"tensors besides the vectors, {what}: {', '.join(names)}")


def _row(site: SiteComparison) -> tuple[object, ...]:
    numbers: tuple[object, ...] = ("", "", "", "", "")
    if site.distance is not None:
        cosine = "" if site.cosine is None else f"{site.cosine:+.3f}"
        numbers = (cosine, f"{site.distance:.4f}", f"{site.largest:.4f}", site.channel, site.opposite)
    where = {"both": "both", "a": "a only", "b": "b only", "sides": "other sides", "lengths": "other lengths"}
    return site.module, where[site.where], *numbers, _channels(site.a), _channels(site.b)


def _channels(row: SiteStatistics | None) -> str:
    """Counts, and the strongest channels of either kind."""
    if row is None:
        return ""
    kinds = ((row.inhibited, row.most_inhibited), (row.amplified, row.most_amplified))
    return ", ".join(
        f"{count}" + (f" ({' '.join(map(str, top[:3]))})" if top else "") for count, top in kinds
    )
