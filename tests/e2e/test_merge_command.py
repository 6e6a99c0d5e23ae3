"""``ia3-export merge`` from the outside: the bytes it writes, against PEFT's, and what it prints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.e2e.command import contents, edit_json, merge, run, run_process
from tests.e2e.conftest import Tiny
from tests.support import zoo
from tests.support.merged import (
    FOLDED,
    PEFT_WARNINGS,
    UNTOUCHED_SHARDS,
    different,
    load,
    peft_merge,
    same_weights,
)
from tests.support.tensors import read_folder

pytestmark = PEFT_WARNINGS

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


# ----------------------------------------------------------------------------------------- where the adapter
# may lie


def save_again(tiny: Tiny, folder: Path, *, name: str = "default", safe: bool = True) -> None:
    """Load the adapter with PEFT under `name` and let PEFT save it."""
    from peft import PeftModel

    live = PeftModel.from_pretrained(load(tiny.base), tiny.adapter, adapter_name=name)
    live.save_pretrained(folder, safe_serialization=safe)


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
