"""``ia3-export combine`` from the outside.

Its vectors against PEFT's, and what the adapter does where it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.command import Ran, contents, merge, only_complaint, run, vary_adapter
from tests.e2e.conftest import Tiny
from tests.support.tensors import read_folder, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

PREFIX = "base_model.model."
Tensors = dict[str, Any]


def combine(output: Path, *adapters: Path, how: str = "product", weights: str | None = None) -> Ran:
    """``combine``, which must succeed."""
    given = [word for adapter in adapters for word in ("--adapter", adapter)]
    more = () if weights is None else ("--weights", weights)
    ran = run("combine", *given, "--combine", how, *more, "--output", output)
    assert ran.code == 0, ran
    return ran


def refused(
    output: Path, *adapters: Path, code: int = 3, mentions: str = "", options: tuple[str, ...] = ()
) -> None:
    """``combine`` that must fail and leave nothing behind."""
    before = contents(output.parent)
    given = [word for adapter in adapters for word in ("--adapter", adapter)]
    only_complaint(run("combine", *given, "--output", output, *options), code, mentions)
    assert contents(output.parent) == before


def vectors(adapter: Path) -> Mapping[str, np.ndarray]:
    """Vectors by module path, in one dimension."""
    stored = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix(PREFIX).removesuffix(".ia3_l"): value.reshape(-1)
        for name, value in stored.items()
        if name.endswith(".ia3_l")
    }


def with_head(source: Path, folder: Path, head: np.ndarray) -> Path:
    def edit(tensors: Tensors) -> None:
        tensors[f"{PREFIX}lm_head.weight"] = head

    return vary_adapter(source, folder, edit, modules_to_save=["lm_head"])


def live(base: Path, *adapters: Path) -> Any:
    """The base in PEFT with all `adapters`, named a0, a1, ..."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    adapted = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for i, adapter in enumerate(adapters[1:], 1):
        adapted.load_adapter(adapter, f"a{i}")
    return adapted.eval()


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(5, 29).view(2, 12)).logits


# ------------------------------------------------------------------------------------------------- PEFT's
# weighted sum


@pytest.mark.parametrize("weights", ["0.5,0.5", "0.7,0.3", "1,1", "-0.4,1.7", "0.1,0.2", "0,1"])
def test_linear_has_the_bits_of_pefts_weighted_adapter(tiny: Tiny, tmp_path: Path, weights: str) -> None:
    """Each adapter lacks a projection of the other, where PEFT counts zeros."""
    combine(tmp_path / "sum", tiny.adapter, tiny.other, how="linear", weights=weights)
    model = live(tiny.single, tiny.adapter, tiny.other)
    model.add_weighted_adapter(["a0", "a1"], [float(w) for w in weights.split(",")], "sum")
    wanted = {
        name.partition(PREFIX)[2].removesuffix(".ia3_l.sum"): value.detach().numpy().reshape(-1)
        for name, value in model.named_parameters()
        if name.endswith(".ia3_l.sum")
    }
    found = vectors(tmp_path / "sum")
    assert set(found) == set(wanted) and len(found) == 8
    assert [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()] == []


def test_linear_of_three_adapters_adds_in_pefts_order(tiny: Tiny, tmp_path: Path) -> None:
    def shrink(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name] * np.float32(1e-3)

    third = vary_adapter(tiny.adapter, tmp_path / "third", shrink)
    combine(tmp_path / "sum", tiny.adapter, third, tiny.other, how="linear", weights="0.3,0.3,0.4")
    model = live(tiny.single, tiny.adapter, third, tiny.other)
    model.add_weighted_adapter(["a0", "a1", "a2"], [0.3, 0.3, 0.4], "sum")
    for name, value in vectors(tmp_path / "sum").items():
        wanted = model.get_parameter(f"{PREFIX}{name}.ia3_l.sum").detach().numpy().reshape(-1)
        assert value.tobytes() == wanted.tobytes(), name


