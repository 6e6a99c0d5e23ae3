"""``ia3-export unmerge`` from the outside: what it says of every element, held against the true base."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.command import contents, edit_json, merge, only_complaint, run, vary_adapter
from tests.e2e.conftest import CARD, Tiny
from tests.support import zoo
from tests.support.tensors import read_folder, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

PREFIX = "base_model.model."
#: A size of 16-bit floats at which every value of the dtype can be tried.
CODES = np.arange(1 << 16, dtype=np.uint16)


def words(model: Path, adapters: Sequence[Path], output: Path, *more: str | Path) -> list[str | Path]:
    given = [word for adapter in adapters for word in ("--adapter", adapter)]
    return ["unmerge", "--model", model, *given, "--output", output, *more]


def unmerge(model: Path, adapters: Sequence[Path], output: Path, *more: str | Path) -> dict[str, Any]:
    """The JSON document of ``unmerge``, which must succeed."""
    ran = run(*words(model, adapters, output, *more), "--json")
    assert ran.code == 0, ran
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["tensor"]: row for row in document["exactness"]}


def ordinals(tensor: Any) -> np.ndarray:
    """Numbers in the order of the values, neighbours one apart; both zeros are 0."""
    import torch

    wide = tensor.element_size() == 4
    code = tensor.contiguous().view(torch.int32 if wide else torch.int16).numpy().astype(np.int64)
    return np.where(code < 0, -(code & (0x7FFF_FFFF if wide else 0x7FFF)), code)


def torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[name])


def positive(source: Path, folder: Path, low: float = 0.6) -> Path:
    """The adapter with all factors from `low` upwards."""

    def edit(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = np.maximum(np.abs(tensors[name]), np.float32(low))

    return vary_adapter(source, folder, edit)


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    zoo.build(zoo.by_name("llama"), dtype=request.param).save_pretrained(folder)
    return folder


def check_figures(document: dict[str, Any], base: Path, out: Path) -> None:
    """``equal`` and ``distance`` recomputed with torch, and the counts add up."""
    original, found = read_folder(base), read_folder(out)
    assert set(original) == set(found)
    for name, row in rows(document).items():
        apart = np.abs(ordinals(found[name]) - ordinals(original[name]))
        assert row["elements"] == original[name].numel() == apart.size
        assert row["equal"] == int((apart == 0).sum()), name
        assert row["distance"] == int(apart.max()), name
        assert row["certain"] + row["ambiguous"] + row["unfolded"] == row["elements"]
        assert row["certain"] <= row["equal"], name
    for name in set(original) - set(rows(document)):
        assert same(original[name], found[name]), name


def preimages(merged: np.ndarray, factor: np.ndarray, dtype: Any) -> np.ndarray:
    """How many finite values of a 16-bit `dtype` times `factor` round to each element of `merged` (bits)."""
    import torch

    every = torch.from_numpy(CODES.view(np.int16).copy()).view(dtype)
    every = every[torch.isfinite(every)].float()
    counts = np.empty(len(merged), np.int64)
    for i, (bits, by) in enumerate(zip(merged, factor, strict=True)):
        folded = (every * torch.tensor(by, dtype=torch.float32)).to(dtype).view(torch.int16).numpy()
        counts[i] = int((folded == bits).sum())
    return counts


# ------------------------------------------------------------------------------------------------- the
# figures are true


def test_what_is_said_with_the_base_is_true(base: Path, tiny: Tiny, tmp_path: Path) -> None:
    import torch

    merge(base, tiny.adapter, tmp_path / "merged")
    document = unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "out", "--base", base)
    check_figures(document, base, tmp_path / "out")
    assert len(document["exactness"]) == 6
    original, merged, found = (
        read_folder(folder) for folder in (base, tmp_path / "merged", tmp_path / "out")
    )
    for name in rows(document):
        smallest = torch.finfo(merged[name].dtype).smallest_normal
        normal = (merged[name].abs() >= smallest).numpy()  # subnormal products have lost more bits
        assert np.abs(ordinals(found[name]) - ordinals(original[name]))[normal].max() <= 1, name
    assert 0.5 < sum(row["certain"] for row in document["exactness"]) / 5120 < 1
    assert sum(row["equal"] for row in document["exactness"]) > 0.8 * 5120


def test_without_the_base_the_same_is_written_and_nothing_claimed(
    base: Path, tiny: Tiny, tmp_path: Path
) -> None:
    merge(base, tiny.adapter, tmp_path / "merged")
    known = unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "with", "--base", base)
    blind = unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "without")
    for name, row in rows(blind).items():
        assert row == rows(known)[name] | {"equal": None, "distance": None}
    one, other = (folder / "model.safetensors" for folder in (tmp_path / "with", tmp_path / "without"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_certain_elements_are_those_that_nothing_else_folds_to(
    tiny: Tiny, tmp_path: Path, dtype: str
) -> None:
    """Every value of the dtype is tried; and no certain element may differ from the base."""
    import torch

    zoo.build(zoo.by_name("llama"), dtype=dtype).save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", tiny.adapter, tmp_path / "merged")
    document = unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "out", "--base", tmp_path / "base")
    original, merged, found = (read_folder(tmp_path / name) for name in ("base", "merged", "out"))
    name = "model.layers.0.self_attn.k_proj.weight"
    factor = load_file(tiny.adapter / "adapter_model.safetensors")[f"{PREFIX}{name[:-7]}.ia3_l"]
    factors = np.broadcast_to(factor, merged[name].shape).reshape(-1)
    bits = merged[name].view(torch.int16).numpy().reshape(-1)
    count = preimages(bits, factors, getattr(torch, dtype))
    assert count.min() >= 1
    alone = count == 1
    assert rows(document)[name]["certain"] == int(alone.sum())
    apart = (ordinals(found[name]) - ordinals(original[name])).reshape(-1)
    assert not apart[alone].any()


def test_a_float32_model_is_one_unit_of_the_last_place_away_at_most(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    document = unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "out", "--base", tiny.single)
    assert max(row["distance"] for row in document["exactness"]) == 1
    merged, found = read_folder(tmp_path / "merged"), read_folder(tmp_path / "out")
    for name, vector in load_file(tiny.adapter / "adapter_model.safetensors").items():
        weight = name.removeprefix(PREFIX).removesuffix("ia3_l") + "weight"
        wanted = torch.from_numpy((merged[weight].numpy() / vector.astype(np.float64)).astype(np.float32))
        apart = np.abs(ordinals(found[weight]) - ordinals(wanted))
        assert apart.max() <= 1, "a neighbour may fold back where the rounded quotient does not"


@pytest.mark.parametrize("stored", ["base", "single"])
def test_powers_of_two_divide_out_without_a_trace(tiny: Tiny, tmp_path: Path, stored: str) -> None:
    """Also negative ones, whose zeros keep their signs."""
    base = getattr(tiny, stored)

    def edit(tensors: dict[str, Any]) -> None:
        generator = np.random.default_rng(0)
        for name, value in tensors.items():
            tensors[name] = generator.choice(np.array([-4, -0.5, 0.25, 1, 2], "f4"), value.shape)

    adapter = vary_adapter(tiny.adapter, tmp_path / "adapter", edit)
    merge(base, adapter, tmp_path / "merged")
    document = unmerge(tmp_path / "merged", [adapter], tmp_path / "out", "--base", base)
    for row in document["exactness"]:
        assert row["equal"] == row["certain"] == row["elements"] and row["distance"] == 0
    assert not document["warnings"]
    for file in base.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("adapters", [("adapter",), ("adapter", "other")], ids=["one", "two"])
def test_the_right_adapters_raise_no_doubt(tiny: Tiny, tmp_path: Path, adapters: tuple[str, ...]) -> None:
    given = [getattr(tiny, name) for name in adapters]
    merge(tiny.base, given[0], tmp_path / "merged", *[word for a in given[1:] for word in ("--adapter", a)])
    document = unmerge(tmp_path / "merged", given, tmp_path / "out")
    assert sum(row["unfolded"] for row in document["exactness"]) == 0
    assert not document["warnings"]


def test_what_is_certain_after_two_adapters_is_the_base(tiny: Tiny, tmp_path: Path) -> None:
    """Two roundings may put the quotient two values away from one of several originals."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    module = "model.layers.0.self_attn.k_proj"
    zoo.build(zoo.by_name("llama"), dtype="bfloat16").save_pretrained(tmp_path / "base")
    tensors = load_torch(tmp_path / "base" / "model.safetensors")
    tensors[f"{module}.weight"].view(torch.int16)[:] = 0x3F63
    save_torch(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapters = []
    for source, factor in ((tiny.adapter, 0.30646494030952454), (tiny.other, 1.8484396934509277)):

        def edit(values: dict[str, Any], factor: float = factor) -> None:
            values[f"{PREFIX}{module}.ia3_l"][:] = factor

        adapters.append(vary_adapter(source, tmp_path / source.name, edit))
    merge(tmp_path / "base", adapters[0], tmp_path / "merged", "--adapter", adapters[1])
    document = unmerge(tmp_path / "merged", adapters, tmp_path / "out", "--base", tmp_path / "base")
    row = rows(document)[f"{module}.weight"]
    assert row["certain"] <= row["equal"]


def test_a_merge_into_a_narrower_dtype_raises_no_doubt(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.single, tiny.adapter, tmp_path / "merged", "--dtype", "bfloat16")
    document = unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "out")
    assert not any("were not folded into it" in warning for warning in document["warnings"])


