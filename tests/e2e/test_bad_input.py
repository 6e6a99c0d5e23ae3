"""Damaged, foreign and contradictory inputs: the exit code, who is to blame, what to do, and nothing written.

Every case starts from what transformers and PEFT wrote, in a folder of its own, and damages it.
`Case.refuses` compares the whole folder before and after: the inputs, the place of the output, and anything
left beside it.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ia3_export.checkpoint import ranges
from tests.e2e.command import (
    Ran,
    contents,
    edit_json,
    join_safetensors,
    only_complaint,
    run,
    run_process,
    split_safetensors,
)
from tests.e2e.conftest import Tiny
from tests.support import zoo

# PEFT asks transformers for it when it makes the LoRA adapter of these tests
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

K_PROJ = "model.layers.0.self_attn.k_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Case:
    """Copies of a base and an adapter in a folder of their own."""

    folder: Path
    run: Callable[..., Ran] = run

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def output(self) -> Path:
        return self.folder / "merged"

    @property
    def vectors(self) -> Path:
        """The adapter's weight file."""
        return self.adapter / "adapter_model.safetensors"

    def shard_of(self, tensor: str) -> Path:
        """The shard that the index names for `tensor`."""
        index = json.loads((self.base / "model.safetensors.index.json").read_text())
        return self.base / str(index["weight_map"][tensor])

    def merge(self, *more: str | Path, base: Path | None = None, output: Path | None = None) -> Ran:
        return self.run(
            "merge",
            "--base",
            base or self.base,
            "--adapter",
            self.adapter,
            "--output",
            output or self.output,
            *more,
        )

    def refuses(self, code: int, *mentions: str, args: tuple[str | Path, ...] = (), **paths: Path) -> None:
        """Assert that a merge fails as it should and leaves everything as it was."""
        before = contents(self.folder)
        only_complaint(self.merge(*args, **paths), code, *mentions)
        assert contents(self.folder) == before


@pytest.fixture
def case(tiny: Tiny, tmp_path: Path) -> Case:
    shutil.copytree(tiny.base, tmp_path / "base")
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    return Case(tmp_path)


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Load a safetensors file, change its table of tensors, and save it again, with the library."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def rename_keys(case: Case, old: str, new: str) -> None:
    rewrite(
        case.vectors, lambda tensors: {name.replace(old, new, 1): value for name, value in tensors.items()}
    )


def set_vector(case: Case, module: str, element: int, value: float) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors[f"base_model.model.{module}.ia3_l"].view(-1)[element] = value
        return tensors

    rewrite(case.vectors, change)


# ---------------------------------------------------------------------------------------- files
# that are missing


def test_a_base_that_does_not_exist_is_named(case: Case) -> None:
    shutil.rmtree(case.base)
    case.refuses(3, str(case.base))


def test_an_adapter_that_does_not_exist_is_named(case: Case) -> None:
    shutil.rmtree(case.adapter)
    case.refuses(3, str(case.adapter))


def test_a_missing_shard_is_named(case: Case) -> None:
    case.shard_of("lm_head.weight").unlink()
    case.refuses(3, "model-00006-of-00006.safetensors")


def test_a_folder_without_weights_is_no_base(case: Case) -> None:
    for file in case.base.glob("model*"):
        file.unlink()
    case.refuses(3, str(case.base), "no model weights")


def test_an_adapter_folder_without_its_weights_is_named(case: Case) -> None:
    case.vectors.unlink()
    case.refuses(3, "adapter_model.safetensors")


def test_an_adapter_folder_without_its_configuration_is_named(case: Case) -> None:
    (case.adapter / "adapter_config.json").unlink()
    case.refuses(3, str(case.adapter), "no adapter format that is known", "ia3_l")


# ------------------------------------------------------------------------------------ damaged
# safetensors files


def test_a_truncated_shard_is_refused(case: Case) -> None:
    shard = case.shard_of(f"{K_PROJ}.weight")
    os.truncate(shard, shard.stat().st_size - 100)
    case.refuses(3, shard.name, "short")


def test_a_shard_that_ends_in_its_header_is_refused(case: Case) -> None:
    shard = case.shard_of(f"{K_PROJ}.weight")
    os.truncate(shard, 50)
    case.refuses(3, shard.name)


