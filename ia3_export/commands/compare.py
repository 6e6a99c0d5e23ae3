"""``compare``: how two adapters differ, site by site. Reads headers and the vectors, nothing else."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter, Site
from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.header import same_bytes
from ia3_export.commands.inspect import SiteStatistics, describe_vector
from ia3_export.ordering import natural
from ia3_export.vectors.channels import cosine, kinds_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteComparison:
    """One module of two adapters, ``a`` and ``b``.

    `where`: both have a vector for it, or one of them only, or they scale different ``sides``, or vectors of
    different ``lengths``. Only vectors in both are compared: `cosine` of ``a - 1`` and ``b - 1`` (None where
    one of them is all ones), `distance` their root mean square difference, `largest` the largest difference
    and `channel` where it is; `opposite` channels are inhibited by one adapter and amplified by the other,
    `agreeing` ones are treated alike by both.
    """

    module: str
    where: Literal["both", "a", "b", "sides", "lengths"]
    a: SiteStatistics | None
    b: SiteStatistics | None
    cosine: float | None = None
    distance: float | None = None
    largest: float | None = None
    channel: int | None = None
    opposite: int | None = None
    agreeing: int | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Comparison:
    """What `compare` returns.

    The adapters, every site of either, most different first, and their further tensors: equal in both, or
    different or in one only.
    """

    a: Adapter
    b: Adapter
    sites: tuple[SiteComparison, ...]
    cosine: float | None
    extras_equal: tuple[str, ...]
    extras_different: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON document of ``inspect --compare --json``."""
        return {
            "schema": "ia3-export/compare/1",
            "a": _describe(self.a),
            "b": _describe(self.b),
            "cosine": self.cosine,
            "sites": [asdict(site) for site in self.sites],
            "extra_tensors": {"equal": list(self.extras_equal), "different": list(self.extras_different)},
        }


def compare(a: str | Path | Adapter, b: str | Path | Adapter) -> Comparison:
    """How two adapters differ.

    Which modules each scales, which channels it inhibits or amplifies, how alike they are.

    Adapters of any format; modules are compared by their paths. Raises `IA3ExportError` for what
    cannot be read.
    """
    check_arguments(compare, locals())
    one, other = read_adapter(a), read_adapter(b)
    keys = dict.fromkeys([*one.sites, *other.sites])
    sites = [_compare(one.sites.get(key), other.sites.get(key)) for key in keys]
    shared = [(one.sites[key], other.sites[key]) for key in keys if key in one.sites and key in other.sites]
    shared = [(x, y) for x, y in shared if x.direction == y.direction and len(x.vector) == len(y.vector)]
    changes = [
        np.concatenate([site.vector.astype("<f8") - 1 for site in side] or [np.empty(0)])
        for side in zip(*shared, strict=True)
    ] or [np.empty(0), np.empty(0)]
    names = sorted({*one.extras, *other.extras})
    equal = {
        n
        for n in names
        if n in one.extras and n in other.extras and same_bytes(one.extras[n], other.extras[n])
    }
    return Comparison(
        a=one,
        b=other,
        sites=tuple(sorted(sites, key=_order)),
        cosine=cosine(*changes),
        extras_equal=tuple(n for n in names if n in equal),
        extras_different=tuple(n for n in names if n not in equal),
    )


def _order(site: SiteComparison) -> tuple[bool, float, tuple[str | tuple[int, str], ...]]:
    """What is not in both first, then what is most apart; NaN is farther than anything."""
    distance = 0.0 if site.distance is None else site.distance
    return site.where == "both", -distance if distance == distance else -math.inf, natural(site.module)


def _compare(a: Site | None, b: Site | None) -> SiteComparison:
    one, other = (describe_vector(site) if site is not None else None for site in (a, b))
    if a is None or b is None:
        module = (a or b).module  # type: ignore[union-attr]
        return SiteComparison(module=module, where="a" if b is None else "b", a=one, b=other)
    if a.direction != b.direction:
        return SiteComparison(module=a.module, where="sides", a=one, b=other)
    if len(a.vector) != len(b.vector):
        return SiteComparison(module=a.module, where="lengths", a=one, b=other)
    x, y = a.vector.astype("<f8"), b.vector.astype("<f8")
    apart, kinds = np.abs(x - y), (kinds_of(x), kinds_of(y))
    return SiteComparison(
        module=a.module,
        where="both",
        a=one,
        b=other,
        cosine=cosine(x - 1, y - 1),
        distance=float(np.sqrt(np.mean(apart**2))),
        largest=float(apart.max()),
        channel=int(apart.argmax()),
        opposite=int(np.sum(kinds[0] * kinds[1] == -1)),
        agreeing=int(np.sum((kinds[0] == kinds[1]) & (np.sign(x) == np.sign(y)))),
    )


def _describe(adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "format": adapter.format,
        "task_type": adapter.task_type,
        "vectors": len(adapter.sites),
        "parameters": adapter.parameters,
        "warnings": list(adapter.warnings),
    }