@pytest.mark.xfail(strict=True, reason="a quotient beyond float16's largest number is refused as infinite")
def test_the_largest_weights_come_back(tmp_path: Path, tiny: Tiny) -> None:
    name = "model.layers.0.self_attn.k_proj"
    zoo.build(zoo.by_name("llama"), dtype="float16").save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[f"{name}.weight"][:] = 65504
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})

    def edit(values: dict[str, Any]) -> None:
        values[f"{PREFIX}{name}.ia3_l"][:] = np.linspace(0.011, 0.9, 16, dtype=np.float32)[:, None]

    adapter = vary_adapter(tiny.adapter, tmp_path / "adapter", edit)
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert run(*words(tmp_path / "merged", [adapter], tmp_path / "out")).code == 0


def test_a_zero_under_an_ordinary_factor_is_certain(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    shutil.copytree(tiny.single, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[name][:] = 0
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapter = positive(tiny.adapter, tmp_path / "adapter")
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    row = rows(unmerge(tmp_path / "merged", [adapter], tmp_path / "out"))[name]
    assert row["certain"] == row["elements"]


@pytest.mark.parametrize("tiny_values", [1e-41, 3e-7], ids=["float32", "float16"])
def test_what_was_flushed_to_zero_is_ambiguous_not_certain(
    tiny: Tiny, tmp_path: Path, tiny_values: float
) -> None:
    """Subnormal products: many weights give the same one, or zero."""
    half = tiny_values > 1e-30
    name = "model.layers.0.self_attn.k_proj.weight"
    zoo.build(zoo.by_name("llama"), dtype="float16" if half else "float32").save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    generator = np.random.default_rng(0)
    tensors[name] = (generator.normal(size=tensors[name].shape) * tiny_values).astype(tensors[name].dtype)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})

    def edit(values: dict[str, Any]) -> None:
        vector = next(value for key, value in values.items() if name[:-7] in key).reshape(-1)
        vector[:] = 1
        vector[::2] = 1e-6

    adapter = vary_adapter(tiny.adapter, tmp_path / "adapter", edit)
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    document = unmerge(tmp_path / "merged", [adapter], tmp_path / "out", "--base", tmp_path / "base")
    check_figures(document, tmp_path / "base", tmp_path / "out")
    row, out = rows(document)[name], read_folder(tmp_path / "out")[name].numpy()
    assert (out[::2] == 0).all() and row["unfolded"] == 0
    assert row["ambiguous"] >= row["elements"] // 2
    assert (out[1::2] == tensors[name][1::2]).all()