def test_an_empty_shard_is_refused(case: Case) -> None:
    shard = case.shard_of("lm_head.weight")
    os.truncate(shard, 0)
    case.refuses(3, shard.name)


def test_a_truncated_adapter_is_refused(case: Case) -> None:
    os.truncate(case.vectors, case.vectors.stat().st_size - 4)
    case.refuses(3, case.vectors.name)


def test_overlapping_offsets_are_refused(case: Case) -> None:
    shard = case.shard_of(f"{K_PROJ}.weight")
    header, data = split_safetensors(shard)
    header[f"{K_PROJ}.weight"]["data_offsets"] = [
        offset - 2 for offset in header[f"{K_PROJ}.weight"]["data_offsets"]
    ]
    join_safetensors(shard, header, data)
    case.refuses(3, shard.name, "overlap")


def test_a_hole_between_tensors_is_refused(case: Case) -> None:
    shard = case.shard_of("lm_head.weight")
    header, data = split_safetensors(shard)
    header["lm_head.weight"]["data_offsets"] = [
        offset + 8 for offset in header["lm_head.weight"]["data_offsets"]
    ]
    join_safetensors(shard, header, bytes(8) + data)
    case.refuses(3, shard.name, "lm_head.weight", "hole")


def test_bytes_after_the_last_tensor_are_refused(case: Case) -> None:
    shard = case.shard_of("lm_head.weight")
    shard.write_bytes(shard.read_bytes() + bytes(8))
    case.refuses(3, shard.name)


def test_a_name_that_occurs_twice_in_a_header_is_refused(case: Case) -> None:
    shard = case.shard_of("lm_head.weight")
    header, data = split_safetensors(shard)
    entry = json.dumps(header["lm_head.weight"])
    join_safetensors(shard, f'{{"lm_head.weight":{entry},"lm_head.weight":{entry}}}', data)
    case.refuses(3, shard.name, "twice")


@pytest.mark.parametrize("length", [2**60, 2**63 + 1, 10**7], ids=["2**60", "2**63+1", "10**7"])
def test_a_header_longer_than_the_file_is_refused(case: Case, length: int) -> None:
    shard = case.shard_of("lm_head.weight")
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    case.refuses(3, shard.name)


def test_an_unknown_dtype_is_refused(case: Case) -> None:
    shard = case.shard_of("lm_head.weight")
    header, data = split_safetensors(shard)
    header["lm_head.weight"]["dtype"] = "F99"
    join_safetensors(shard, header, data)
    case.refuses(3, shard.name, "lm_head.weight", "F99")


def test_a_shape_that_does_not_fill_its_offsets_is_refused(case: Case) -> None:
    shard = case.shard_of("lm_head.weight")
    header, data = split_safetensors(shard)
    header["lm_head.weight"]["shape"] = [128, 33]
    join_safetensors(shard, header, data)
    case.refuses(3, shard.name, "lm_head.weight")


def test_a_web_page_saved_as_a_shard_is_refused(case: Case) -> None:
    shard = case.shard_of("lm_head.weight")
    shard.write_text("<!doctype html><title>Access to this model is restricted</title>" * 10)
    case.refuses(3, shard.name)


def test_a_git_lfs_pointer_in_place_of_a_shard_is_refused(case: Case) -> None:
    shard = case.shard_of("lm_head.weight")
    shard.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 8312\n")
    case.refuses(3, shard.name)


# ---------------------------------------------------------------------------------------------
# damaged indexes


def edit_weight_map(case: Case, **changes: Any) -> None:
    file = case.base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= {name.replace("__", "."): value for name, value in changes.items()}
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["relative", "absolute", "through a sub-folder"])
def test_an_index_cannot_lead_out_of_its_folder(case: Case, kind: str) -> None:
    outside = case.folder / "outside.safetensors"
    shutil.move(case.shard_of("lm_head.weight"), outside)
    name = {
        "relative": "../outside.safetensors",
        "absolute": str(outside),
        "through a sub-folder": "a/../../outside.safetensors",
    }
    edit_weight_map(case, lm_head__weight=name[kind])
    case.refuses(3, "model.safetensors.index.json", name[kind])


