"""``ia3-export inspect --compare`` from the outside: its figures against numpy's, adapters of any format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.command import contents, only_complaint, run, vary_adapter
from tests.e2e.conftest import Tiny

PREFIX = "base_model.model."
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No narrow terminal, which xdist claims to have: rows stay whole."""
    monkeypatch.delenv("COLUMNS", raising=False)


def compare(one: Path, other: Path, *more: str) -> dict[str, Any]:
    ran = run("inspect", "--compare", one, other, "--json", *more)
    assert ran.code == 0, ran
    document: dict[str, Any] = json.loads(ran.stdout, parse_constant=pytest.fail)
    return document


def vectors(adapter: Path) -> dict[str, np.ndarray]:
    stored = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix(PREFIX).removesuffix(".ia3_l"): value.reshape(-1).astype(np.float64)
        for name, value in stored.items()
        if name.endswith(".ia3_l")
    }


def write_adapter(folder: Path, found: dict[str, Any], feedforward: tuple[str, ...] = ()) -> Path:
    """A PEFT adapter of vectors on outputs, on inputs for modules in `feedforward`."""
    folder.mkdir()
    shaped = {
        f"{PREFIX}{module}.ia3_l": np.array(value, np.float32).reshape(
            (1, -1) if module in feedforward else (-1, 1)
        )
        for module, value in found.items()
    }
    save_file(shaped, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "IA3", "target_modules": sorted(found), "feedforward_modules": sorted(feedforward)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ------------------------------------------------------------------------------------------------------------
# figures


def test_the_figures_are_numpys(tiny: Tiny) -> None:
    document = compare(tiny.adapter, tiny.other)
    one, other = vectors(tiny.adapter), vectors(tiny.other)
    sites = {site["module"]: site for site in document["sites"]}
    assert set(sites) == {*one, *other} and len(document["sites"]) == 8
    shared = [module for module in sites if module in one and module in other]
    assert len(shared) == 4
    for module in shared:
        a, b, site = one[module], other[module], sites[module]
        assert site["where"] == "both"
        assert site["cosine"] == pytest.approx(cosine(a - 1, b - 1), rel=1e-9)
        assert site["distance"] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=1e-9)
        assert site["largest"] == pytest.approx(np.abs(a - b).max(), rel=1e-9)
        assert site["channel"] == int(np.argmax(np.abs(a - b)))
        low, high = (np.array([np.abs(v) < 0.99, np.abs(v) > 1.01]) for v in (a, b))
        assert site["opposite"] == int(np.sum(low[0] & high[1]) + np.sum(low[1] & high[0]))
        assert site["agreeing"] == int(np.sum((low == high).all(0) & (np.sign(a) == np.sign(b))))
        assert 0 < site["opposite"] < len(a)
    whole = [np.concatenate([found[module] - 1 for module in shared]) for found in (one, other)]
    assert document["cosine"] == pytest.approx(cosine(*whole), rel=1e-9)


def test_every_site_has_the_statistics_of_inspect(tiny: Tiny) -> None:
    document = compare(tiny.adapter, tiny.other)
    for letter, adapter in (("a", tiny.adapter), ("b", tiny.other)):
        alone = json.loads(run("inspect", adapter, "--json").stdout)
        assert {site["module"]: site[letter] for site in document["sites"] if site[letter]} == {
            site["module"]: site for site in alone["sites"]
        }
        side = document[letter]
        assert (side["name"], side["format"], side["vectors"]) == (adapter.name, "peft", 6)
        assert side["parameters"] == alone["parameters"] and side["task_type"] == alone["task_type"]
    assert document["schema"] == "ia3-export/compare/1"