# --------------------------------------------------------------------------------------------------
# several adapters


@pytest.mark.parametrize("order", [1, -1])
def test_two_adapters_are_divided_out_last_first(base: Path, tiny: Tiny, tmp_path: Path, order: int) -> None:
    adapters = [tiny.adapter, tiny.other][::order]
    merge(base, adapters[0], tmp_path / "merged", "--adapter", adapters[1])
    document = unmerge(tmp_path / "merged", adapters, tmp_path / "out", "--base", base)
    check_figures(document, base, tmp_path / "out")
    assert len(document["exactness"]) == 8 and document["adapters"] == [path.name for path in adapters]
    assert max(row["distance"] for row in document["exactness"]) <= 4
    assert not any("manifest says" in warning for warning in document["warnings"])
    turned = unmerge(tmp_path / "merged", adapters[::-1], tmp_path / "turned")
    assert any("manifest says" in warning for warning in turned["warnings"])


@pytest.mark.parametrize(("how", "weights"), [("delta", "0.5,0.75"), ("linear", "0.5,0.5")])
def test_a_combination_is_taken_from_the_manifest(tiny: Tiny, tmp_path: Path, how: str, weights: str) -> None:
    options = ["--combine", how, "--weights", weights]
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--adapter", tiny.other, *options)
    both = [tiny.adapter, tiny.other]
    read = unmerge(tmp_path / "merged", both, tmp_path / "read", "--base", tiny.base)
    check_figures(read, tiny.base, tmp_path / "read")
    assert max(row["distance"] for row in read["exactness"]) <= 1
    assert any(f"manifest: combine {how}" in warning for warning in read["warnings"])
    assert read["options"]["combine"] == how
    given = unmerge(tmp_path / "merged", both, tmp_path / "given", *options)
    assert not any("taken from" in warning for warning in given["warnings"])
    for name in read_folder(tmp_path / "read"):
        assert same(read_folder(tmp_path / "read")[name], read_folder(tmp_path / "given")[name])
    wrong = unmerge(tmp_path / "merged", both, tmp_path / "wrong", "--combine", "product")
    assert any("do not fold back" in warning for warning in wrong["warnings"])