def test_linear_says_what_its_sum_does(tiny: Tiny, tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if "v_proj" in name]:
            del tensors[name]

    less = vary_adapter(tiny.adapter, tmp_path / "less", drop, target_modules=["k_proj", "down_proj"])
    quiet = combine(tmp_path / "same", less, tiny.other, how="linear", weights="0.5,0.5")
    assert "the weights sum to" not in quiet.stdout
    assert "less has no vector for 2 modules" in quiet.stdout and "adapter has no" not in quiet.stdout
    loud = combine(tmp_path / "more", tiny.adapter, tiny.other, how="linear", weights="1,1")
    assert "the weights sum to 2" in loud.stdout
    assert (
        "adapter has no vector for 2 modules of the others, first model.layers.0.self_attn.q_proj"
        in loud.stdout
    )
    assert (
        "other has no vector for 2 modules of the others, first model.layers.0.self_attn.v_proj"
        in loud.stdout
    )


@pytest.mark.parametrize("how", ["delta", "product"])
def test_the_other_ways_have_nothing_to_warn_of(tiny: Tiny, tmp_path: Path, how: str) -> None:
    ran = combine(
        tmp_path / "out", tiny.adapter, tiny.other, how=how, weights="1,1" if how == "delta" else None
    )
    assert "warning" not in ran.stdout


# -------------------------------------------------------------------------------------------------
# delta and product


@pytest.mark.parametrize("weights", [(0.7, 0.3), (2.0, -1.5)])
def test_delta_adds_the_changes(tiny: Tiny, tmp_path: Path, weights: tuple[float, float]) -> None:
    combine(tmp_path / "out", tiny.adapter, tiny.other, how="delta", weights="{},{}".format(*weights))
    one, other = vectors(tiny.adapter), vectors(tiny.other)
    for name, value in vectors(tmp_path / "out").items():
        wanted = np.ones(len(value))
        for adapter, weight in zip((one, other), weights, strict=True):
            if name in adapter:  # a missing vector changes nothing
                wanted += weight * (adapter[name].astype(np.float64) - 1)
        np.testing.assert_allclose(value, wanted, rtol=2**-23, atol=1e-9, err_msg=name)
        assert value.dtype == np.float32


def test_product_multiplies_element_by_element(tiny: Tiny, tmp_path: Path) -> None:
    combine(tmp_path / "out", tiny.adapter, tiny.other)
    one, other = vectors(tiny.adapter), vectors(tiny.other)
    found = vectors(tmp_path / "out")
    assert set(found) == {*one, *other}
    for name, value in found.items():
        wanted = one.get(name, np.float32(1)) * other.get(name, np.float32(1))  # rounds once: IEEE
        assert value.tobytes() == wanted.tobytes(), name


def test_the_product_does_what_both_adapters_do(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    combine(tmp_path / "out", tiny.adapter, tiny.other)
    both = live(tiny.single, tiny.adapter, tiny.other)
    both.base_model.set_adapter(["a0", "a1"])
    wanted, alone = logits(both), logits(live(tiny.single, tiny.adapter))
    torch.testing.assert_close(logits(live(tiny.single, tmp_path / "out")), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - alone).abs().max() > 0.05, "else the second adapter would not show"


def test_narrow_vectors_become_float32_and_wide_ones_stay(tiny: Tiny, tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16)

    def widen(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float64)

    half, wide = (
        vary_adapter(tiny.adapter, tmp_path / "half", halve),
        vary_adapter(tiny.other, tmp_path / "wide", widen),
    )
    combine(tmp_path / "narrow", half, tiny.other)
    assert {value.dtype for value in vectors(tmp_path / "narrow").values()} == {np.dtype("f4")}
    combine(tmp_path / "mixed", half, wide)
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in vectors(tmp_path / "mixed").items()}
    assert kinds == {"k_proj": "f8", "q_proj": "f8", "down_proj": "f8", "v_proj": "f4"}


# ----------------------------------------------------------------------------------------------------
# what is written


