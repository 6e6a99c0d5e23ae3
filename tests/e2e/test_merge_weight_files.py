"""``ia3-export merge`` of bases in ``.bin`` files, into other dtypes and into other shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.command import merge
from tests.e2e.conftest import Tiny
from tests.support.merged import (
    PEFT_WARNINGS,
    different,
    load,
    peft_merge,
    same_weights,
    weights_of,
)
from tests.support.tensors import read_folder

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = PEFT_WARNINGS

# ------------------------------------------------------------------------------------------------- .bin on
# both sides


@pytest.fixture
def bare_base(tiny: Tiny, tmp_path: Path) -> Path:
    """The sharded base's configuration without its weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(tiny.base / name, folder / name)
    return folder


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bin_base_gives_the_tensors_of_the_safetensors_one(
    tiny: Tiny, bare_base: Path, tmp_path: Path, zipped: bool
) -> None:
    import torch

    file = bare_base / "pytorch_model.bin"
    torch.save(weights_of(tiny.base), file, _use_new_zipfile_serialization=zipped)
    merge(bare_base, tiny.adapter, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").glob("*model*")] == ["model.safetensors"]
    assert not different(weights_of(tmp_path / "merged"), read_folder(tiny.merged))


def test_a_sharded_bin_base_becomes_sharded_safetensors(tiny: Tiny, bare_base: Path, tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(weights_of(tiny.base), bare_base, max_shard_size="10KB", safe_serialization=False)
    shards = {path.name for path in bare_base.glob("*.bin")}
    assert len(shards) > 2
    merge(bare_base, tiny.adapter, tmp_path / "merged")
    written = {path.name for path in (tmp_path / "merged").glob("*model*")} - {"model.safetensors.index.json"}
    assert written == {
        name.replace("pytorch_model", "model").replace(".bin", ".safetensors") for name in shards
    }
    assert not different(weights_of(tmp_path / "merged"), read_folder(tiny.merged))


def test_a_strided_tensor_in_a_bin_base_is_read_right(tiny: Tiny, bare_base: Path, tmp_path: Path) -> None:
    """A transposed view is saved with its strides, so its bytes do not lie in order."""
    import torch

    state = weights_of(tiny.base)
    state = {name: value.t().contiguous().t() if value.dim() == 2 else value for name, value in state.items()}
    assert not state["lm_head.weight"].is_contiguous()
    torch.save(state, bare_base / "pytorch_model.bin")
    merge(bare_base, tiny.adapter, tmp_path / "merged")
    assert not different(weights_of(tmp_path / "merged"), read_folder(tiny.merged))


def test_a_view_into_a_larger_storage_in_a_bin_base_is_read_right(
    tiny: Tiny, bare_base: Path, tmp_path: Path
) -> None:
    import torch

    state = weights_of(tiny.base)
    for name, value in state.items():
        larger = torch.zeros(value.numel() + 10, dtype=value.dtype)
        larger[5:-5] = value.reshape(-1)
        state[name] = larger[5:-5].view(value.shape)
    torch.save(state, bare_base / "pytorch_model.bin")
    merge(bare_base, tiny.adapter, tmp_path / "merged")
    assert not different(weights_of(tmp_path / "merged"), read_folder(tiny.merged))


def test_safetensors_win_over_bin_in_one_folder_as_in_transformers(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    base = tmp_path / "base"
    shutil.copytree(tiny.single, base)
    torch.save(
        {name: torch.zeros_like(value) for name, value in weights_of(base).items()},
        base / "pytorch_model.bin",
    )
    ran = merge(base, tiny.adapter, tmp_path / "merged")
    assert "pytorch_model.bin" in ran.stdout
    assert not (tmp_path / "merged" / "pytorch_model.bin").exists()
    assert not different(read_folder(tmp_path / "merged"), peft_merge(tiny.single, [tiny.adapter]))


# ------------------------------------------------------------------------------------------------
# dtypes and shards


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["base", "single"])
def test_another_dtype_is_rounded_once_after_the_fold(
    tiny: Tiny, tmp_path: Path, stored: str, dtype: str
) -> None:
    import torch
    from safetensors.torch import load_file

    base, new = getattr(tiny, stored), getattr(torch, dtype)
    merge(base, tiny.adapter, tmp_path / "merged", "--dtype", dtype)
    vectors = load_file(tiny.adapter / "adapter_model.safetensors")
    expected = {}
    for name, weight in read_folder(base).items():
        vector = vectors.get(f"base_model.model.{name.removesuffix('.weight')}.ia3_l", torch.ones(1))
        expected[name] = (weight.to(torch.float32) * vector).to(new)
    assert not different(read_folder(tmp_path / "merged"), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_stands_in_the_configuration(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--dtype", dtype)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tiny.base, tmp_path / "merged")
    )
    assert after == before | {"dtype": dtype}
    assert str(next(load(tmp_path / "merged").parameters()).dtype) == f"torch.{dtype}"


def test_the_index_of_another_dtype_states_its_size(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--dtype", "float32")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    before = json.loads((tiny.base / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 23712, "total_size": 4 * 23712}
    assert index["weight_map"] == before["weight_map"]


def test_the_dtype_that_is_stored_already_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--dtype", "bfloat16")
    assert same_weights(tmp_path / "merged", tiny.merged)


def test_shards_are_no_larger_than_asked_and_hold_the_same_tensors(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--shard-size", "16KB")
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) == 4
    assert all(sum(t.nbytes for t in read_one(shard).values()) <= 16_000 for shard in shards)
    assert not different(weights_of(tmp_path / "merged"), read_folder(tiny.merged))


def read_one(shard: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(shard)
    return tensors


def test_the_index_of_new_shards_is_true(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--shard-size", "16KB")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    held = {
        name: shard.name for shard in (tmp_path / "merged").glob("*.safetensors") for name in read_one(shard)
    }
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_folder(tmp_path / "merged").values())


def test_one_shard_for_all_needs_no_index(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--shard-size", "1GB")
    assert [path.name for path in (tmp_path / "merged").glob("model*")] == ["model.safetensors"]
    assert not different(weights_of(tmp_path / "merged"), read_folder(tiny.merged))