def test_the_recorded_cast_is_undone_too(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--cast", "peft-low-mem")
    document = unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "out", "--base", tiny.base)
    check_figures(document, tiny.base, tmp_path / "out")
    assert document["options"]["cast"] == "peft-low-mem"
    assert max(row["distance"] for row in document["exactness"]) <= 1


# --------------------------------------------------------------------------------------------------------
# wrong inputs


def test_a_wrong_adapter_is_noticed(tiny: Tiny, tmp_path: Path) -> None:
    document = unmerge(merged_copy(tiny, tmp_path), [tiny.other], tmp_path / "out", "--base", tiny.base)
    assert any("manifest says that adapter were folded" in warning for warning in document["warnings"])
    assert max(row["distance"] for row in document["exactness"]) > 4


def merged_copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.merged, tmp_path / "merged"))


@pytest.mark.parametrize("odd", [[1, 2], [{}], "card", {"1": None}], ids=str)
def test_what_else_the_manifest_holds_may_be_of_any_type(tiny: Tiny, tmp_path: Path, odd: Any) -> None:
    model = merged_copy(tiny, tmp_path)
    manifest = json.loads((model / "ia3_export.json").read_text())
    manifest["taken_from_adapters"] = odd
    (model / "ia3_export.json").write_text(json.dumps(manifest))
    assert unmerge(model, [tiny.adapter], tmp_path / "out")["options"]["combine"] == "product"


def test_other_values_of_the_adapter_do_not_fold_back(tiny: Tiny, tmp_path: Path) -> None:
    """A factor between powers of two reaches some of the codes only: a model made without it stands out."""
    document = unmerge(tiny.base, [tiny.adapter], tmp_path / "out")
    text = " ".join(document["warnings"])
    assert "no manifest" in text and "do not fold back" in text
    assert sum(row["unfolded"] for row in document["exactness"]) > 100


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_is_refused_by_module_and_element(tiny: Tiny, tmp_path: Path, zero: float) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}model.layers.1.mlp.down_proj.ia3_l"].reshape(-1)[[7, 11]] = zero

    adapter = vary_adapter(tiny.adapter, tmp_path / "adapter", edit)
    merge(tiny.base, adapter, tmp_path / "merged")
    before = contents(tmp_path)
    ran = run(*words(tmp_path / "merged", [adapter], tmp_path / "out"))
    only_complaint(ran, 3, "model.layers.1.mlp.down_proj", "element 7", "2 such elements")
    assert contents(tmp_path) == before


