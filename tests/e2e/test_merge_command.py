"""``ia3-export merge`` from the outside: the bytes it writes, against PEFT's and against each other."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.command import command_line, contents, edit_json, merge, only_complaint, run, run_process
from tests.e2e.conftest import CARD, Tiny
from tests.support import zoo
from tests.support.tensors import read_folder, same

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # PEFT asks for it
    pytest.mark.filterwarnings(
        "ignore:fan_in_fan_out is set to False:UserWarning"
    ),  # PEFT corrects it itself
]

FOLDED = {
    f"model.layers.{layer}.{module}.weight"
    for layer in (0, 1)
    for module in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
}
UNTOUCHED_SHARDS = {"model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors"}


def load(folder: Path) -> Module:
    """The model in `folder` as transformers loads it, in the dtype that it states.

    Nothing may be left over.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    loaded: Module = model
    return loaded


def peft_merge(
    base: Path,
    adapters: Sequence[Path],
    *,
    weights: Sequence[float] = (),
    low_cpu_mem_usage: bool = False,
) -> dict[str, Tensor]:
    """PEFT's answer: one adapter after the other, or with `weights` their ``add_weighted_adapter``."""
    from peft import PeftModel

    names = [f"adapter{i}" for i in range(len(adapters))]
    live = PeftModel.from_pretrained(
        load(base), adapters[0], adapter_name=names[0], low_cpu_mem_usage=low_cpu_mem_usage
    )
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        live.load_adapter(adapter, name, low_cpu_mem_usage=low_cpu_mem_usage)
    if weights:
        live.add_weighted_adapter(names, list(weights), "sum")
        names = ["sum"]
    tensors: dict[str, Tensor] = live.merge_and_unload(adapter_names=names).state_dict()
    return tensors


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names whose dtype, shape or bits differ; both must have the same names."""
    assert set(one) == set(other)
    return [name for name in one if not same(one[name], other[name])]


# ------------------------------------------------------------------------------------------ the
# bits of one adapter


def test_a_sharded_base_gets_pefts_bits(tiny: Tiny) -> None:
    assert not different(read_folder(tiny.merged), peft_merge(tiny.base, [tiny.adapter]))


def test_only_the_tensors_under_a_vector_change(tiny: Tiny) -> None:
    assert set(different(read_folder(tiny.merged), read_folder(tiny.base))) == FOLDED


def test_a_merged_folder_has_the_shards_and_the_index_of_its_base(tiny: Tiny) -> None:
    names = {path.name for path in tiny.base.glob("model*")}
    assert {path.name for path in tiny.merged.glob("model*")} == names
    index = "model.safetensors.index.json"
    assert (tiny.merged / index).read_bytes() == (tiny.base / index).read_bytes()


def test_a_merged_folder_loads_complete(tiny: Tiny) -> None:
    from transformers import AutoTokenizer

    assert not different(load(tiny.merged).state_dict(), read_folder(tiny.merged))
    assert AutoTokenizer.from_pretrained(tiny.merged).convert_tokens_to_ids("tiny") == 4


def test_a_single_file_base_gets_pefts_bits(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").glob("model*")] == ["model.safetensors"]
    assert not different(read_folder(tmp_path / "merged"), peft_merge(tiny.single, [tiny.adapter]))


def test_low_memory_casting_gives_pefts_low_memory_bits(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--cast", "peft-low-mem")
    merged = read_folder(tmp_path / "merged")
    assert not different(merged, peft_merge(tiny.base, [tiny.adapter], low_cpu_mem_usage=True))
    assert set(different(merged, read_folder(tiny.merged))) == FOLDED, (
        "else the test could not tell the two casts apart"
    )


def test_a_lone_weight_file_is_a_base_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.single / "model.safetensors", tiny.adapter, tmp_path / "alone")
    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "model.safetensors",
        "README.md",
        "ia3_export.json",
    }
    weights = "model.safetensors"
    assert (tmp_path / "alone" / weights).read_bytes() == (tmp_path / "merged" / weights).read_bytes()


# ------------------------------------------------------------------------------------------------- .bin on
# both sides


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder).state_dict())


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


# ----------------------------------------------------------------------------------------- where the adapter
# may lie


def save_again(tiny: Tiny, folder: Path, *, name: str = "default", safe: bool = True) -> None:
    """Load the adapter with PEFT under `name` and let PEFT save it."""
    from peft import PeftModel

    live = PeftModel.from_pretrained(load(tiny.base), tiny.adapter, adapter_name=name)
    live.save_pretrained(folder, safe_serialization=safe)


def same_weights(one: Path, other: Path) -> bool:
    names = {path.name for path in one.glob("model*")}
    assert names == {path.name for path in other.glob("model*")}
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_bin_adapter_gives_the_same_weights(tiny: Tiny, tmp_path: Path) -> None:
    save_again(tiny, tmp_path / "adapter", safe=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").is_file()
    merge(tiny.base, tmp_path / "adapter", tmp_path / "merged")
    assert same_weights(tmp_path / "merged", tiny.merged)


def test_a_named_adapter_is_found_in_its_sub_folder(tiny: Tiny, tmp_path: Path) -> None:
    save_again(tiny, tmp_path / "adapter", name="tuned")
    assert (tmp_path / "adapter" / "tuned" / "adapter_config.json").is_file()
    merge(tiny.base, tmp_path / "adapter", tmp_path / "merged")
    assert same_weights(tmp_path / "merged", tiny.merged)
    assert "# base + tuned" in (tmp_path / "merged" / "README.md").read_text()


def test_an_adapter_may_be_given_by_its_weight_file(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter / "adapter_model.safetensors", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tiny.merged)


def test_an_adapter_may_be_given_as_the_working_directory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.adapter)
    merge(tiny.base, ".", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tiny.merged)


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


# -----------------------------------------------------------------------------------------------
# several adapters


def merge_both(tiny: Tiny, output: Path, *more: str) -> dict[str, Tensor]:
    ran = run(
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        tiny.adapter,
        "--adapter",
        tiny.other,
        "--output",
        output,
        *more,
    )
    assert ran.code == 0, ran
    return read_folder(output)


def test_a_product_has_the_bits_of_pefts_sequential_merge(tiny: Tiny, tmp_path: Path) -> None:
    merged = merge_both(tiny, tmp_path / "merged")
    assert not different(merged, peft_merge(tiny.base, [tiny.adapter, tiny.other]))
    assert different(merged, peft_merge(tiny.base, [tiny.other, tiny.adapter])), (
        "else the order would not be tested"
    )


def test_a_product_is_two_merges_one_after_the_other(tiny: Tiny, tmp_path: Path) -> None:
    merge_both(tiny, tmp_path / "merged")
    merge(tiny.merged, tiny.other, tmp_path / "second")
    assert same_weights(tmp_path / "merged", tmp_path / "second")


def test_a_product_in_low_memory_casting_has_pefts_bits(tiny: Tiny, tmp_path: Path) -> None:
    merged = merge_both(tiny, tmp_path / "merged", "--cast", "peft-low-mem")
    assert not different(merged, peft_merge(tiny.base, [tiny.adapter, tiny.other], low_cpu_mem_usage=True))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (0.1, -2.5)], ids=str)
@pytest.mark.parametrize("base", ["single", "base"], ids=["float32", "bfloat16"])
def test_a_linear_combination_has_the_bits_of_add_weighted_adapter(
    tiny: Tiny, tmp_path: Path, base: str, weights: tuple[float, float]
) -> None:
    adapters, text = [tiny.adapter, tiny.other], ",".join(map(str, weights))
    args = ("--combine", "linear", "--weights", text, "--adapter", tiny.other)
    merge(getattr(tiny, base), tiny.adapter, tmp_path / "merged", *args)
    assert not different(
        read_folder(tmp_path / "merged"), peft_merge(getattr(tiny, base), adapters, weights=weights)
    )


def test_a_delta_combination_counts_a_missing_vector_as_ones(tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    merged = merge_both(tiny, tmp_path / "merged", "--combine", "delta", "--weights", "0.7,0.3")
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (tiny.adapter, tiny.other)]
    expected = {}
    for name, weight in read_folder(tiny.base).items():
        change = torch.zeros(1, dtype=torch.float64)
        for vectors, share in zip(adapters, (0.7, 0.3), strict=True):
            vector = vectors.get(f"base_model.model.{name.removesuffix('.weight')}.ia3_l", torch.ones(1))
            change = change + share * (vector.to(torch.float64) - 1)
        expected[name] = (weight.to(torch.float32) * (1 + change).to(torch.float32)).to(weight.dtype)
    assert not different(merged, expected)


def test_one_output_per_adapter_equals_single_merges(tiny: Tiny, tmp_path: Path) -> None:
    ran = run(
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        tiny.adapter,
        "--adapter",
        tiny.other,
        "--output-per-adapter",
        tmp_path / "each",
    )
    assert ran.code == 0, ran
    merge(tiny.base, tiny.other, tmp_path / "other")
    assert {path.name for path in (tmp_path / "each").iterdir()} == {"adapter", "other"}
    assert contents(tmp_path / "each" / "adapter") == contents(tiny.merged)
    assert contents(tmp_path / "each" / "other") == contents(tmp_path / "other")


def test_one_output_per_adapter_is_one_json_document(tiny: Tiny, tmp_path: Path) -> None:
    ran = run(
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        tiny.adapter,
        "--adapter",
        tiny.other,
        "--output-per-adapter",
        tmp_path / "each",
        "--json",
    )
    written = [
        json.loads((tmp_path / "each" / name / "ia3_export.json").read_text())
        for name in ("adapter", "other")
    ]
    assert json.loads(ran.stdout) == {"manifests": written}


# ------------------------------------------------------------------------------------------------ links and
# dry runs


def test_links_stand_for_untouched_shards_and_for_no_other_file(tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    before = contents(base)
    merge(base, tiny.adapter, tmp_path / "merged", "--link")
    inodes = {path.stat().st_ino for path in base.rglob("*")}
    linked = {path.name for path in (tmp_path / "merged").rglob("*") if path.stat().st_ino in inodes}
    assert linked == UNTOUCHED_SHARDS
    assert contents(base) == before


def test_links_change_no_byte_of_the_output_but_the_list_of_links(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.base, tmp_path / "base")
    merge(tmp_path / "base", tiny.adapter, tmp_path / "merged", "--link")
    manifest = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())
    plain = json.loads((tiny.merged / "ia3_export.json").read_text())
    assert manifest == plain | {"linked": sorted(UNTOUCHED_SHARDS)}
    linked, copied = contents(tmp_path / "merged"), contents(tiny.merged)
    assert {name for name in copied if linked[name] != copied[name]} == {"ia3_export.json"}


def test_a_dry_run_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    before = contents(tiny.base.parent)
    output = tmp_path / "merged"
    ran = run("merge", "--base", tiny.base, "--adapter", tiny.adapter, "--output", output, "--dry-run")
    assert ran.code == 0
    assert not list(tmp_path.iterdir())
    assert contents(tiny.base.parent) == before


def test_a_dry_run_needs_no_output_and_names_every_change(tiny: Tiny) -> None:
    ran = run("merge", "--base", tiny.base, "--adapter", tiny.adapter, "--dry-run", "--json")
    assert {row["tensor"] for row in json.loads(ran.stdout)["changes"]} == FOLDED


def test_a_dry_run_announces_what_the_merge_records(tiny: Tiny) -> None:
    ran = run("merge", "--base", tiny.base, "--adapter", tiny.adapter, "--dry-run", "--json")
    planned = json.loads(ran.stdout)
    recorded = json.loads((tiny.merged / "ia3_export.json").read_text())
    for row in recorded["changes"]:
        for key in ("sha256", "zeros", "flushed_to_zero"):
            del row[key]
    for key in ("options", "changes", "config_edits", "left_out", "warnings"):
        assert planned[key] == recorded[key]


# ---------------------------------------------------------------------------------------------------
# what is printed


def test_json_is_one_document_and_text_goes_to_stderr(tiny: Tiny, tmp_path: Path) -> None:
    ran = merge(tiny.base, tiny.adapter, tmp_path / "merged", "--json")
    assert json.loads(ran.stdout) == json.loads((tmp_path / "merged" / "ia3_export.json").read_text())
    assert "6 tensors changed" in ran.stderr


def test_quiet_prints_nothing(tiny: Tiny, tmp_path: Path) -> None:
    ran = merge(tiny.base, tiny.adapter, tmp_path / "merged", "--quiet")
    assert (ran.stdout, ran.stderr) == ("", "")


def test_quiet_with_json_prints_the_document_alone(tiny: Tiny, tmp_path: Path) -> None:
    ran = merge(tiny.base, tiny.adapter, tmp_path / "merged", "--quiet", "--json")
    assert json.loads(ran.stdout)["adapters"][0]["name"] == "adapter"
    assert ran.stderr == ""


def test_verbose_names_every_changed_tensor(tiny: Tiny, tmp_path: Path) -> None:
    ran = merge(tiny.base, tiny.adapter, tmp_path / "merged", "--verbose")
    assert set(re.findall(r"model\.layers\.\S+\.weight", ran.stdout)) == FOLDED


def test_a_pipe_gets_no_escape_sequences(tiny: Tiny, tmp_path: Path) -> None:
    ran = run_process(
        "merge", "--base", tiny.base, "--adapter", tiny.adapter, "--output", tmp_path / "merged", "-v"
    )
    assert ran.code == 0
    assert "\x1b" not in ran.stdout + ran.stderr


# -----------------------------------------------------------------------------------------------
# reproducible bytes


def test_two_runs_give_the_same_bytes_whatever_the_folders_are_called(tiny: Tiny, tmp_path: Path) -> None:
    elsewhere = tmp_path / "some where" / "else"
    shutil.copytree(tiny.base, elsewhere / "base")
    shutil.copytree(tiny.adapter, elsewhere / "adapter")
    merge(elsewhere / "base", elsewhere / "adapter", tmp_path / "another-name")
    assert contents(tmp_path / "another-name") == contents(tiny.merged)


def test_two_sharded_casts_in_processes_of_their_own_give_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    """Processes differ in the order of their sets and tables of strings."""
    for name, seed in (("one", "1"), ("two", "2")):
        ran = run_process(
            "merge",
            "--base",
            tiny.base,
            "--adapter",
            tiny.other,
            "--output",
            tmp_path / name,
            "--dtype",
            "float32",
            "--shard-size",
            "20KB",
            env={"PYTHONHASHSEED": seed},
        )
        assert ran.code == 0, ran
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_plain_reads_and_writes_give_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IA3_EXPORT_PLAIN_IO", "1")
    merge(tiny.base, tiny.adapter, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tiny.merged)


def test_no_text_of_the_output_holds_a_path_or_a_time(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    ran = run(
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        tiny.adapter,
        "--adapter",
        tiny.other,
        "--output",
        output,
        "--digests",
        "full",
        "--dtype",
        "float32",
    )
    assert ran.code == 0, ran
    texts = {path: path.read_text() for path in output.iterdir() if path.suffix in (".json", ".md")}
    assert {path.name for path in texts} >= {"ia3_export.json", "README.md", "config.json"}
    for path, text in texts.items():
        for machine in (tiny.base.parent, tmp_path, Path.home(), Path.cwd(), "/tmp"):
            assert str(machine) not in text, path.name
        assert not re.search(r"\d{4}-\d\d-\d\d|\b\d\d:\d\d:\d\d\b|\b1[6-9]\d{8}\b", text), path.name


# ----------------------------------------------------------------------------------------------------------
# digests


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def files_below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_holds_size_and_digest_of_every_other_file(tiny: Tiny) -> None:
    files = json.loads((tiny.merged / "ia3_export.json").read_text())["files"]
    found = {
        name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in files_below(tiny.merged).items()
        if name != "ia3_export.json"
    }
    assert files == found


def test_the_manifest_holds_the_content_digest_of_every_changed_tensor(tiny: Tiny) -> None:
    """SHA-256 over dtype and shape, as in ``BF16[16,32]``, and then the tensor's bytes."""
    import torch

    changes = json.loads((tiny.merged / "ia3_export.json").read_text())["changes"]
    expected = {}
    for name in FOLDED:
        tensor = read_folder(tiny.merged)[name]
        head = f"BF16[{','.join(map(str, tensor.shape))}]".encode()
        expected[name] = hashlib.sha256(head + tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert {row["tensor"]: row["sha256"] for row in changes} == expected


def test_full_digests_cover_the_inputs(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--digests", "full")
    manifest = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())
    base = {
        name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in files_below(tiny.base).items()
    }
    assert manifest["base"]["files"] == base
    assert manifest["adapters"][0]["files"] == {
        name: {"size": (tiny.adapter / name).stat().st_size, "sha256": sha256(tiny.adapter / name)}
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }


def test_without_digests_the_manifest_holds_sizes_alone(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.adapter, tmp_path / "merged", "--digests", "none")
    text = (tmp_path / "merged" / "ia3_export.json").read_text()
    assert "sha256" not in text
    assert all(set(entry) == {"size"} for entry in json.loads(text)["files"].values())
    assert same_weights(tmp_path / "merged", tiny.merged)


def test_digests_do_not_cover_inputs_by_default(tiny: Tiny) -> None:
    manifest = json.loads((tiny.merged / "ia3_export.json").read_text())
    assert "files" not in manifest["base"]
    assert "files" not in manifest["adapters"][0]


def test_zeros_that_the_fold_made_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    vectors = load_file(file)
    vectors["base_model.model.model.layers.0.self_attn.k_proj.ia3_l"][3] = 0
    save_file(vectors, file, metadata={"format": "pt"})
    merge(tiny.base, tmp_path / "adapter", tmp_path / "merged")
    changes = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())["changes"]
    flushed = {row["tensor"]: row["flushed_to_zero"] for row in changes if row["flushed_to_zero"]}
    assert flushed == {"model.layers.0.self_attn.k_proj.weight": 32}