@pytest.mark.parametrize(
    ("how", "weights"), [("product", None), ("delta", "0.5,0.75"), ("linear", "0.25,0.75")]
)
def test_merging_the_combination_is_merging_combined(
    tiny: Tiny, tmp_path: Path, how: str, weights: str | None
) -> None:
    """In float32, where ``merge --combine`` rounds the same vectors.

    A product folds its two vectors one by one.
    """
    import torch

    combine(tmp_path / "out", tiny.adapter, tiny.other, how=how, weights=weights)
    merge(tiny.single, tmp_path / "out", tmp_path / "once")
    more = [] if weights is None else ["--weights", weights]
    merge(tiny.single, tiny.adapter, tmp_path / "at-once", "--adapter", tiny.other, "--combine", how, *more)
    once, at_once = read_folder(tmp_path / "once"), read_folder(tmp_path / "at-once")
    for name, value in once.items():
        if how == "product":
            torch.testing.assert_close(value, at_once[name], rtol=3e-7, atol=1e-30)
        else:
            assert same(value, at_once[name]), name


def test_the_same_input_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    for place in ("one", "two"):
        combine(tmp_path / place / "out", tiny.adapter, tiny.other, how="delta", weights="0.5,0.5")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one" / "out")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "ia3_export.json",
    ]