def test_a_combined_zero_is_refused_as_well(tiny: Tiny, tmp_path: Path) -> None:
    """A module that one adapter lacks, under a weight of zero: PEFT's sum is zero there."""
    ran = run(
        *words(tiny.base, [tiny.adapter, tiny.other], tmp_path / "out"),
        "--combine",
        "linear",
        "--weights",
        "1,0",
    )
    only_complaint(ran, 3, "q_proj", "zero")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from tests.support.quantized import FIXTURES, write_adapter

    model = FIXTURES / "bnb-int8"
    adapter = write_adapter(tmp_path / "adapter", json.loads((model / "config.json").read_text()))
    only_complaint(run(*words(model, [adapter], tmp_path / "out")), 3, "quantized")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    ran = run(*words(tiny.merged, [tiny.adapter], tmp_path / "out", "--base", tiny.single))
    only_complaint(ran, 3, "is F32", "BF16")
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_never_replaced(tiny: Tiny, tmp_path: Path) -> None:
    merged = merged_copy(tiny, tmp_path)
    before = contents(tmp_path)
    only_complaint(run(*words(merged, [tiny.adapter], merged, "--overwrite")), 3, "input")
    only_complaint(run(*words(tiny.merged, [tiny.adapter], merged)), 4, "already exists")
    assert contents(tmp_path) == before


