"""Missing, damaged and foreign files: the exit code, who is to blame, what to do, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import (
    edit_json,
    join_safetensors,
    split_safetensors,
)
from tests.support import zoo
from tests.support.bad_input import (
    K_PROJ,
    Case,
    Malicious,
    rewrite,
)

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
