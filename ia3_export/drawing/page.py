"""HTML pages that stand alone: no script, nothing loaded, foreign text as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources.abc import Traversable

from ia3_export.drawing.formats import clean


def render(
    template: Traversable, filters: Mapping[str, Callable[..., object]], values: Mapping[str, object]
) -> str:
    """The Jinja `template` with `values`. Text in them is escaped and cleaned, `Markup` stays as it is.

    Raises `jinja2.UndefinedError` for a name that neither `values` nor the template itself has.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.filters |= filters
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def _clean(value: object) -> object:
    # Markup is a str too, and holds text that was cleaned where it was drawn
    return clean(value) if type(value) is str else value