def test_an_index_that_names_a_tensor_which_its_shard_lacks_is_refused(case: Case) -> None:
    edit_weight_map(case, model__extra__weight="model-00001-of-00006.safetensors")
    case.refuses(3, "model.extra.weight", "model-00001-of-00006.safetensors")


@pytest.mark.parametrize("value", [None, 7, ["model-00001-of-00006.safetensors"], {}, ""], ids=repr)
def test_an_index_whose_shard_is_no_name_is_refused(case: Case, value: Any) -> None:
    edit_weight_map(case, lm_head__weight=value)
    case.refuses(3, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\ufffe", "[" * 100_000]
)
def test_an_index_that_is_no_index_is_refused(case: Case, text: str) -> None:
    (case.base / "model.safetensors.index.json").write_text(text)
    case.refuses(3, "model.safetensors.index.json")


def test_two_shards_with_the_same_tensor_are_refused(case: Case) -> None:
    from safetensors.torch import load_file

    twin = load_file(case.shard_of("lm_head.weight"))
    rewrite(case.shard_of("model.embed_tokens.weight"), lambda tensors: tensors | twin)
    case.refuses(3, "lm_head.weight", "model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": '])
def test_a_base_configuration_that_is_no_json_object_is_refused(case: Case, text: str) -> None:
    (case.base / "config.json").write_text(text)
    case.refuses(3, "config.json")


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


def drop_vector(case: Case) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        del tensors[f"base_model.model.{K_PROJ}.ia3_l"]
        return tensors

    rewrite(case.vectors, change)


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


# ------------------------------------------------------------------------------------ bases that
# are not folded


def test_a_quantization_configuration_over_dense_weights_is_refused(case: Case) -> None:
    edit_json(case.base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    case.refuses(3, str(case.base), "quantized", "gptq")


def test_a_quantization_configuration_of_a_part_of_the_model_is_seen(case: Case) -> None:
    edit_json(case.base / "config.json", text_config={"quantization_config": {"quant_method": "awq"}})
    case.refuses(3, str(case.base), "quantized", "awq")


def test_an_int8_weight_under_a_vector_is_refused(case: Case) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors | {f"{K_PROJ}.weight": torch.ones(16, 32, dtype=torch.int8)}

    rewrite(case.shard_of(f"{K_PROJ}.weight"), change)
    case.refuses(3, K_PROJ, "I8", "quantized")


def test_packed_weights_are_refused_even_without_a_configuration(case: Case) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors | {"model.layers.0.self_attn.q_proj.qweight": torch.ones(4, 32, dtype=torch.int32)}

    rewrite(case.shard_of(f"{K_PROJ}.weight"), change)
    case.refuses(3, "q_proj.qweight", "without", "q_proj.qzeros")


def test_a_gguf_file_is_no_base(case: Case) -> None:
    file = case.folder / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    case.refuses(3, file.name, base=file)


def test_a_folder_of_gguf_files_is_no_base(case: Case) -> None:
    for file in case.base.iterdir():
        file.unlink()
    (case.base / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    case.refuses(3, "model-Q4_K_M.gguf", "damaged")


# --------------------------------------------------------------------------------------- pickles
# that run code


class Malicious:
    """Runs a command when it is unpickled by a reader that lets it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def write_malicious(kind: str, file: Path, marker: Path) -> None:
    import torch

    if kind == "plain pickle":
        file.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    else:
        state = {f"{K_PROJ}.weight": torch.ones(16, 32), "x": Malicious(marker)}
        torch.save(state, file, _use_new_zipfile_serialization=kind == "torch zip")


PICKLES = ("plain pickle", "torch zip", "torch legacy")


@pytest.mark.parametrize("kind", PICKLES)
def test_code_in_a_pickled_base_is_refused_and_not_run(case: Case, kind: str) -> None:
    for file in case.base.glob("model*"):
        file.unlink()
    write_malicious(kind, case.base / "pytorch_model.bin", case.folder / "was-run")
    case.refuses(3, "pytorch_model.bin", "not executed")


@pytest.mark.parametrize("kind", PICKLES)
def test_code_in_a_pickled_adapter_is_refused_and_not_run(case: Case, kind: str) -> None:
    case.vectors.unlink()
    write_malicious(kind, case.adapter / "adapter_model.bin", case.folder / "was-run")
    case.refuses(3, "adapter_model.bin", "not executed")


@pytest.mark.parametrize("kind", PICKLES)
def test_the_malicious_pickles_would_run(kind: str, tmp_path: Path) -> None:
    """The two tests above would pass with harmless files; this one shows that theirs are not."""
    import torch

    write_malicious(kind, tmp_path / "file.bin", tmp_path / "was-run")
    if kind == "plain pickle":
        pickle.loads((tmp_path / "file.bin").read_bytes())
    else:
        torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02", b"PK\x03\x04" + bytes(60), b"no pickle at all"], ids=repr
)
def test_a_bin_file_that_is_none_is_refused(case: Case, content: bytes) -> None:
    for file in case.base.glob("model*"):
        file.unlink()
    (case.base / "pytorch_model.bin").write_bytes(content)
    case.refuses(3, "pytorch_model.bin")


def test_a_truncated_bin_file_is_refused(case: Case) -> None:
    import torch

    for file in case.base.glob("model*"):
        file.unlink()
    file = case.base / "pytorch_model.bin"
    torch.save(zoo.build(zoo.by_name("llama")).state_dict(), file)
    os.truncate(file, file.stat().st_size // 2)
    case.refuses(3, "pytorch_model.bin")


def test_a_bin_file_that_holds_no_table_is_refused(case: Case) -> None:
    import torch

    for file in case.base.glob("model*"):
        file.unlink()
    torch.save([torch.ones(3)], case.base / "pytorch_model.bin")
    case.refuses(3, "pytorch_model.bin", "list")


def test_a_bin_file_with_more_than_tensors_is_refused(case: Case) -> None:
    import torch

    for file in case.base.glob("model*"):
        file.unlink()
    torch.save({f"{K_PROJ}.weight": torch.ones(16, 32), "epoch": 3}, case.base / "pytorch_model.bin")
    case.refuses(3, "pytorch_model.bin", "epoch")


# ------------------------------------------------------------------------------- outputs that
# cannot be written


def test_an_output_inside_the_base_is_refused(case: Case) -> None:
    case.refuses(3, str(case.base), output=case.base / "merged")


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_an_output_that_is_the_base_is_refused(case: Case, more: tuple[str, ...]) -> None:
    case.refuses(3, str(case.base), output=case.base, args=more)


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_an_output_that_is_the_adapter_is_refused(case: Case, more: tuple[str, ...]) -> None:
    case.refuses(3, str(case.adapter), output=case.adapter, args=more)


def test_an_output_that_holds_the_inputs_is_refused_even_with_overwrite(case: Case) -> None:
    case.refuses(3, str(case.folder), output=case.folder, args=("--overwrite",))


def test_an_output_that_leads_into_the_base_by_a_link_is_refused(case: Case) -> None:
    (case.folder / "alias").symlink_to(case.base)
    case.refuses(3, "alias", output=case.folder / "alias" / "merged")


def test_an_output_that_exists_is_refused(case: Case) -> None:
    case.output.mkdir()
    (case.output / "precious.txt").write_text("mine")
    case.refuses(4, str(case.output), "exists")


def test_overwrite_replaces_an_output_that_exists(case: Case, tiny: Tiny) -> None:
    shutil.copytree(tiny.merged, case.output)
    (case.output / "README.md").write_text("old")
    (case.output / ".DS_Store").write_text("of a file manager")
    assert case.merge("--overwrite").code == 0
    assert contents(case.output) == contents(tiny.merged)
    assert {path.name for path in case.folder.iterdir()} == {"base", "adapter", "merged"}


def test_overwrite_replaces_no_folder_that_is_not_ours(case: Case) -> None:
    case.output.mkdir()
    (case.output / "thesis.tex").write_text("mine")
    case.refuses(4, str(case.output), "no folder that ia3-export wrote", args=("--overwrite",))
    (case.output / "ia3_export.json").write_text('{"schema": "another/tool"}')
    case.refuses(4, str(case.output), "no folder that ia3-export wrote", args=("--overwrite",))


@pytest.mark.parametrize("name", ["thesis.tex", "notes/day-1.txt", "model.safetensors.bak"])
def test_overwrite_replaces_no_file_that_the_manifest_does_not_list(
    case: Case, tiny: Tiny, name: str
) -> None:
    shutil.copytree(tiny.merged, case.output)
    (case.output / name).parent.mkdir(exist_ok=True)
    (case.output / name).write_text("mine")
    case.refuses(4, str(case.output), name, args=("--overwrite",))


def test_an_output_per_adapter_replaces_no_folder_that_is_not_ours(case: Case) -> None:
    (case.output / "adapter").mkdir(parents=True)
    (case.output / "adapter" / "thesis.tex").write_text("mine")
    words = ("merge", "--base", case.base, "--adapter", case.adapter, "--output-per-adapter", case.output)
    only_complaint(case.run(*words, "--overwrite"), 4, "no folder that ia3-export wrote")
    assert (case.output / "adapter" / "thesis.tex").read_text() == "mine"


def test_an_empty_folder_may_become_the_output(case: Case, tiny: Tiny) -> None:
    case.output.mkdir()
    assert case.merge().code == 0
    assert contents(case.output) == contents(tiny.merged)


def test_a_refused_overwrite_keeps_the_old_output(case: Case) -> None:
    case.output.mkdir()
    (case.output / "precious.txt").write_text("mine")
    set_vector(case, DOWN_PROJ, 5, float("nan"))
    case.refuses(3, DOWN_PROJ, args=("--overwrite",))


def test_an_output_that_is_a_file_is_refused(case: Case) -> None:
    case.output.write_text("mine")
    case.refuses(4, str(case.output), args=("--overwrite",))


def test_a_file_in_place_of_the_outputs_parent_is_refused(case: Case) -> None:
    (case.folder / "file").write_text("mine")
    case.refuses(4, str(case.folder / "file"), output=case.folder / "file" / "merged")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    done = []

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "ia3-export-test", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        done.append(place)
        return place

    yield mount
    for path in done:
        subprocess.run(["umount", str(path)], check=True)


def test_a_parent_that_is_not_writable_is_named(case: Case, mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=1m,ro")
    case.refuses(4, str(disk), output=disk / "merged")


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    case: Case, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=16k")
    case.refuses(4, str(disk), "bytes", output=disk / "merged")


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    case: Case, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=1m,nr_inodes=7")
    case.refuses(4, str(disk), "No space left", output=disk / "merged")


@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_is_full_at_a_write_leaves_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls = []
    write = ranges._pwrite

    def full(descriptor: int, data: Any, position: int) -> int:
        calls.append(position)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, position)

    monkeypatch.setattr(ranges, "_pwrite", full)
    case.refuses(4, str(case.output), "No space left")


# ------------------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        ("merge --adapter {adapter} --output {out}", "--base"),
        ("merge --base {base} --output {out}", "--adapter"),
        ("merge --base {base} --adapter {adapter}", "--output"),
        (
            "merge --base {base} --adapter {adapter} --output {out} --output-per-adapter {out}",
            "--output-per-adapter",
        ),
        ("merge --base {base} --adapter {adapter} --output {out} --dtype float8", "float8"),
        ("merge --base {base} --adapter {adapter} --output {out} --shard-size five", "5GB"),
        ("merge --base {base} --adapter {adapter} --output {out} --shard-size -5GB", "5GB"),
        ("merge --base {base} --adapter {adapter} --output {out} --combine linear --weights a,b", "0.7,0.3"),
        ("merge --base {base} --adapter {adapter} --output {out} --frobnicate", "--frobnicate"),
        ("merge --base {base} --adapter {adapter} --output-per-adapter {out} --combine linear", "--combine"),
        ("inspect", "ADAPTER"),
        ("frobnicate", "frobnicate"),
    ],
)
def test_wrong_options_exit_with_2_and_name_the_option(case: Case, words: str, mention: str) -> None:
    before = contents(case.folder)
    ran = run(*words.format(base=case.base, adapter=case.adapter, out=case.output).split())
    assert ran.code == 2
    assert mention in ran.stderr.partition("error: ")[2].partition("hint: ")[0]
    assert "--help" in ran.stderr.partition("hint: ")[2]
    assert ran.stdout == ""
    assert contents(case.folder) == before


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ("--combine linear", "one weight"),
        ("--combine linear --weights 0.5,0.5", "one weight"),
        ("--combine delta --weights 0.1,0.2,0.3", "one weight"),
        ("--weights 0.5", "--weights"),
        ("--combine product --weights 0.5", "--weights"),
        ("--combine linear --weights nan", "finite"),
        ("--combine delta --weights inf", "finite"),
    ],
)
def test_weights_that_do_not_fit_exit_with_2(case: Case, options: str, mention: str) -> None:
    case.refuses(2, mention, args=tuple(options.split()))


@pytest.mark.parametrize(
    "spelling", ["{adapter}", "{adapter}/", "{adapter}/../adapter", "{adapter}/adapter_model.safetensors"]
)
def test_the_same_adapter_twice_exits_with_2(case: Case, spelling: str) -> None:
    case.refuses(2, "twice", args=("--adapter", spelling.format(adapter=case.adapter)))


def test_two_adapters_of_one_name_cannot_have_an_output_each(case: Case) -> None:
    shutil.copytree(case.adapter, case.folder / "elsewhere" / "adapter")
    before = contents(case.folder)
    ran = run(
        "merge",
        "--base",
        case.base,
        "--adapter",
        case.adapter,
        "--adapter",
        case.folder / "elsewhere" / "adapter",
        "--output-per-adapter",
        case.output,
    )
    only_complaint(ran, 2, "adapter")
    assert contents(case.folder) == before


# --------------------------------------------------------------------------------------- through
# a real process


def test_a_process_prints_error_and_hint_and_exits_with_3(case: Case) -> None:
    set_vector(case, DOWN_PROJ, 5, float("nan"))
    Case(case.folder, run_process).refuses(3, DOWN_PROJ)


def test_a_process_exits_with_4_when_the_output_exists(case: Case) -> None:
    case.output.mkdir()
    (case.output / "precious.txt").write_text("mine")
    Case(case.folder, run_process).refuses(4, str(case.output))


def test_a_process_exits_with_2_for_weights_that_do_not_fit(case: Case) -> None:
    Case(case.folder, run_process).refuses(2, "--weights", args=("--weights", "0.5"))


def test_no_warning_of_torch_comes_before_the_error(case: Case) -> None:
    for file in case.base.glob("model*"):
        file.unlink()
    (case.base / "pytorch_model.bin").write_bytes(
        pickle.dumps(Malicious(case.folder / "was-run"), protocol=4)
    )
    Case(case.folder, run_process).refuses(3, "pytorch_model.bin", "not executed")


def test_a_tensor_name_that_no_encoding_can_write_is_refused(case: Case, tiny: Tiny) -> None:
    """JSON can spell half a surrogate pair; with --dtype the name would go into the manifest."""
    shutil.rmtree(case.base)
    shutil.copytree(tiny.single, case.base)
    shard = case.base / "model.safetensors"
    header, data = split_safetensors(shard)
    header["lm_head.\ud800"] = header.pop("lm_head.weight")
    join_safetensors(shard, header, data)
    Case(case.folder, run_process).refuses(3, shard.name, args=("--dtype", "float16"))


def test_a_refusal_with_json_is_one_document_on_stdout(case: Case) -> None:
    set_vector(case, DOWN_PROJ, 5, float("nan"))
    ran = case.merge("--json")
    document = json.loads(ran.stdout)
    assert ran.code == document["exit_code"] == 3
    assert DOWN_PROJ in document["error"]
    assert document["hint"]


def test_inspect_reports_refusals_as_findings(case: Case) -> None:
    set_vector(case, DOWN_PROJ, 5, float("nan"))
    ran = run("inspect", case.adapter, "--base", case.base, "--json")
    refusals = json.loads(ran.stdout)["plan"]["refusals"]
    assert ran.code == 0
    assert DOWN_PROJ in refusals[0]["error"]
