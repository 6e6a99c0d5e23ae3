"""Pictures of vectors: numbers and words are right, the page stands alone, and no file breaks it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ia3_export.drawing.colours import NEGATIVE, NOT_FINITE, ColourScale
from ia3_export.errors import OutputError, Unsupported, UsageError
from ia3_export.fold import Array
from ia3_export.vectors.channels import Counts, count_channels
from ia3_export.vectors.numbers import (
    LEVELS,
    agreement,
    colours,
    factor_ticks,
    make_difference,
    make_strip,
    percent,
)
from ia3_export.vectors.picture import PlotSite, Stack
from ia3_export.vectors.plot import WRITERS, make_picture, write_plot

HOSTILE = "\"'><script>alert('&')</script><img src=x onerror=y>{{ 7 * 7 }}</style>$\\frac{x"
SUFFIXES = tuple(WRITERS)


def vector(seed: int, size: int = 16, scale: float = 0.1) -> Array:
    return (1 + scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def llama(layers: int, adapters: int = 1, hidden: int = 16, wide: int = 24) -> list[PlotSite]:
    kinds = (
        ("self_attn.k_proj", hidden, "out"),
        ("self_attn.v_proj", hidden, "out"),
        ("mlp.down_proj", wide, "in"),
    )
    return [
        PlotSite(
            f"model.layers.{i}.{kind}",
            direction,
            tuple(vector(1000 * a + 10 * i + k, size) for a in range(adapters)),
        )
        for i in range(layers)
        for k, (kind, size, direction) in enumerate(kinds)
    ]


def t5(layers: int) -> list[PlotSite]:
    parts = {
        "encoder": ("0.SelfAttention.k", "0.SelfAttention.v", "1.DenseReluDense.wi_1"),
        "decoder": ("0.SelfAttention.k", "1.EncDecAttention.k", "2.DenseReluDense.wi_1"),
    }
    return [
        PlotSite(f"{stack}.block.{i}.layer.{part}", "out", (vector(i),))
        for stack, names in parts.items()
        for i in range(layers)
        for part in names
    ]


def html_of(sites: Sequence[PlotSite], names: Sequence[str], folder: Path) -> str:
    write_plot(sites, names, folder / "plot.html")
    return (folder / "plot.html").read_text(encoding="utf-8")


def parse(html: str) -> ElementTree.Element:
    """The page as XML, which is stricter than any browser."""
    assert html.startswith("<!DOCTYPE html>")
    return ElementTree.fromstring(html)


def heading(html: str) -> str:
    (found,) = ("".join(element.itertext()) for element in parse(html).iter("h1"))
    return found


def tooltips(html: str, part: str) -> list[str]:
    titles = [svg.findtext("title") or "" for svg in parse(html).iter("svg") if svg.get("class") == "strip"]
    return [title for title in titles if part in title]


def write(sites: Sequence[PlotSite], names: Sequence[str], file: Path) -> bytes:
    if file.suffix == ".png":
        pytest.importorskip("matplotlib")
    write_plot(sites, names, file)
    return file.read_bytes()


def test_channels_are_counted_by_one_rule() -> None:
    values = np.array([1, 0.99, 1.01, 0.9899, 1.0101, 0, -0.5, -1, -2, np.nan, np.inf, -np.inf])
    expected = Counts(channels=12, unchanged=3, inhibited=3, amplified=2, negative=3, not_finite=3)
    assert count_channels(values) == expected
    assert count_channels(values[:0]) == Counts()


def test_float32_bounds_count_as_unchanged() -> None:
    assert count_channels(np.float32([0.99, 1.01]).astype(np.float64)).unchanged == 2


@pytest.mark.parametrize(("size", "bins"), [(1, 96), (16, 96), (96, 96), (97, 96), (5120, 96), (28672, 8)])
def test_a_strip_keeps_the_extremes(size: int, bins: int) -> None:
    values = vector(3, size)
    values[size // 2], values[0] = -3.0, 2.5
    strip = make_strip(values, bins)
    assert len(strip.ordered) == len(strip.ranked) == min(size, bins)
    assert (strip.low, strip.high) == (values.min(), values.max())
    assert strip.ranked[0] == values.min() and strip.ranked[-1] == values.max()
    assert values.min() in strip.ordered
    assert strip.strongest[0] == (int(np.argmin(values)) if (values < 0).any() else 0, strip.strongest[0][1])
    assert strip.from_ones == pytest.approx(np.sqrt(np.mean((values.astype(np.float64) - 1) ** 2)))


def test_comparing_gives_ratio_cosine_and_distance() -> None:
    a, b = np.array([1.0, 2.0, 0.0, 0.5]), np.array([2.0, -1.0, 0.0, 0.5])
    difference = make_difference(a, b, 96)
    assert list(difference.ratio.ordered) == [2.0, -0.5, 1.0, 1.0]
    assert difference.apart == pytest.approx(np.sqrt((1 + 9) / 4))
    u, v = a - 1, b - 1
    assert difference.cosine == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    assert make_difference(a, np.ones(4), 96).cosine is None
    assert make_difference(a, a, 96).cosine == pytest.approx(1) and make_difference(a, a, 96).apart == 0


def test_colours_follow_the_counting_rule() -> None:
    values = np.array([0.0, 0.25, 0.98, 0.99, 1, 1.01, 1.02, 4, -1, np.nan, np.inf])
    codes = colours(values, ColourScale(LEVELS, 1.0))
    assert list(codes) == [-LEVELS, -LEVELS, -1, 0, 0, 0, 1, LEVELS, NEGATIVE, NOT_FINITE, NOT_FINITE]


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "0 %"),
        (0, 9, "0 %"),
        (9, 9, "100 %"),
        (1, 1000, "under 1 %"),
        (999, 1000, "over 99 %"),
        (1, 8, "12 %"),
    ],
)
def test_percent_is_neither_none_nor_all_by_rounding(part: int, whole: int, text: str) -> None:
    assert percent(part, whole).replace("\u00a0", " ") == text


def test_a_cosine_is_not_rounded_to_one() -> None:
    shown = [agreement(c) for c in (None, 1.0, 0.99996, -0.5, -0.0001)]
    assert shown == ["—", "1.000", "0.999960", "\u22120.500", "0.000"]


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.1), (-0.3, 0.2), (-1, 1), (-2, 0.9), (-4, 4)])
def test_ticks_are_few_and_have_one(low: float, high: float) -> None:
    ticks = [tick for tick, _ in factor_ticks(low, high)]
    assert 2 <= len(ticks) <= 11 and any(abs(tick - 1) < 1e-9 for tick in ticks)
    assert all(2**low - 1e-9 <= tick <= 2**high + 1e-9 for tick in ticks)


def layout(stack: Stack) -> tuple[str, list[str], list[str]]:
    return stack.label, [column.label for column in stack.columns], [label for label, _ in stack.rows]


def test_layers_are_rows_and_kinds_are_columns() -> None:
    (stack,) = make_picture(llama(12), ["a"]).stacks
    assert layout(stack) == ("", ["k_proj", "v_proj", "down_proj"], [str(i) for i in range(12)])
    assert [column.channels for column in stack.columns] == ["16", "16", "24"]
    assert stack.rows[10][1][2].module == "model.layers.10.mlp.down_proj"  # type: ignore[union-attr]


def test_an_encoder_and_a_decoder_are_stacks() -> None:
    encoder, decoder = make_picture(t5(3), ["a"]).stacks
    assert layout(encoder) == ("encoder", ["k", "v", "wi_1"], ["0", "1", "2"])
    assert layout(decoder) == ("decoder", ["SelfAttention.k", "EncDecAttention.k", "wi_1"], ["0", "1", "2"])


def test_experts_and_modules_outside_of_layers_have_places() -> None:
    sites = [
        *(PlotSite(f"model.layers.{i}.k_proj", "out", (vector(i),)) for i in range(2)),
        *(
            PlotSite(f"model.layers.{i}.experts.{e}.w", "in", (vector(e),))
            for i in range(2)
            for e in range(11)
        ),
        PlotSite("lm_head", "in", (vector(0),)),
    ]
    picture = make_picture(sites, ["a"])
    assert [layout(stack) for stack in picture.stacks] == [
        ("", ["k_proj"], ["0", "1"]),
        ("several per layer", ["w"], [f"{i}.{e}" for i in range(2) for e in range(11)]),
        ("outside of the layers", ["lm_head"], ["—"]),
    ]
    drawn = sum(cell is not None for stack in picture.stacks for _, row in stack.rows for cell in row)
    assert drawn == len(sites)


def test_both_directions_of_a_module_have_columns() -> None:
    sites = [PlotSite(f"h.{i}.fc", direction, (vector(i),)) for i in range(2) for direction in ("in", "out")]
    (stack,) = make_picture(sites, ["a"]).stacks
    assert layout(stack) == ("", ["fc (input)", "fc (output)"], ["0", "1"])


def test_the_page_of_one_tells_what_it_sees(tmp_path: Path) -> None:
    sites = llama(2)
    values = sites[3].vectors[0]
    assert values is not None
    values[:] = [0.5] * 4 + [2.0] * 4 + [1.0] * 7 + [-3.0]
    html = html_of(sites, ["my adapter"], tmp_path)
    every = np.concatenate([v for site in sites for v in site.vectors if v is not None]).astype(np.float64)
    counts = count_channels(every)
    assert heading(html).replace("\u00a0", " ") == (
        f"6 vectors, 112 channels: {round(100 * counts.inhibited / 112)} % inhibited, "
        f"{round(100 * counts.amplified / 112)} % amplified, 1 channel flips sign"
    )
    header = " ".join(" ".join(next(parse(html).iter("header")).itertext()).split())
    assert "my adapter" in header and f"Strongest vector: {sites[3].module}" in header
    module = sites[3].module
    assert f"Smallest factor −3 in {module}, largest 2 in {module}" in header  # noqa: RUF001
    (tip,) = tooltips(html, sites[3].module)
    assert "min −3, mean 0.875, max 2" in tip  # noqa: RUF001
    assert "of 16 channels 4 inhibited, 5 amplified, 7 unchanged, 1 negative" in tip
    assert "strongest: [15] −3, [0] 0.5, [1] 0.5" in tip  # noqa: RUF001
    assert len(tooltips(html, "model.layers.")) == 6


def test_the_page_of_two_shows_both_and_their_ratio(tmp_path: Path) -> None:
    sites = llama(2, adapters=2)
    base = np.full(16, 1.1, np.float32)
    sites[0] = PlotSite(sites[0].module, "out", (base, 2 * base))
    html = html_of(sites, ["first", "second"], tmp_path)
    tips = tooltips(html, sites[0].module)
    assert [tip.split(":")[0] for tip in tips] == ["A", "B", "B / A"]
    assert "cosine 1.000" in tips[2] and "root mean square of B − A 1.1" in tips[2]  # noqa: RUF001
    assert "ratios: min 2, mean 2, max 2" in tips[2]
    assert heading(html).startswith("6 vectors in both: ") and "112 channels differ by more than" in heading(
        html
    )
    header = " ".join("".join(next(parse(html).iter("header")).itertext()).split())
    assert "first (A)" in header and "second (B)" in header and f"Most different: {sites[0].module}" in header
    top = next(e for e in parse(html).iter("section") if e.get("aria-labelledby") == "h-top")
    assert next(top.iter("tbody"))[0][0].text == sites[0].module


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_only_one_has_is_marked(suffix: str, tmp_path: Path) -> None:
    sites = llama(2, adapters=2)
    a, b = sites[0].vectors
    sites[0] = PlotSite(sites[0].module, "out", (a, None))
    sites[1] = PlotSite(sites[1].module, "out", (None, b))
    sites[2] = PlotSite(sites[2].module, "in", (vector(1, 8), vector(2, 9)))
    sites.append(PlotSite("nobody", "in", (None, None)))
    file = tmp_path / f"plot{suffix}"
    written = write(sites, ["a", "b"], file)
    picture = make_picture(sites, ["a", "b"])
    assert [cell.remark for cell in picture.cells if cell.remark] == [
        "only A has a vector here",
        "only B has a vector here",
        "A has 8 channels here, B 9",
    ]
    assert picture.heading.startswith("3 vectors in both")
    assert any("1 of them only here" in remark for remark in picture.remarks)
    if suffix == ".html":
        html = written.decode()
        assert "nobody" not in html
        for cell in picture.cells:
            assert html.count(f"{cell.module}: {cell.remark}") == (
                0 if not cell.remark else 1 if all(cell.strips) else 2
            )
            assert not cell.remark or f"<td>{cell.remark}</td>" in html


def test_the_page_loads_nothing_and_can_be_read_aloud(tmp_path: Path) -> None:
    html = html_of(llama(3, adapters=2), ["a", "b"], tmp_path)
    root = parse(html)
    assert not re.search(r"https?:|url\(|@import|javascript:|data:", html)
    assert not {e.tag for e in root.iter()} & {
        "script",
        "link",
        "img",
        "image",
        "iframe",
        "object",
        "use",
        "form",
    }
    policy = next(e for e in root.iter("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy.get("content") == "default-src 'none'; style-src 'unsafe-inline'"
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(e.get("aria-labelledby") in (None, *ids) for e in root.iter())
    images = [e for e in root.iter() if e.get("role") == "img"]
    assert images and all(e.get("aria-label") or e.findtext("title") for e in images)
    assert all(e.get("aria-label") or e.get("aria-labelledby") for e in root.iter() if e.get("tabindex"))
    heads = [row for table in root.iter("table") for row in table.iter("tr") if row.find("td") is None]
    assert all(row.find("th") is not None for row in heads)


@pytest.mark.parametrize("adapters", [1, 2])
def test_hostile_names_stay_text(adapters: int, tmp_path: Path) -> None:
    def page(module: str, name: str) -> str:
        sites = [
            PlotSite(f"{module}.{i}.{module}", "out", (vector(i), None, vector(9))[:adapters])
            for i in range(3)
        ]
        return html_of(sites, [name] * adapters, tmp_path)

    html, harmless = page(HOSTILE, HOSTILE), page("x", "x")
    structure = [(e.tag, sorted(e.attrib)) for e in parse(html).iter()]
    assert structure == [(e.tag, sorted(e.attrib)) for e in parse(harmless).iter()]
    assert "<script" not in html and "<img" not in html and "49" not in heading(html)
    assert HOSTILE.split(".")[0] in " ".join(parse(html).itertext())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "name", [HOSTILE, "a\x00b\ud800\u202egnp.exe", "名前 🦙 $x_1^", "w " * 5000, "", ".", "0.1.2", "*.1.*"]
)
def test_any_name_can_be_drawn(name: str, suffix: str, tmp_path: Path) -> None:
    content = write([PlotSite(name, "out", (vector(0),))], [name], tmp_path / f"plot{suffix}")
    assert len(content) < 400_000
    if suffix == ".html":
        parse(content.decode())
        assert not any(c in content.decode() for c in "\x00\u202e")


ODD = {
    "not finite": np.array([np.nan, np.inf, -np.inf, 1.5], np.float32),
    "nothing finite": np.full(4, np.nan, np.float32),
    "zeros": np.zeros(4, np.float32),
    "ones": np.ones(4, np.float32),
    "empty": np.zeros(0, np.float32),
    "huge": np.array([1e300, -1e308, 1.7e308, 5e-324]),
    "one channel": np.array([0.5]),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ODD)
def test_any_values_can_be_drawn(name: str, suffix: str, tmp_path: Path) -> None:
    values, ones = ODD[name], np.ones_like(ODD[name])
    file = tmp_path / f"plot{suffix}"
    one = write([PlotSite("h.0.k", "out", (values,))], ["a"], file)
    pairs = ((values, ones), (ones, values), (values, values))
    for pair in pairs if suffix == ".html" else pairs[:1]:  # a PNG takes half a second
        write([PlotSite("h.0.k", "out", pair), *llama(1, 2)], ["a", "b"], file)
    if suffix == ".html":
        broken = int(np.sum(~np.isfinite(values)))
        assert (f"{broken} not finite" in heading(one.decode())) == bool(broken)
        assert "nan" not in " ".join(parse(one.decode())[1].itertext()).lower()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("adapters", [1, 2])
def test_no_site_at_all_is_drawn_too(adapters: int, suffix: str, tmp_path: Path) -> None:
    assert write([], ["a", "b"][:adapters], tmp_path / f"plot{suffix}")
    heads = ("0 vectors, 0 channels", "Nothing to compare")
    assert make_picture([], ["a", "b"][:adapters]).heading.startswith(heads[adapters - 1])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_input_gives_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    first = write(llama(3, 2), ["a", "b"], tmp_path / f"one{suffix}")
    second = write(llama(3, 2), ["a", "b"], tmp_path / f"two{suffix}")
    assert first == second
    assert suffix != ".png" or not {b"tEXt", b"iTXt", b"tIME"} & set(re.findall(b"tEXt|iTXt|tIME", first))


def test_a_png_is_as_wide_as_a_readme(tmp_path: Path) -> None:
    content = write(t5(24), ["a"], tmp_path / "plot.png")
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width == 1600 and 700 < height < 1600


@pytest.mark.slow
def test_a_page_of_two_large_adapters_stays_small(tmp_path: Path) -> None:
    assert len(html_of(llama(80, 2, 1024, 28672), ["a", "b"], tmp_path)) < 1_500_000


def test_a_page_of_many_experts_stays_small(tmp_path: Path) -> None:
    sites = [
        PlotSite(f"layers.{i}.experts.{e}.w", "in", (vector(e, 64),)) for i in range(24) for e in range(64)
    ]
    assert len(html_of(sites, ["a"], tmp_path)) < 2_500_000


@pytest.mark.parametrize("name", ["plot.svg", "plot", "plot.html.gz"])
def test_another_suffix_is_a_usage_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_plot(llama(1), ["a"], tmp_path / name)
    assert caught.value.hint and not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".HTML"])
def test_what_cannot_be_written_is_an_output_error(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(OutputError):
        write_plot(llama(1), ["a"], folder)
    (tmp_path / "file").write_text("")
    if suffix == ".png":
        pytest.importorskip("matplotlib")
    with pytest.raises(OutputError):
        write_plot(llama(1), ["a"], tmp_path / "file" / f"plot{suffix}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", folder.name]


def test_an_old_picture_stays_when_the_new_one_cannot_be_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plot.html"
    file.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_plot(llama(1), ["a"], file)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.html"] and file.read_text() == "old"


def test_new_folders_are_made(tmp_path: Path) -> None:
    write_plot(llama(1), ["a"], tmp_path / "a" / "b" / "plot.html")
    assert (tmp_path / "a" / "b" / "plot.html").is_file()


def test_without_matplotlib_the_hint_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unsupported) as caught:
        write_plot(llama(1), ["a"], tmp_path / "plot.png")
    assert "pip install 'ia3-export[plot]'" in caught.value.hint and not list(tmp_path.iterdir())


def test_the_users_matplotlib_settings_are_neither_used_nor_changed(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    plain = write(llama(1), ["a"], tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red"}):
        assert write(llama(1), ["a"], tmp_path / "two.png") == plain
        assert matplotlib.rcParams["font.size"] == 31
