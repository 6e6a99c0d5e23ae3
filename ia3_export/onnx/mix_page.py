"""A `Mix` as one HTML page: the mixes that were measured, size against loss, and what each weight costs."""

from __future__ import annotations

from importlib.resources import files

from markupsafe import Markup

from ia3_export.drawing import page
from ia3_export.drawing.formats import number, power, size
from ia3_export.drawing.svg import anchor, decades, digits, draw, log_position
from ia3_export.onnx.mixing import Mix

_HEIGHT = 240


def mix_page(mix: Mix) -> bytes:
    """`mix` as a page that stands alone, in UTF-8."""
    values = {"mix": mix, "chart": _chart(mix)}
    return page.render(
        files(__package__).joinpath("mix.html.j2"), {"number": number, "size": size}, values
    ).encode()


def _chart(mix: Mix) -> Markup:
    """Bytes of codes to the right, loss upwards by powers of ten; the chosen mix is named."""
    points = sorted(mix.tried.values())
    least, most = points[0][0], points[-1][0]
    low, high = decades(loss for _, loss in points)
    up = log_position(low, high)

    def x(nbytes: int) -> float:
        return 50.0 if most == least else 3 + 94 * (nbytes - least) / (most - least)

    parts = [
        Markup(
            '<line class="grid" x1="0" x2="100%" y1="{y}%" y2="{y}%"/>'
            '<text class="tick" x="-8" y="{y}%" dy=".35em" text-anchor="end">{t}</text>'
        ).format(y=digits(100 - up(10.0**n)), t=power(n))
        for n in range(low, high + 1)
    ]
    for count, (nbytes, loss) in sorted(mix.tried.items()):
        chosen = count == mix.count
        text = f"{size(nbytes)}, {number(loss)}"
        parts.append(
            Markup('<circle class="{k}" cx="{x}%" cy="{y}%" r="{r}"><title>{t}</title></circle>').format(
                k="chosen" if chosen else "tried",
                x=digits(x(nbytes)),
                y=digits(100 - up(loss)),
                r=5 if chosen else 3.5,
                t=text,
            )
        )
        if chosen:
            parts.append(
                Markup('<text class="chosen" x="{x}%" y="{y}%" dy="-12" text-anchor="{a}">{t}</text>').format(
                    x=digits(x(nbytes)), y=digits(100 - up(loss)), a=anchor(x(nbytes)), t=text
                )
            )
    label = f"{len(points)} mixes of 4 and 8 bits: the chosen one loses {number(mix.loss)}"
    return draw("mix", _HEIGHT, label, parts)
