"""An adapter laid over a checkpoint: which tensors every vector multiplies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ia3_export.adapters.model import Adapter, Site
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import IA3ExportError
from ia3_export.fold import Layout

if TYPE_CHECKING:
    from ia3_export.models.model_class import RuntimeModel


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that a site's vector multiplies.

    ``direct``: the stored tensor `source` (written as `tensor`, another name where a tie is split) holds the
    weight or bias in `layout`. ``converted``: transformers builds the state-dict entry `tensor` while
    loading. ``expert``: the entry is not known yet, the module is an expert of a fused parameter.
    """

    kind: Literal["direct", "converted", "expert"]
    tensor: str
    source: str
    shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Placement:
    """A site and the tensors its vector multiplies, weight first."""

    site: Site
    parts: tuple[Part, ...]


@dataclass(slots=True, kw_only=True)
class Resolution:
    """One adapter laid over one checkpoint.

    `placements` is keyed by the tensor that holds the weight (so that two adapters can be compared), `extras`
    maps names of the adapter's further tensors to stored names. `untied` are the entries that leave a tie,
    `shared` is what the adapter brings for all others of a tie, by its source.
    """

    adapter: Adapter
    placements: dict[str, Placement] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    shared: dict[str, StoredTensor] = field(default_factory=dict)
    runtime: RuntimeModel | None = None
    problems: list[IA3ExportError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
