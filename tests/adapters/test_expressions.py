"""Regular expressions in an adapter's configuration.

What PEFT's ``re`` matches, in bounded time, and no traceback.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from ia3_export.adapters.model import TargetRules
from ia3_export.errors import DamagedFile
from tests.e2e.command import only_complaint, run, vary_adapter
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")

#: Each takes longer than the age of the universe on ``model.layers.0.self_attn.q_proj`` and its like.
ENDLESS = [r"(.+)+,", r"([\w.]+\w?)+!", r"(?:[a-z_]+|[\w.]+)*,", r"^(([a-z_.0-9])+)+,$"]
#: As long without a repeat: every option and every pair of alternatives doubles the ways.
OPTIONS = [".?" * 40 + ",", "(|.)" * 40 + ",", "(..|)" * 38 + ","]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    kind, folder = zoo.by_name("llama"), tmp_path_factory.mktemp("llama")
    model = zoo.build(kind)
    model.save_pretrained(folder / "base")
    zoo.adapt(model, kind).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def _vary(saved: tuple[Path, Path], folder: Path, **config: Any) -> Path:
    return vary_adapter(saved[1], folder / "varied", lambda _: None, **config)


KEYS = ["target_modules", "feedforward_modules", "exclude_modules", "modules_to_save"]


@pytest.mark.parametrize(
    ("key", "expression"), [*zip(KEYS, ENDLESS, strict=True), *zip(KEYS, OPTIONS, strict=False)]
)
def test_an_expression_without_end_is_refused_by_name(
    saved: tuple[Path, Path], tmp_path: Path, key: str, expression: str
) -> None:
    adapter = _vary(saved, tmp_path, **{key: [expression] if key == "modules_to_save" else expression})
    start = time.monotonic()
    ran = run("inspect", adapter, "--base", saved[0])
    assert time.monotonic() - start < 6
    only_complaint(ran, 3, "adapter_config.json", repr(expression)[1:-1], "2 seconds")


def test_a_rule_of_ours_without_end_is_wrong_usage(saved: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "vectors.safetensors"
    file.write_bytes((saved[1] / "adapter_model.safetensors").read_bytes())
    ran = run("inspect", file, "--map", r"(.+)+,=output")
    only_complaint(ran, 2, "--map", "(.+)+,")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["(?i)LM_HEAD"]),
        ("modules_to_save", "lm_head)"),
        ("modules_to_save", ["lm_head", "["]),
        ("target_modules", "q_proj("),
        ("target_modules", "a{99999999999999999999}"),
        ("target_modules", "(" * 5000 + ")" * 5000),
        ("target_modules", 3),
        ("feedforward_modules", "[z-a]"),
        ("feedforward_modules", {"down_proj": True}),
        ("exclude_modules", [1, 2]),
    ],
)
def test_what_is_no_expression_is_refused_by_name(
    saved: tuple[Path, Path], tmp_path: Path, key: str, value: Any
) -> None:
    adapter = _vary(saved, tmp_path, **{key: value})
    only_complaint(run("inspect", adapter, "--base", saved[0]), 3, "adapter_config.json", key)


def test_a_slow_but_finite_expression_is_matched(saved: tuple[Path, Path], tmp_path: Path) -> None:
    repeats = r"(\w+\.)+(k_proj|v_proj|down_proj)"
    ran = run("inspect", _vary(saved, tmp_path, target_modules=repeats), "--base", saved[0])
    assert ran.code == 0, ran
    assert "refused" not in ran.stdout


@pytest.mark.parametrize(
    "expression",
    [r".*\.(q|k)_proj", r"(?i).*Q_PROJ", r"model\.layers\.[01]\..*", r"(?:x{e<=1}|.*q_proj)", r"[[:alpha:]]+",
     r".*(?<!v)_proj\Z",
     "model.layers.0.self_attn.q_proj", "q_proj", r"(?P<a>.)(?P=a)*|.+k_proj"],
)  # fmt: skip
def test_expressions_match_as_re_does(expression: str) -> None:
    names = [
        f"model.layers.{layer}.self_attn.{leaf}"
        for layer in range(12)
        for leaf in ("q_proj", "K_proj", "v_proj\n")
    ]
    rules = TargetRules(target=expression, feedforward=expression, to_save=("classifier",))
    rules.look_at(names[:7])
    for name in names:
        assert rules.targets(name) == rules.is_feedforward(name) == bool(re.fullmatch(expression, name))


@pytest.mark.parametrize("name", ["score", "head|lm", "layers.0", "cl.ssifier", "(?:a|score)", "score$"])
def test_names_of_heads_match_as_peft_matches_them(name: str) -> None:
    rules = TargetRules(target=None, feedforward=None, to_save=(name,))
    for module in (
        "score",
        "model.score",
        "score.dense",
        "xscore",
        "head",
        "model.layers.0.q",
        "classifier",
        "lm_head",
    ):
        assert rules.saves(module) == bool(re.match(rf"(^|.*\.){name}($|\..*)", module)), module


def test_all_expressions_of_a_configuration_share_their_time() -> None:
    rules = TargetRules(target=ENDLESS[0], feedforward=(), exclude=None)
    start = time.monotonic()
    for name in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
    ):
        with pytest.raises(DamagedFile):
            rules.targets(name)
    assert time.monotonic() - start < 5
