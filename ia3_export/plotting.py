"""``inspect --plot``: the vectors of one adapter, or of two, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ia3_export.adapters.model import Adapter
from ia3_export.report.vector_plot import PlotSite, write_plot


def plot_vectors(adapters: Sequence[Adapter], file: str | Path) -> None:
    """Draw one adapter, or two beside each other, into an ``.html`` or ``.png`` file (the latter needs matplotlib).

    Raises `UsageError` for another suffix, `Unsupported` without matplotlib, `OutputError`.
    """
    vectors = [{(s.module, s.direction): s.vector for s in adapter.sites.values()} for adapter in adapters]
    places = dict.fromkeys(place for table in vectors for place in table)
    sites = [PlotSite(*place, tuple(table.get(place) for table in vectors)) for place in places]
    write_plot(sites, [adapter.name for adapter in adapters], Path(file))