def test_an_adapter_is_like_itself_and_turned_over_its_opposite(tiny: Tiny, tmp_path: Path) -> None:
    document = compare(tiny.adapter, tiny.adapter)
    for site in document["sites"]:
        assert (site["distance"], site["largest"], site["opposite"]) == (0, 0, 0)
        assert site["cosine"] == pytest.approx(1) and site["agreeing"] == site["a"]["length"]

    def turn(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = 2 - tensors[name]

    turned = compare(tiny.adapter, vary_adapter(tiny.adapter, tmp_path / "turned", turn))
    assert turned["cosine"] == pytest.approx(-1, abs=1e-6)


def test_hand_made_channels_are_counted_as_they_are(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", {"m": [0.5, 0.5, 1.5, 1.005, -0.5, 2.0, 1.0]})
    other = write_adapter(tmp_path / "two", {"m": [0.7, 1.5, 0.5, 0.995, 0.5, 2.0, 1.5]})
    (site,) = compare(one, other)["sites"]
    # alike: both inhibited, both unchanged, both amplified; -0.5 and 0.5 are inhibited with other signs
    assert (site["opposite"], site["agreeing"], site["channel"]) == (2, 3, 1)
    assert site["largest"] == 1.0


def test_an_adapter_of_ones_has_no_direction(tmp_path: Path) -> None:
    ones = write_adapter(tmp_path / "ones", {"m": [1, 1, 1]})
    other = write_adapter(tmp_path / "other", {"m": [1, 2, 1]})
    document = compare(ones, other)
    assert document["cosine"] is None and document["sites"][0]["cosine"] is None
    assert document["sites"][0]["distance"] == pytest.approx(3**-0.5)
    assert "no direction in common" in run("inspect", "--compare", ones, other).stdout


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = write_adapter(
        tmp_path / "one", {"x.side": [1, 2], "x.length": [1, 2], "x.left": [3, 3], "x.both": [1, 2]}
    )
    other = write_adapter(
        tmp_path / "two",
        {"x.side": [1, 2], "x.length": [1, 2, 3], "x.right": [3, 3], "x.both": [2, 1]},
        ("x.side",),
    )
    document = compare(one, other)
    where = {site["module"]: site["where"] for site in document["sites"]}
    assert where == {
        "x.side": "sides",
        "x.length": "lengths",
        "x.left": "a",
        "x.right": "b",
        "x.both": "both",
    }
    for site in document["sites"]:
        if site["where"] != "both":
            assert {site[key] for key in ("cosine", "distance", "largest", "channel", "opposite")} == {None}
        assert (site["a"] is None) == (site["where"] == "b") and (site["b"] is None) == (site["where"] == "a")
    text = run("inspect", "--compare", one, other).stdout
    for words in ("a only", "b only", "other sides", "other lengths", "1 of 5 sites in both"):
        assert words in text
    nothing = compare(write_adapter(tmp_path / "three", {"y": [1]}), one)
    assert nothing["cosine"] is None and len(nothing["sites"]) == 5


def test_what_differs_most_comes_first(tiny: Tiny) -> None:
    sites = compare(tiny.adapter, tiny.other)["sites"]
    kinds = [site["where"] == "both" for site in sites]
    assert kinds == sorted(kinds), "what is in one adapter only stands above"
    apart = [site["distance"] for site in sites if site["where"] == "both"]
    assert apart == sorted(apart, reverse=True) and len(set(apart)) == 4
    names = [site["module"] for site in sites if site["where"] != "both"]
    assert names == sorted(names)


def test_other_tensors_are_equal_or_different(tiny: Tiny, tmp_path: Path) -> None:
    head = np.arange(12, dtype=np.float32).reshape(3, 4)

    def brings(*tensors: tuple[str, np.ndarray]) -> Callable[[dict[str, Any]], None]:
        return lambda found: found.update({f"{PREFIX}{name}": value for name, value in tensors})

    saved = {"modules_to_save": ["head", "norm", "embed"]}
    one = vary_adapter(
        tiny.adapter,
        tmp_path / "a",
        brings(("head.weight", head), ("norm.weight", head[0]), ("embed.weight", head)),
        **saved,
    )
    other = vary_adapter(
        tiny.other, tmp_path / "b", brings(("head.weight", head), ("norm.weight", head[1])), **saved
    )
    document = compare(one, other)
    assert document["extra_tensors"] == {
        "equal": ["head.weight"],
        "different": ["embed.weight", "norm.weight"],
    }
    text = run("inspect", "--compare", one, other).stdout
    assert "equal: head.weight" in text and "different: embed.weight, norm.weight" in text


# ------------------------------------------------------------------------------------------------------------
# formats


@pytest.mark.parametrize(
    "name",
    [
        "research/tfew_gated_t5",
        "research/mats",
        "research/mttl",
        "research/tango_gpt2",
        "adapterhub/bert_masked_lm_static",
        "adapterhub/llama_static",
        "old_peft/0.4.0-t5",
    ],
)
def test_an_adapter_is_its_own_conversion(tmp_path: Path, name: str) -> None:
    folder = FIXTURES / name
    case = json.loads((folder / "case.json").read_text())
    if "checkpoint" in case:
        source = folder / case["checkpoint"]
    elif "adapters" in case:
        source = folder / next(iter(case["adapters"].values()))
    else:
        source = folder / "adapter" / case["adapter_names"][0]
        source = source if source.is_dir() else folder / "adapter"
    ran = run("convert", source, "--output", tmp_path / "peft", "--allow-unused")
    assert ran.code == 0, ran
    document = compare(source, tmp_path / "peft")
    assert document["b"]["format"] == "peft" and document["a"]["format"] == name.partition("/")[0].replace(
        "research", document["a"]["format"]
    ).replace("old_peft", "peft")
    assert document["a"]["vectors"] == document["b"]["vectors"] > 0
    for site in document["sites"]:
        assert site["where"] == "both" and site["distance"] == 0 and site["opposite"] == 0
        assert site["agreeing"] == site["a"]["length"]


def test_mapped_vectors_are_compared_with_pefts(tiny: Tiny, tmp_path: Path) -> None:
    bare = {f"{module}/l": value.astype(np.float32) for module, value in vectors(tiny.adapter).items()}
    save_file(bare, tmp_path / "bare.safetensors")
    rules = ("--map", "(.+mlp.+)/l=input", "--map", "(.+)/l=output")
    document = compare(tiny.adapter, tmp_path / "bare.safetensors", *rules)
    assert document["b"]["format"] == "mapped" and len(document["sites"]) == 6
    assert {(site["where"], site["distance"]) for site in document["sites"]} == {("both", 0.0)}


# ------------------------------------------------------------------------------------------------------------
# text


def test_people_read_totals_and_sites(tiny: Tiny) -> None:
    document = compare(tiny.adapter, tiny.other)
    ran = run("inspect", tiny.adapter, "--compare", tiny.other)
    assert ran.code == 0
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("a: adapter, peft, 6 vectors, 160 parameters")
    assert lines[1].startswith("b: other, peft, 6 vectors, ")
    assert f"4 of 8 sites in both: cosine of their changes {document['cosine']:+.3f}" in lines[2]
    assert f"{sum(site['opposite'] or 0 for site in document['sites'])} inhibited by one" in lines[2]
    for site in document["sites"]:
        (row,) = [line for line in lines if line.split()[:1] == [site["module"]]]
        if site["distance"] is not None:
            assert f"{site['distance']:.4f}" in row and f"{site['cosine']:+.3f}" in row
    assert run("inspect", "--compare", tiny.adapter, tiny.other, "--quiet").stdout == ""


def test_many_sites_are_shortened_unless_asked_for(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", {f"m.{i:02}": [1, 2] for i in range(20)})
    other = write_adapter(tmp_path / "two", {f"m.{i:02}": [1, 2 + i] for i in range(20)})
    short, whole = (run("inspect", "--compare", one, other, *more).stdout for more in ((), ("--verbose",)))
    assert "... and 8 sites that differ less (--verbose shows all)" in short
    assert "m.19" in short and "m.00" not in short
    assert "m.00" in whole and "differ less" not in whole


HOSTILE = "m.\x1b]0;owned\x07\x1b[2J\r\u202eevil.\u2028[bold red]k"


def test_control_characters_of_a_module_path_do_not_reach_the_terminal(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", {HOSTILE: [1, 2], "m": [1, 1]})
    other = write_adapter(tmp_path / "two", {HOSTILE: [2, 1]})
    ran = run("inspect", "--compare", one, other)
    assert ran.code == 0
    text = ran.stdout + ran.stderr
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "[bold red]k" in text, "markup is text"
    document = run("inspect", "--compare", one, other, "--json")
    assert json.loads(document.stdout)["sites"][-1]["module"] == HOSTILE
    assert "\x1b" not in document.stdout


# --------------------------------------------------------------------------------------------------------
# wrong usage


def test_the_flag_may_stand_anywhere(tiny: Tiny) -> None:
    orders = (
        ("--compare", tiny.adapter, tiny.other),
        (tiny.adapter, "--compare", tiny.other),
        (tiny.adapter, tiny.other, "--compare"),
    )
    texts = {run("inspect", *order).stdout for order in orders}
    assert len(texts) == 1 and "sites in both" in texts.pop()


def test_wrong_numbers_of_adapters_are_wrong_usage(tiny: Tiny) -> None:
    a, b = tiny.adapter, tiny.other
    for words in ((), (a, b), ("--compare", a), ("--compare",), ("--compare", a, b, a)):
        only_complaint(run("inspect", *words), 2)
    only_complaint(run("inspect", "--compare", a, b, "--base", tiny.base), 2, "--base")


def test_a_missing_adapter_is_named_and_nothing_is_touched(tiny: Tiny, tmp_path: Path) -> None:
    before = contents(tiny.adapter)
    only_complaint(run("inspect", "--compare", tiny.adapter, tmp_path / "nowhere"), 3, "nowhere")
    assert contents(tiny.adapter) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_give_json_all_the_same(tiny: Tiny, tmp_path: Path, bad: float) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values())).reshape(-1)[3] = bad

    compare(tiny.adapter, vary_adapter(tiny.adapter, tmp_path / "bad", spoil))
