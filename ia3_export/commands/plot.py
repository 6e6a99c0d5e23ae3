"""``inspect --plot``: the vectors of one adapter, or of two, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter
from ia3_export.arguments import check_arguments
from ia3_export.errors import UsageError
from ia3_export.vectors.picture import PlotSite
from ia3_export.vectors.plot import write_plot


def plot_vectors(adapters: Sequence[str | Path | Adapter], file: str | Path) -> None:
    """Draw one adapter, or two side by side, into an ``.html`` or ``.png`` file (that needs matplotlib).

    Raises `UsageError` for another suffix or number of adapters, `Unsupported` without matplotlib,
    `OutputError`, and what reading adapters raises.
    """
    check_arguments(plot_vectors, locals())
    if len(adapters) not in (1, 2):
        raise UsageError(f"{len(adapters)} adapters cannot be drawn", hint="give one, or two to compare")
    read = [read_adapter(source) for source in adapters]
    vectors = [{(s.module, s.direction): s.vector for s in adapter.sites.values()} for adapter in read]
    places = dict.fromkeys(place for table in vectors for place in table)
    sites = [PlotSite(*place, tuple(table.get(place) for table in vectors)) for place in places]
    write_plot(sites, [adapter.name for adapter in read], Path(file))