def test_the_json_document_is_the_one_in_the_folder_and_true(tiny: Tiny, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "out"
    words = ["combine", "--adapter", tiny.adapter, "--adapter", tiny.other, "--combine", "linear"]
    ran = run(*words, "--weights", "1,-2", "--output", out, "--json")
    assert ran.code == 0 and "vectors" in ran.stderr
    document = json.loads(ran.stdout)
    assert document == json.loads((out / "ia3_export.json").read_text())
    assert document["schema"] == "ia3-export/adapter/1" and document["command"] == "combine"
    assert document["options"] == {"combine": "linear", "weights": [1.0, -2.0]}
    assert [source["name"] for source in document["sources"]] == ["adapter", "other"]
    assert [source["vectors"] for source in document["sources"]] == [6, 6]
    assert document["vectors"] == 8 and document["parameters"] == sum(map(len, vectors(out).values()))
    assert len(document["warnings"]) == 3
    weights = "adapter_model.safetensors"
    digest = hashlib.sha256((tiny.adapter / weights).read_bytes()).hexdigest()
    assert digest in json.dumps(document["sources"][0]["files"])
    assert hashlib.sha256((out / weights).read_bytes()).hexdigest() in json.dumps(document["files"])
    assert str(tmp_path) not in ran.stdout


def test_the_inputs_stay_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    before = contents(tiny.adapter), contents(tiny.other)
    combine(tmp_path / "out", tiny.adapter, tiny.other)
    assert (contents(tiny.adapter), contents(tiny.other)) == before


def test_an_existing_folder_is_replaced_only_on_demand(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    combine(out, tiny.adapter, tiny.other)
    product = contents(out)
    (out / "mine.txt").write_text("mine")
    refused(out, tiny.adapter, tiny.other, code=4, mentions="already exists")
    words = ["combine", "--adapter", tiny.adapter, "--adapter", tiny.other, "--output", out]
    only_complaint(run(*words, "--overwrite"), 4, "mine.txt, which ia3-export did not write")
    (out / "mine.txt").unlink()
    (out / "adapter_config.json").write_text("old")
    assert run(*words, "--overwrite").code == 0
    assert contents(out) == product
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["", "inside"])
def test_an_input_is_never_the_output(tiny: Tiny, tmp_path: Path, place: str) -> None:
    copy = shutil.copytree(tiny.other, tmp_path / "copy")
    refused(copy / place, tiny.adapter, copy, options=("--overwrite",))


# ---------------------------------------------------------------------------------------------------------
# refusals


def test_other_sides_of_a_module_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    def turn(tensors: Tensors) -> None:
        for name in [name for name in tensors if "k_proj" in name]:
            tensors[name] = np.ones((1, 32), np.float32)

    turned = vary_adapter(
        tiny.adapter, tmp_path / "turned", turn, feedforward_modules=["k_proj", "down_proj"]
    )
    refused(tmp_path / "out", tiny.other, turned, mentions="self_attn.k_proj")


def test_other_lengths_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        for name in [name for name in tensors if "down_proj" in name]:
            tensors[name] = np.ascontiguousarray(tensors[name][:, :40])

    short = vary_adapter(tiny.adapter, tmp_path / "short", cut)
    refused(tmp_path / "out", short, tiny.other, mentions="40 and 48 elements")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_refused(tiny: Tiny, tmp_path: Path, bad: float) -> None:
    def spoil(tensors: Tensors) -> None:
        next(iter(tensors.values())).reshape(-1)[3] = bad

    refused(
        tmp_path / "out",
        tiny.adapter,
        vary_adapter(tiny.other, tmp_path / "bad", spoil),
        mentions="element 3",
    )


def test_different_heads_are_refused_and_equal_ones_kept(tiny: Tiny, tmp_path: Path) -> None:
    head = np.random.default_rng(0).normal(size=(128, 32)).astype(np.float32)
    one, same_head = (
        with_head(tiny.adapter, tmp_path / "one", head),
        with_head(tiny.other, tmp_path / "two", head),
    )
    unlike = with_head(tiny.other, tmp_path / "three", head + 1)
    refused(tmp_path / "out", one, unlike, mentions="lm_head.weight")
    for name, others in (("equal", (one, same_head)), ("lone", (one, tiny.other))):
        combine(tmp_path / name, *others)
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert stored[f"{PREFIX}lm_head.weight"].tobytes() == head.tobytes()
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["lm_head"]
        merge(tiny.single, tmp_path / name, tmp_path / f"{name}-merged")
        merged = read_folder(tmp_path / f"{name}-merged")["lm_head.weight"]
        assert merged.numpy().tobytes() == head.tobytes()
    loaded = live(tiny.single, tmp_path / "equal").merge_and_unload().lm_head.weight
    assert loaded.detach().numpy().tobytes() == head.tobytes()


@pytest.mark.parametrize(
    "options",
    [
        ("--combine", "linear"),
        ("--combine", "delta", "--weights", "1"),
        ("--combine", "linear", "--weights", "1,2,3"),
        ("--combine", "product", "--weights", "0.5,0.5"),
        ("--weights", "1"),
        ("--combine", "delta", "--weights", "nan,1"),
        ("--combine", "delta", "--weights", "1,inf"),
        ("--combine", "delta", "--weights", "half,half"),
        ("--combine", "sum"),
    ],
)
def test_wrong_weights_are_wrong_usage(tiny: Tiny, tmp_path: Path, options: tuple[str, ...]) -> None:
    refused(tmp_path / "out", tiny.adapter, tiny.other, code=2, options=options)


def test_weights_alone_mean_linear(tiny: Tiny, tmp_path: Path) -> None:
    combine(tmp_path / "said", tiny.adapter, tiny.other, how="linear", weights="0.25,0.75")
    words = ["combine", "--adapter", tiny.adapter, "--adapter", tiny.other, "--weights", "0.25,0.75"]
    assert run(*words, "--output", tmp_path / "implied").code == 0
    assert contents(tmp_path / "implied") == contents(tmp_path / "said")


def test_one_adapter_is_not_enough_and_none_counts_twice(tiny: Tiny, tmp_path: Path) -> None:
    refused(tmp_path / "out", tiny.adapter, code=2, mentions="at least two")
    refused(tmp_path / "out", tiny.adapter, tiny.adapter, code=2, mentions="twice")


def test_a_missing_adapter_leaves_nothing_behind(tiny: Tiny, tmp_path: Path) -> None:
    refused(tmp_path / "out", tiny.adapter, tmp_path / "nowhere")


def test_an_overflowing_product_is_not_written(tiny: Tiny, tmp_path: Path) -> None:
    def enlarge(tensors: Tensors) -> None:
        next(iter(tensors.values())).reshape(-1)[0] = 1e30

    one, other = (
        vary_adapter(tiny.adapter, tmp_path / "one", enlarge),
        vary_adapter(tiny.adapter, tmp_path / "two", enlarge),
    )
    refused(tmp_path / "out", one, other)


def test_two_files_of_one_folder_are_two_adapters(tiny: Tiny, tmp_path: Path) -> None:
    for name, source in (("one", tiny.adapter), ("two", tiny.other)):
        found = {f"{module}.scale": value for module, value in vectors(source).items() if "k_proj" in module}
        save_file(found, tmp_path / f"{name}.safetensors")
    given = [word for name in ("one", "two") for word in ("--adapter", tmp_path / f"{name}.safetensors")]
    ran = run("combine", *given, "--map", r"(.+)\.scale=output", "--output", tmp_path / "out")
    assert ran.code == 0, ran
