"""Adapters that do not fit their base, or hold values that are no use.

Who is to blame, and nothing written.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import (
    contents,
    edit_json,
    only_complaint,
    run,
)
from tests.e2e.conftest import Tiny
from tests.support import zoo
from tests.support.bad_input import (
    DOWN_PROJ,
    K_PROJ,
    Case,
    drop_vector,
    rename_keys,
    rewrite,
    set_vector,
)

# PEFT asks transformers for it when it makes the LoRA adapter of these tests
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# ------------------------------------------------------------------------------- adapters that
# fit another model


def test_a_vector_of_the_wrong_length_is_refused(case: Case) -> None:
    kind = zoo.by_name("llama")
    wider = replace(kind, config={**kind.config, "intermediate_size": 64})
    shutil.rmtree(case.adapter)
    zoo.adapt(zoo.build(wider), wider).save_pretrained(case.adapter)
    case.refuses(3, "mlp.down_proj", "64", "48")


def test_an_adapter_of_another_architecture_is_refused(case: Case) -> None:
    kind = zoo.by_name("bert-seq-cls")
    shutil.rmtree(case.adapter)
    zoo.adapt(zoo.build(kind), kind).save_pretrained(case.adapter)
    case.refuses(3, "adapter", "bert.encoder.layer.0", args=("--allow-unused",))


@pytest.mark.parametrize(
    "prefix", ["", "base_model.model.module.", "base_model.model._orig_mod.", "module.base_model.model."]
)
def test_keys_that_peft_would_load_as_ones_are_read_with_a_warning(
    case: Case, tiny: Tiny, prefix: str
) -> None:
    rename_keys(case, "base_model.model.", prefix)
    ran = case.merge()
    assert ran.code == 0, ran
    assert "6 keys of adapter_model.safetensors are not of PEFT's form" in ran.stdout
    for shard in sorted(tiny.merged.glob("*.safetensors")):
        assert shard.read_bytes() == (case.output / shard.name).read_bytes()


def test_keys_of_another_submodel_are_refused(case: Case) -> None:
    rename_keys(case, "base_model.model.model.layers", "base_model.model.model.decoder.layers")
    case.refuses(3, "adapter", "model.decoder.layers.0")


def add_vector(case: Case) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        extra = tensors[f"base_model.model.{K_PROJ}.ia3_l"].clone()
        return tensors | {"base_model.model.model.layers.7.self_attn.k_proj.ia3_l": extra}

    rewrite(case.vectors, change)


def test_a_missing_vector_is_named(case: Case) -> None:
    drop_vector(case)
    case.refuses(3, "adapter", K_PROJ)


def test_allow_missing_leaves_the_module_of_a_missing_vector_as_it_is(case: Case, tiny: Tiny) -> None:
    from tests.support.tensors import read_folder, same

    drop_vector(case)
    assert case.merge("--allow-missing").code == 0
    before, after = read_folder(case.base), read_folder(case.output)
    assert same(after[f"{K_PROJ}.weight"], before[f"{K_PROJ}.weight"])
    assert same(after[f"{DOWN_PROJ}.weight"], read_folder(tiny.merged)[f"{DOWN_PROJ}.weight"])


def test_an_unused_vector_is_named(case: Case) -> None:
    add_vector(case)
    case.refuses(3, "adapter", "model.layers.7.self_attn.k_proj")


def test_allow_unused_drops_an_unused_vector(case: Case, tiny: Tiny) -> None:
    add_vector(case)
    assert case.merge("--allow-unused").code == 0
    for shard in tiny.merged.glob("*.safetensors"):
        assert (case.output / shard.name).read_bytes() == shard.read_bytes()


def test_an_adapter_that_lost_a_vector_on_the_way_is_known_again(case: Case, tmp_path: Path) -> None:
    add_vector(case)
    assert case.merge("--allow-unused").code == 0
    ran = run(
        "merge", "--base", case.output, "--adapter", case.adapter, "--output", tmp_path / "twice",
        "--allow-unused",
    )  # fmt: skip
    only_complaint(ran, 3, "already holds the vectors of adapter")
    ran = run("unmerge", "--model", case.output, "--adapter", case.adapter, "--output", tmp_path / "without")
    assert ran.code == 0, ran
    assert case.merge("--allow-unused", base=tmp_path / "without", output=tmp_path / "again").code == 0


def test_allow_missing_does_not_allow_unused(case: Case) -> None:
    add_vector(case)
    case.refuses(3, "model.layers.7.self_attn.k_proj", args=("--allow-missing",))


def test_allow_unused_does_not_allow_missing(case: Case) -> None:
    drop_vector(case)
    case.refuses(3, K_PROJ, args=("--allow-unused",))


def test_an_extra_tensor_without_a_place_is_named(case: Case) -> None:
    from torch import ones

    rewrite(case.vectors, lambda tensors: tensors | {"base_model.model.model.gizmo.weight": ones(3)})
    case.refuses(3, "model.gizmo.weight")


def test_an_extra_tensor_of_the_wrong_shape_is_named(case: Case) -> None:
    from torch import ones

    rewrite(case.vectors, lambda tensors: tensors | {"base_model.model.model.norm.weight": ones(33)})
    case.refuses(3, "model.norm.weight", "33", "32")


# ---------------------------------------------------------------------------------------- values
# that are no use


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=repr)
def test_a_vector_that_is_not_finite_is_named_with_its_element(case: Case, value: float) -> None:
    set_vector(case, DOWN_PROJ, 5, value)
    case.refuses(3, DOWN_PROJ, str(case.adapter), "element 5")


def fp16_base(case: Case, **weights: float) -> None:
    """Put the model into float16 with transformers, elements of named tensors (``__`` a dot) overwritten."""
    import torch

    model = zoo.build(zoo.by_name("llama"), dtype="float16")
    with torch.no_grad():
        for name, value in weights.items():
            model.state_dict()[name.replace("__", ".")][3, 7] = value
    shutil.rmtree(case.base)
    model.save_pretrained(case.base)


def test_an_overflow_after_the_cast_is_named_with_tensor_element_and_adapter(case: Case) -> None:
    fp16_base(case, model__layers__1__mlp__down_proj__weight=60000.0)
    set_vector(case, DOWN_PROJ, 7, 2.0)
    case.refuses(3, f"{DOWN_PROJ}.weight[3, 7]", "F16", "adapter: ")


def test_an_overflow_leaves_no_parents_of_the_output_either(case: Case) -> None:
    fp16_base(case, model__layers__1__mlp__down_proj__weight=60000.0)
    set_vector(case, DOWN_PROJ, 7, 2.0)
    case.refuses(3, f"{DOWN_PROJ}.weight[3, 7]", output=case.folder / "new" / "folders" / "merged")


@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
def test_an_overflow_in_one_of_several_outputs_leaves_none_of_them(case: Case, existing: bool) -> None:
    fp16_base(case, model__layers__1__mlp__down_proj__weight=60000.0)
    set_vector(case, DOWN_PROJ, 7, 1.0)
    shutil.copytree(case.adapter, case.folder / "harmless")
    set_vector(case, DOWN_PROJ, 7, 2.0)
    if existing:
        (case.folder / "outputs").mkdir()
    before = contents(case.folder)
    ran = run(
        "merge",
        "--base",
        case.base,
        "--adapter",
        case.folder / "harmless",
        "--adapter",
        case.adapter,
        "--output-per-adapter",
        case.folder / "outputs",
    )
    only_complaint(ran, 3, f"{DOWN_PROJ}.weight[3, 7]", "adapter: ")
    assert contents(case.folder) == before


def test_an_untouched_tensor_that_overflows_in_the_new_dtype_is_named(case: Case) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["lm_head.weight"][2, 9] = 1e6
        return tensors

    rewrite(case.shard_of("lm_head.weight"), change)
    case.refuses(3, "lm_head.weight[2, 9]", "F16", args=("--dtype", "float16"))


@pytest.mark.parametrize(
    "pattern", [0x7FC00000, 0x7FFFFFFF, -1], ids=["quiet", "all but the sign", "all ones"]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_nan_in_the_base_does_not_become_a_number_in_the_new_dtype(
    case: Case, dtype: str, pattern: int
) -> None:
    """0xFFFFFFFF is what an erased flash block holds; as a 16-bit integer sum it wraps around to zero."""
    import torch

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["lm_head.weight"].view(torch.int32)[2, 9] = pattern
        return tensors

    shutil.rmtree(case.base)
    zoo.build(zoo.by_name("llama")).save_pretrained(case.base)
    rewrite(case.base / "model.safetensors", change)
    case.refuses(3, "lm_head.weight[2, 9]", args=("--dtype", dtype))


# ----------------------------------------------------------------------------------- adapters of another kind


def lora(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    get_peft_model(zoo.build(zoo.by_name("llama")), config).save_pretrained(folder)


def test_an_adapter_of_another_method_is_refused_by_its_name(case: Case) -> None:
    shutil.rmtree(case.adapter)
    lora(case.adapter)
    case.refuses(3, str(case.adapter), "LORA")


def test_lora_tensors_in_an_ia3_file_are_refused(case: Case) -> None:
    from safetensors.torch import load_file

    lora(case.folder / "lora")
    other = load_file(case.folder / "lora" / "adapter_model.safetensors")
    rewrite(case.vectors, lambda tensors: tensors | other)
    case.refuses(3, case.vectors.name, "lora_")


def test_a_lora_file_with_the_configuration_of_ia3_is_refused(case: Case) -> None:
    lora(case.folder / "lora")
    shutil.copyfile(case.folder / "lora" / "adapter_model.safetensors", case.vectors)
    case.refuses(3, case.vectors.name, "lora_")


@pytest.mark.parametrize("field", ["feedforward_modules", "target_modules"])
def test_what_the_vectors_say_themselves_may_be_missing_from_the_configuration(
    case: Case, tiny: Tiny, field: str
) -> None:
    edit_json(case.adapter / "adapter_config.json", **{field: None})
    ran = case.merge()
    assert ran.code == 0, ran
    assert f"adapter_config.json has no {field}" in ran.stdout
    for shard in sorted(tiny.merged.glob("*.safetensors")):
        assert shard.read_bytes() == (case.output / shard.name).read_bytes()


def test_without_target_modules_a_layer_without_vectors_is_still_missed(case: Case) -> None:
    edit_json(case.adapter / "adapter_config.json", target_modules=None)
    drop_vector(case)
    case.refuses(3, "1 modules that adapter targets have no vector", K_PROJ)


def test_a_configuration_without_a_type_is_refused(case: Case) -> None:
    edit_json(case.adapter / "adapter_config.json", peft_type=None)
    ran = case.merge()
    only_complaint(ran, 3, "no adapter format that is known")
    assert "no peft_type" in ran.stderr


@pytest.mark.parametrize(
    ("feedforward", "module"),
    [([], "mlp.down_proj"), (["down_proj", "k_proj"], "self_attn.k_proj")],
    ids=["none", "two"],
)
def test_a_shape_that_contradicts_the_configuration_is_refused(
    case: Case, feedforward: list[str], module: str
) -> None:
    edit_json(case.adapter / "adapter_config.json", feedforward_modules=feedforward)
    case.refuses(3, case.vectors.name, module, "input", "output")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"peft_type": "IA3"', "[" * 100_000])
def test_an_adapter_configuration_that_is_no_json_object_is_refused(case: Case, text: str) -> None:
    (case.adapter / "adapter_config.json").write_text(text)
    case.refuses(3, "adapter_config.json")


def test_an_adapter_configuration_that_is_no_text_is_refused(case: Case) -> None:
    (case.adapter / "adapter_config.json").write_bytes(b"\xff\xfe{\x00}\x00")
    case.refuses(3, "adapter_config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "(unclosed"),
        ("target_modules", 7),
        ("target_modules", {"k_proj": 1}),
        ("target_modules", ["k_proj", 7]),
        ("feedforward_modules", "*"),
        ("feedforward_modules", [["down_proj"]]),
        ("exclude_modules", 7),
        ("modules_to_save", 7),
        ("modules_to_save", [7]),
    ],
    ids=repr,
)
def test_a_pattern_that_is_none_is_refused(case: Case, key: str, value: Any) -> None:
    edit_json(case.adapter / "adapter_config.json", **{key: value})
    case.refuses(3, "adapter_config.json", key)


@pytest.mark.parametrize(
    ("key", "value"), [("task_type", 7), ("base_model_name_or_path", ["name"])], ids=repr
)
def test_a_configuration_value_of_the_wrong_type_is_no_traceback(case: Case, key: str, value: Any) -> None:
    """PEFT loads such an adapter, so both answers are right: a merge, or a refusal that names the file."""
    edit_json(case.adapter / "adapter_config.json", **{key: value})
    ran = case.merge()
    if ran.code:
        only_complaint(ran, 3, "adapter_config.json", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "wide"),
        ("hidden_size", -1),
        ("num_hidden_layers", [2]),
        ("hidden_act", "no such function"),
        ("dtype", "float99"),
        ("architectures", 7),
        ("model_type", ["llama"]),
    ],
    ids=repr,
)
def test_a_base_configuration_that_transformers_refuses_is_refused(case: Case, key: str, value: Any) -> None:
    """Keys of the bare model, so that the model class is asked, which cannot be built."""
    rename_keys(case, "base_model.model.model.", "base_model.model.")
    edit_json(case.base / "config.json", **{key: value})
    case.refuses(3)


def test_a_folder_of_several_named_adapters_is_refused_with_their_names(case: Case) -> None:
    for name in ("first", "second"):
        shutil.copytree(case.adapter, case.folder / "both" / name)
    shutil.rmtree(case.adapter)
    (case.folder / "both").rename(case.adapter)
    case.refuses(3, "first", "second")


def test_an_adapter_given_as_the_base_is_recognized(case: Case, tiny: Tiny) -> None:
    shutil.copytree(tiny.other, case.folder / "other")
    case.refuses(3, str(case.folder / "other"), "is an adapter", base=case.folder / "other")


def test_a_base_given_as_the_adapter_is_recognized(case: Case, tiny: Tiny) -> None:
    shutil.rmtree(case.adapter)
    shutil.copytree(tiny.single, case.adapter)
    case.refuses(3, str(case.adapter), "no adapter format that is known", "model.embed_tokens.weight")