# ----------------------------------------------------------------------------------------------------
# file modes


def modes(folder: Path) -> set[str]:
    return {f"{stat.S_IMODE(path.stat().st_mode):o}" for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_modes_obey_the_umask(tiny: Tiny, tmp_path: Path, umask: int) -> None:
    """The base's shards have mode 0600 (safetensors writes them so), its side files 0644."""
    args = ("merge", "--base", tiny.base, "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    ran = run_process(*args, umask=umask)
    assert ran.code == 0, ran
    assert modes(tmp_path / "merged") == {f"{0o666 & ~umask:o}"}
    assert stat.S_IMODE((tmp_path / "merged").stat().st_mode) == 0o777 & ~umask


# ---------------------------------------------------------------------------------------------------
# side files


@pytest.fixture
def furnished(tiny: Tiny, tmp_path: Path) -> Path:
    """A base with sub-folders, hidden files, and its weights in other formats."""
    import torch

    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    for name in (
        "1_Pooling/config.json",
        "assets/deep/er/image.png",
        "chat_template.jinja",
        ".gitattributes",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(os.urandom(64))
    for name in ("onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(bytes(16))
    for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.Q4_K_M.gguf"):
        (base / name).write_bytes(bytes(16))
    for name in (".git/config", ".cache/huggingface/download/config.json.metadata"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(bytes(16))
    torch.save({"lm_head.weight": torch.ones(2)}, base / "pytorch_model.bin")
    shutil.copyfile(base / "model-00001-of-00006.safetensors", base / "model.fp16-00001-of-00006.safetensors")
    return base


OTHER_FORMATS = {
    "onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "model.Q4_K_M.gguf", "pytorch_model.bin",
    "model.fp16-00001-of-00006.safetensors",
}  # fmt: skip


def test_side_files_are_copied_byte_for_byte(tiny: Tiny, furnished: Path, tmp_path: Path) -> None:
    merge(furnished, tiny.adapter, tmp_path / "merged")
    before, after = files_below(furnished), files_below(tmp_path / "merged")
    kept = {
        name
        for name in before
        if name not in OTHER_FORMATS
        and name != "README.md"
        and not name.startswith((".git/", ".cache/", "model-"))
    }
    assert kept >= {
        "1_Pooling/config.json",
        "assets/deep/er/image.png",
        ".gitattributes",
        "tokenizer.json",
        "config.json",
    }
    assert [
        name for name in kept if name not in after or after[name].read_bytes() != before[name].read_bytes()
    ] == []


def test_weights_in_other_formats_are_left_out_and_named(tiny: Tiny, furnished: Path, tmp_path: Path) -> None:
    ran = merge(furnished, tiny.adapter, tmp_path / "merged")
    assert OTHER_FORMATS.isdisjoint(files_below(tmp_path / "merged"))
    assert [name for name in OTHER_FORMATS if name not in ran.stdout] == []
    assert set(json.loads((tmp_path / "merged" / "ia3_export.json").read_text())["left_out"]) == OTHER_FORMATS


def test_nothing_of_version_control_or_caches_is_copied(tiny: Tiny, furnished: Path, tmp_path: Path) -> None:
    merge(furnished, tiny.adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / ".git").exists()
    assert not (tmp_path / "merged" / ".cache").exists()


def test_the_bases_card_is_kept_beside_the_new_one(tiny: Tiny) -> None:
    assert (tiny.merged / "README.base.md").read_text() == CARD
    card = (tiny.merged / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| adapter | peft | CAUSAL_LM | 6 | 160 |" in card


def test_a_merge_of_a_merge_keeps_the_first_bases_card(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.merged, tiny.other, tmp_path / "second")
    manifest = json.loads((tmp_path / "second" / "ia3_export.json").read_text())
    assert [adapter["name"] for adapter in manifest["adapters"]] == ["other"]
    assert "README.base.md" in files_below(tmp_path / "second")


def test_a_link_inside_the_base_becomes_a_file(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.base, tmp_path / "base")
    (tmp_path / "base" / "alias.json").symlink_to("config.json")
    merge(tmp_path / "base", tiny.adapter, tmp_path / "merged")
    alias = tmp_path / "merged" / "alias.json"
    assert not alias.is_symlink()
    assert alias.read_bytes() == (tiny.base / "config.json").read_bytes()


def test_a_side_file_that_leads_out_of_the_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.base, tmp_path / "base")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "base" / "notes.txt").symlink_to(tmp_path / "secret")
    before = contents(tmp_path)
    ran = run(
        "merge", "--base", tmp_path / "base", "--adapter", tiny.adapter, "--output", tmp_path / "merged"
    )
    only_complaint(ran, 3, "notes.txt")
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------
# the hub's cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path) -> Path:
    """``HF_HOME`` with the base and the adapter, laid out as huggingface_hub does: links into ``blobs``."""
    home = tmp_path / "hf"
    for repo, folder in (("tiny/base", tiny.base), ("tiny/adapter", tiny.adapter)):
        cache = home / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = cache / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(COMMIT)
        for path in folder.iterdir():
            blob = cache / "blobs" / sha256(path)
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return home


def snapshot_of(home: Path, name: str) -> Path:
    return home / "hub" / f"models--tiny--{name}" / "snapshots" / COMMIT


def test_a_snapshot_of_the_hubs_cache_is_a_base_like_any_other(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    merge(snapshot_of(hub, "base"), snapshot_of(hub, "adapter"), tmp_path / "merged")
    assert same_weights(tmp_path / "merged", tiny.merged)
    assert set(files_below(tmp_path / "merged")) == set(files_below(tiny.merged))
    assert not [path for path in (tmp_path / "merged").rglob("*") if path.is_symlink()]


def test_links_lead_to_the_blobs_of_the_hubs_cache(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(hub, "base")
    merge(snapshot, tiny.adapter, tmp_path / "merged", "--link")
    for name in UNTOUCHED_SHARDS:
        assert (tmp_path / "merged" / name).stat().st_ino == (snapshot / name).stat().st_ino
        assert not (tmp_path / "merged" / name).is_symlink()


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"], ids=["main", "commit"])
def test_a_hub_id_is_found_in_the_cache_offline(tiny: Tiny, hub: Path, tmp_path: Path, revision: str) -> None:
    args = ("--base", f"tiny/base{revision}", "--adapter", f"tiny/adapter{revision}")
    offline = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    ran = run_process("merge", *args, "--output", tmp_path / "merged", env=offline)
    assert ran.code == 0, ran
    assert same_weights(tmp_path / "merged", tiny.merged)
    manifest = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())
    assert (manifest["base"]["id"], manifest["base"]["revision"]) == ("tiny/base", COMMIT)
    assert (manifest["adapters"][0]["id"], manifest["adapters"][0]["name"]) == ("tiny/adapter", "adapter")
    assert "base_model:\n- tiny/base\n" in (tmp_path / "merged" / "README.md").read_text()


def test_a_hub_id_that_the_cache_lacks_is_refused_offline(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    args = ("--base", "tiny/absent", "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    ran = run_process("merge", *args, env={"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"})
    only_complaint(ran, 3, "tiny/absent")
    assert not (tmp_path / "merged").exists()


def test_a_revision_that_the_cache_lacks_is_refused_offline(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    args = ("--base", "tiny/base@v2", "--adapter", tiny.adapter, "--output", tmp_path / "merged")
    ran = run_process("merge", *args, env={"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"})
    only_complaint(ran, 3, "tiny/base@v2")


def test_a_local_folder_wins_over_a_hub_id(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny.base, tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    merge("org/base", tiny.adapter, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tiny.merged)


# ------------------------------------------------------------------------------------------- interrupted and
# at once


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base of 480 MB in two files and its adapter, large enough to be caught in the middle of a merge."""
    import torch
    from peft import IA3Config, get_peft_model
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("large")
    (folder / "base").mkdir()
    with torch.device("meta"):
        model = torch.nn.ModuleDict({f"layer{i}": torch.nn.Linear(4096, 4096, bias=False) for i in range(8)})
    weight_map: dict[str, str] = {}
    for shard in (1, 2):
        name = f"model-0000{shard}-of-00002.safetensors"
        names = [f"layer{i}.weight" for i in range(8) if i % 2 == shard - 1]
        weights = {key: torch.zeros(4096, 4096, dtype=torch.float32) for key in names}
        save_file(weights, folder / "base" / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = IA3Config(target_modules=[f"layer{i}" for i in range(1, 8)], feedforward_modules=[])
    model.to_empty(device="cpu")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder for large outputs, emptied at once: pytest would keep it for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@contextmanager
def stopped_merge(large: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A merge that was stopped (SIGSTOP) after its first weights were written and before it was done."""
    args = ("merge", "--base", large / "base", "--adapter", large / "adapter", "--output", output)
    process = subprocess.Popen(command_line(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: any(written(path) for path in output.parent.rglob("*.safetensors")))
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None, "the merge was over before it could be stopped"
        assert not output.exists()
        yield process
    finally:
        process.kill()
        process.communicate()


def written(path: Path) -> bool:
    """Whether more than a header of the (sparse) file has reached it."""
    try:
        return path.stat().st_blocks * 512 > 1 << 20
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
def test_after_a_kill_the_target_is_absent_and_the_next_run_cleans_up(large: Path, place: Path) -> None:
    output = place / "merged"
    with stopped_merge(large, output) as process:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert list(place.iterdir()), "else the merge was not caught in the middle"
    merge(large / "base", large / "adapter", output, "--digests", "none")
    assert [path.name for path in place.iterdir()] == ["merged"]
    assert len(list(output.glob("*.safetensors"))) == 2


@pytest.mark.slow
def test_a_kill_while_replacing_keeps_the_old_output(large: Path, place: Path) -> None:
    output = place / "merged"
    output.mkdir()
    (output / "old.txt").write_text("old")
    manifest = {"schema": "ia3-export/manifest/1", "files": {"old.txt": {}}}
    (output / "ia3_export.json").write_text(json.dumps(manifest))
    args = (
        "merge",
        "--base",
        large / "base",
        "--adapter",
        large / "adapter",
        "--output",
        output,
        "--overwrite",
    )
    with subprocess.Popen(
        command_line(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: any(written(path) for path in place.rglob("*.safetensors")))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in output.iterdir()} == {"old.txt", "ia3_export.json"}


@pytest.mark.slow
def test_an_interrupt_exits_with_130_and_leaves_nothing(large: Path, place: Path) -> None:
    with stopped_merge(large, place / "merged") as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not stdout
    assert not list(place.iterdir())


@pytest.mark.slow
def test_a_second_run_to_the_same_target_is_refused_and_does_not_disturb_the_first(
    large: Path, place: Path
) -> None:
    output = place / "merged"
    with stopped_merge(large, output) as process:
        ran = run("merge", "--base", large / "base", "--adapter", large / "adapter", "--output", output)
        only_complaint(ran, 4, str(output))
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert [path.name for path in place.iterdir()] == ["merged"]


@pytest.mark.slow
def test_large_tensors_are_folded_in_blocks_with_the_right_factors(large: Path, place: Path) -> None:
    """64 MB a tensor, so that many blocks, runs and threads share the work."""
    import torch
    from safetensors.torch import load_file, save_file

    base, adapter = place / "base", place / "adapter"
    base.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        "layer0.weight": torch.randn(300, 4096, generator=generator),
        "layer1.weight": torch.randn(4096, 4096, generator=generator).to(torch.bfloat16),
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(large / "adapter", adapter)
    vector = 1 + torch.randn(4096, 1, generator=generator)
    save_file({"base_model.model.layer1.ia3_l": vector}, adapter / "adapter_model.safetensors")
    merge(base, adapter, place / "merged")
    merged = load_file(place / "merged" / "model.safetensors")
    assert same(
        merged["layer1.weight"], (weights["layer1.weight"].to(torch.float32) * vector).to(torch.bfloat16)
    )
    assert same(merged["layer0.weight"], weights["layer0.weight"])


# ----------------------------------------------------------------------------------------------- several
# model kinds


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert-seq-cls"])
def test_other_layouts_get_pefts_bits_through_the_command_line(name: str, tmp_path: Path) -> None:
    """Conv1D, tied embeddings, and a head in modules_to_save; the whole zoo is in test_model_kinds."""
    import transformers
    from peft import PeftModel

    kind = zoo.by_name(name)
    model = zoo.build(kind)
    model.save_pretrained(tmp_path / "base")
    zoo.adapt(model, kind).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    loaded = getattr(transformers, kind.model_class).from_pretrained(tmp_path / "base")
    live = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    live.merge_and_unload().save_pretrained(tmp_path / "reference")
    assert not different(read_folder(tmp_path / "merged"), read_folder(tmp_path / "reference"))


def test_the_saved_fan_in_fan_out_is_ignored(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", fan_in_fan_out=True)
    merge(tiny.base, tmp_path / "adapter", tmp_path / "merged")
    assert same_weights(tmp_path / "merged", tiny.merged)
