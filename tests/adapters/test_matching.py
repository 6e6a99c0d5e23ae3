"""Which modules an adapter covers, and which of them on the input: our rules against PEFT's own functions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ia3_export.adapters.model import TargetRules, as_pattern

quick = settings(max_examples=120, deadline=None)

#: Parts of paths that end in one another, hold one another, or mean something in a regular expression.
PARTS = (
    "model", "layers", "layer", "h", "0", "1", "10", "11", "self_attn", "mlp", "k_proj", "v_proj", "xk_proj",
    "proj", "up_proj", "down_proj", "fc2", "output", "dense", "output_dense", "classifier", "score",
    "lm_head", "c.attn", "w+",
)  # fmt: skip

parts = st.sampled_from(PARTS)
paths = st.lists(parts, min_size=1, max_size=5).map(".".join)
entries = st.lists(parts, min_size=1, max_size=3).map(".".join)
lists = st.lists(entries, max_size=4)
saved = st.lists(entries.filter(lambda entry: "+" not in entry), max_size=4)
patterns = st.one_of(
    st.lists(entries, min_size=1, max_size=3).map(lambda some: f".*({'|'.join(some)})"),
    st.tuples(entries, entries).map(lambda two: rf"model\.{two[0]}\.\d+\..*{two[1]}"),
    entries,
    st.sampled_from(
        ["", ".*", r".*_proj", r".*\.(k|v)_proj", r"model\.layers\.[01]\..*", r"(?!.*fc2).*", r".*\.1?\.\w+"]
    ),
)


def config(target: Any, feedforward: Any = (), exclude: Any = None, to_save: Any = None) -> Any:
    """An IA3Config as PEFT makes it of these values.

    Fields set later escape its check that one is a subset.
    """
    from peft import IA3Config

    made = IA3Config(
        target_modules=target, feedforward_modules=[], exclude_modules=exclude, modules_to_save=to_save
    )
    made.feedforward_modules = set(feedforward) if isinstance(feedforward, list) else feedforward
    return made


def rules(target: Any, feedforward: Any = (), exclude: Any = None, to_save: Any = None) -> TargetRules:
    """Our rules from the same values, as the reader makes them of a saved configuration."""
    read = json.loads(json.dumps([target, feedforward, exclude, to_save]))
    return TargetRules(
        target=as_pattern(read[0]),
        feedforward=as_pattern(read[1]),
        exclude=as_pattern(read[2]),
        to_save=tuple(read[3] or ()),
    )


def peft_targets(made: Any, path: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(made, path))


def peft_feedforward(made: Any, path: str) -> bool:
    from peft.tuners.ia3 import IA3Model

    return bool(IA3Model._check_target_module_feedforward(made, path))


@given(st.lists(paths, min_size=1, max_size=6), lists | patterns)
@example(["xk_proj", "k_proj", "a.k_proj", "a.xk_proj"], ["k_proj"])
@example(["model.layers.1.fc2", "model.layers.11.fc2"], ["1.fc2"])
@example(["cXattn", "c.attn", "h.0.c.attn"], ["c.attn"])
@quick
def test_targets_are_those_of_peft(some: list[str], target: Any) -> None:
    assert [rules(target).targets(path) for path in some] == [
        peft_targets(config(target), path) for path in some
    ]


@given(st.lists(paths, min_size=1, max_size=6), lists | patterns)
@example(["model.layers.1.fc2", "model.layers.11.fc2"], ["1.fc2"])
@example(["up_proj", "k_proj", "proj", "proj.dense"], ["proj"])
@example(["model.fc2", "fc2"], "fc2")
@quick
def test_feedforward_modules_are_those_of_peft(some: list[str], feedforward: Any) -> None:
    ours, theirs = rules([], feedforward), config([], feedforward)
    assert [ours.is_feedforward(path) for path in some] == [peft_feedforward(theirs, path) for path in some]


@given(st.lists(paths, min_size=1, max_size=6), lists | patterns, lists | patterns)
@quick
def test_excluded_modules_are_those_of_peft(some: list[str], target: Any, exclude: Any) -> None:
    ours, theirs = rules(target, exclude=exclude), config(target, exclude=exclude)
    assert [ours.targets(path) for path in some] == [peft_targets(theirs, path) for path in some]


@given(st.lists(paths, min_size=1, max_size=6), lists | patterns, st.none() | saved)
@example(
    ["classifier", "classifier.dense", "bert.classifier.dense", "bert.xclassifier"], [".*"], ["classifier"]
)
@quick
def test_nothing_in_modules_to_save_is_a_target_as_in_peft(
    some: list[str], target: Any, to_save: Any
) -> None:
    ours, theirs = rules(target, to_save=to_save), config(target, to_save=to_save)
    assert [ours.targets(path) for path in some] == [peft_targets(theirs, path) for path in some]


@pytest.mark.parametrize(
    ("entry", "path"), [("layer.0", "layer_0.k_proj"), ("score|head", "head"), ("h.*", "h.0.k_proj")]
)
def test_an_entry_of_modules_to_save_is_a_regular_expression_as_in_peft(entry: str, path: str) -> None:
    assert rules(".*", to_save=[entry]).targets(path) == peft_targets(config(".*", to_save=[entry]), path)


@given(
    st.lists(paths, min_size=1, max_size=6),
    lists | patterns,
    lists | patterns,
    st.none() | lists | patterns,
    st.none() | saved,
)
@quick
def test_all_rules_together_are_those_of_peft(
    some: list[str], target: Any, feedforward: Any, exclude: Any, to_save: Any
) -> None:
    ours, theirs = rules(target, feedforward, exclude, to_save), config(target, feedforward, exclude, to_save)
    for path in some:
        assert ours.targets(path) == peft_targets(theirs, path), path
        assert ours.is_feedforward(path) == peft_feedforward(theirs, path), path


@pytest.mark.parametrize("kind", [list, str])
def test_the_rules_of_a_saved_configuration_cover_the_modules_that_peft_wrapped(
    kind: type, tmp_path: Any
) -> None:
    """The whole way, through PEFT's injection and its own configuration file."""
    import torch
    from peft import IA3Config, get_peft_model
    from peft.tuners.ia3 import IA3Layer

    def block() -> torch.nn.Module:
        names = ("k_proj", "xk_proj", "fc2", "score")
        return torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in names})

    model = torch.nn.ModuleDict({f"layer{i}": block() for i in range(12)})
    lists = kind is list
    wrapped = get_peft_model(
        model,
        IA3Config(
            target_modules=["k_proj", "fc2", "score"] if lists else r".*\.(k_proj|fc2|score)",
            feedforward_modules=["fc2"] if lists else r"layer1\d?\.fc2",
            exclude_modules=["layer3.k_proj"] if lists else r"layer3\..*",
            modules_to_save=["layer0.score"],
        ),
    )
    wrapped.save_pretrained(tmp_path)
    read = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = rules(
        *(
            read[key]
            for key in ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")
        )
    )
    live = wrapped.get_base_model()
    found = {
        path: module.is_feedforward for path, module in live.named_modules() if isinstance(module, IA3Layer)
    }
    paths = [f"layer{i}.{name}" for i in range(12) for name in ("k_proj", "xk_proj", "fc2", "score")]
    assert {path: ours.is_feedforward(path) for path in paths if ours.targets(path)} == found


@pytest.mark.parametrize(
    "value", [7, True, {"k_proj": 1}, ["k_proj", 7], [["k_proj"]], "(unclosed", "*"], ids=repr
)
def test_what_is_neither_names_nor_a_regular_expression_is_no_pattern(value: Any) -> None:
    import re

    with pytest.raises((ValueError, re.error)):
        as_pattern(value)