def test_the_base_is_never_replaced(tiny: Tiny, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    before = contents(base)
    run(*words(tiny.merged, [tiny.adapter], base, "--base", base, "--overwrite"))
    assert contents(base) == before


def test_wrong_numbers_of_weights_are_wrong_usage(tiny: Tiny, tmp_path: Path) -> None:
    ran = run(*words(tiny.merged, [tiny.adapter], tmp_path / "out", "--combine", "delta"))
    only_complaint(ran, 2, "one weight per adapter")


# ----------------------------------------------------------------------------------------------------- what
# is written


def test_everything_that_no_vector_touches_is_the_bases_own(tiny: Tiny, tmp_path: Path) -> None:
    """Shards, index, tokenizer, and the card under its own name."""
    unmerge(tiny.merged, [tiny.adapter], tmp_path / "out")
    names = {path.name for path in tiny.base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"ia3_export.json"}
    assert (tmp_path / "out" / "README.md").read_text() == CARD
    for name in sorted(names):
        if not name.startswith("model-0000") or name in {
            "model-00001-of-00006.safetensors",
            "model-00006-of-00006.safetensors",
        }:
            assert (tmp_path / "out" / name).read_bytes() == (tiny.base / name).read_bytes(), name


def test_a_base_without_a_card_gets_none(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "out")
    names = {path.name for path in tiny.single.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"ia3_export.json"}


def test_the_result_loads_in_transformers_and_computes_as_the_base(tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    unmerge(tmp_path / "merged", [tiny.adapter], tmp_path / "out")
    models = []
    for folder in (tiny.single, tmp_path / "merged", tmp_path / "out"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        models.append(model.eval())
    with torch.no_grad():
        base, merged, again = (model(input_ids=torch.arange(5, 29).view(2, 12)).logits for model in models)
    torch.testing.assert_close(again, base, rtol=1e-5, atol=1e-5)
    assert (merged - base).abs().max() > 0.05
    unmerge(tiny.merged, [tiny.adapter], tmp_path / "sharded")
    assert AutoTokenizer.from_pretrained(tmp_path / "sharded").convert_tokens_to_ids("tiny") == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def test_the_document_lies_in_the_folder_and_the_same_input_gives_the_same_bytes(
    tiny: Tiny, tmp_path: Path
) -> None:
    document = unmerge(tiny.merged, [tiny.adapter], tmp_path / "one" / "out")
    unmerge(tiny.merged, [tiny.adapter], tmp_path / "two" / "out")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert document == json.loads((tmp_path / "one" / "out" / "ia3_export.json").read_text())
    assert document["schema"] == "ia3-export/unmerge/1"
    for name in ("config.json", "model-00001-of-00006.safetensors"):
        digest = hashlib.sha256((tmp_path / "one" / "out" / name).read_bytes()).hexdigest()
        assert digest in json.dumps(document["files"]), name
    assert str(tmp_path) not in json.dumps(document)


def test_people_read_the_same_figures(tiny: Tiny, tmp_path: Path) -> None:
    document = unmerge(tiny.merged, [tiny.adapter], tmp_path / "one", "--base", tiny.base)
    ran = run(*words(tiny.merged, [tiny.adapter], tmp_path / "two", "--base", tiny.base))
    certain = sum(row["certain"] for row in document["exactness"]) / 5120
    equal = sum(row["equal"] for row in document["exactness"]) / 5120
    assert f"6 tensors divided; {certain:.2%} of 5,120 elements are certainly" in ran.stdout
    assert f"compared with the base: {equal:.2%} have its bits" in ran.stdout
    assert run(*words(tiny.merged, [tiny.adapter], tmp_path / "three", "--quiet")).stdout == ""


def test_a_head_stays_and_is_named(tmp_path: Path) -> None:
    kind = zoo.by_name("bert-seq-cls")
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    document = unmerge(
        tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "out", "--base", tmp_path / "base"
    )
    assert any("classifier.bias, classifier.weight: they stay" in warning for warning in document["warnings"])
    base, merged, out = (read_folder(tmp_path / name) for name in ("base", "merged", "out"))
    heads = {name for name in base if name.startswith("classifier.")}
    assert heads and not heads & set(rows(document))
    for name in heads:
        assert same(out[name], merged[name]) and not same(out[name], base[name])
    biases = {name for name in rows(document) if name.endswith(".bias")}
    assert len(biases) == 4, "keys and values of two layers; a vector on an input leaves the bias alone"
    for name in set(base) - heads:
        assert np.abs(ordinals(out[name]) - ordinals(base[name])).max() <= (name in rows(document)), name


def test_the_transposed_weights_of_conv1d_are_divided_along_the_right_axis(tmp_path: Path) -> None:
    kind = zoo.by_name("gpt2")
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    document = unmerge(
        tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "out", "--base", tmp_path / "base"
    )
    check_figures(document, tmp_path / "base", tmp_path / "out")
    assert {name.partition("h.0.")[2] for name in rows(document)} >= {
        "attn.c_attn.weight",
        "attn.c_attn.bias",
    }
    assert max(row["distance"] for row in document["exactness"]) <= 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT dislikes tied targets
def test_a_head_that_the_merge_untied_can_be_held_against_its_base(tmp_path: Path) -> None:
    from dataclasses import replace

    kind = zoo.by_name("llama")
    config = {**kind.config, "tie_word_embeddings": True}
    kind = replace(kind, config=config, targets=("lm_head", "k_proj"), feedforward=())
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert "lm_head.weight" in read_folder(tmp_path / "merged")
    adapters = [tmp_path / "adapter"]
    assert run(*words(tmp_path / "merged", adapters, tmp_path / "blind")).code == 0
    ran = run(*words(tmp_path / "merged", adapters, tmp_path / "out", "--base", tmp_path / "base"))
    assert ran.code == 0, ran


def test_fused_experts_are_divided_out_of_the_file(tmp_path: Path) -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "mixtral_v4"
    base, adapter = fixture / "base", fixture / "adapter"
    merge(base, adapter, tmp_path / "merged")
    document = unmerge(tmp_path / "merged", [adapter], tmp_path / "out", "--base", base)
    check_figures(document, base, tmp_path / "out")
    assert any("experts" in name for name in rows(document))
    assert max(row["distance"] for row in document["exactness"]) <= 1


def test_a_lone_file_without_manifest_is_unmerged_too(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    lone = tmp_path / "lone" / "model.safetensors"
    lone.parent.mkdir()
    shutil.copyfile(tmp_path / "merged" / "model.safetensors", lone)
    document = unmerge(lone, [tiny.adapter], tmp_path / "out", "--base", tiny.single)
    assert any("no manifest" in warning for warning in document["warnings"])
    assert max(row["distance"] for row in document["exactness"]) <= 1


def test_a_damaged_manifest_counts_as_none(tiny: Tiny, tmp_path: Path) -> None:
    merged = merged_copy(tiny, tmp_path)
    edit_json(merged / "ia3_export.json", adapters=None)
    document = unmerge(merged, [tiny.adapter], tmp_path / "out")
    assert any("no manifest" in warning for warning in document["warnings"])
