"""Adapters that other libraries wrote: the merge computes what those libraries' own unmerged forwards gave.

The fixtures and how they were made: tools/fixtures/{adapterhub,old_peft,research}.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ia3_export import Recipe, combine, convert, inspect, merge, read_adapter
from ia3_export.errors import DamagedFile, MissingVector, Refused, Unsupported, UnusedVector
from tests.e2e.command import only_complaint, run
from tests.support import adapter_cases
from tests.support.adapter_cases import FIXTURES, AdapterCase

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTERHUB, RESEARCH, OLD = adapter_cases.adapterhub(), adapter_cases.research(), adapter_cases.old_peft()
#: One key of two modules is lost for good; a file without tensors.
LOST = ("0.17.1-name-attention-bert", "0.21.2-data-parallel-outside")
#: AdapterHub's DeBERTa is refused whole, though one of its classes could be folded.
REFUSED = ("deberta_adapter_model",)
REASONS = {
    "refuse_deberta": "random bias", "refuse_modernbert": "random bias", "refuse_gating": "gating",
    "refuse_lora": "composition_mode 'add'", "refuse_seq_bn": "architecture None",
    "refuse_union": "architecture 'union'", "tfew_lora": "low-rank", "tfew_rank": "scaling rank 2",
    "tfew_rank_bias": "scaling rank 2",
}  # fmt: skip
GOOD = [
    c for c in (*ADAPTERHUB, *RESEARCH, *OLD) if not c.refuse and not c.name.startswith((*LOST, *REFUSED))
]
T_FEW = Path(__file__).parents[3] / "shared" / "data" / "tfew" / "t03b_ia3_finish.pt"


def by_name(name: str) -> AdapterCase:
    return next(case for case in (*ADAPTERHUB, *RESEARCH, *OLD) if case.name == name)


def forward(case: AdapterCase, folder: Path) -> Any:
    import torch
    import transformers

    name = "AutoModel" if case.field == "last_hidden_state" else case.class_name
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if name != "AutoModel":
        assert not info["missing_keys"]
    return output(case, model.eval())


def output(case: AdapterCase, model: Any) -> Any:
    import torch

    with torch.no_grad():
        return getattr(model(**case.inputs()), case.field)


def near(found: Any, wanted: Any) -> bool:
    """Float32 rounding of small models, and no more: a forgotten bias or vector is a thousand times that."""
    return bool((found - wanted).abs().max() <= 5e-6 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_a_merge_computes_what_the_library_computed_unmerged(case: AdapterCase, tmp_path: Path) -> None:
    merge(case.base, [case.adapter], tmp_path / "merged", recipe=Recipe(allow_unused=case.unplaced))
    assert near(forward(case, tmp_path / "merged"), case.wanted())


@pytest.mark.parametrize(
    "case", [c for c in GOOD if c in ADAPTERHUB and c.changes], ids=lambda case: case.name
)
def test_where_there_are_biases_adapterhubs_own_merge_is_wrong_and_ours_is_not(
    case: AdapterCase, tmp_path: Path
) -> None:
    own = load_file(case.expected)[case.output.replace("unmerged", "merged_by_adapters")]
    merge(case.base, [case.adapter], tmp_path / "merged", recipe=Recipe(allow_unused=case.unplaced))
    ours = forward(case, tmp_path / "merged")
    assert (own - case.wanted()).abs().max() > 1000 * (ours - case.wanted()).abs().max()


#: PEFT finds the modules of a model with a head in no bare model.
BARE = [
    c.name
    for c in GOOD
    if c.field == "last_hidden_state"
    and any(m.startswith(("bert.", "distilbert.", "transformer.")) for m in read_adapter(c.adapter).sites)
]


@pytest.mark.parametrize(
    "case",
    [c for c in GOOD if not c.two_sides and c.name not in (*BARE, "bert_bare_on_prefixed_base")],
    ids=lambda case: case.name,
)
def test_converted_it_has_the_same_forward_in_peft(case: AdapterCase, tmp_path: Path) -> None:
    import torch
    import transformers
    from peft import PeftModel

    done = convert(case.adapter, tmp_path / "peft", base=case.base, allow_unused=case.unplaced)
    name = "AutoModel" if case.field == "last_hidden_state" else case.class_name
    labels = case.labels(tmp_path / "peft")
    options = {"num_labels": labels} if labels else {}
    model = getattr(transformers, name).from_pretrained(case.base, dtype=torch.float32, **options)
    if "resized_to" in case.options:
        model.resize_token_embeddings(case.options["resized_to"])
    live = PeftModel.from_pretrained(model, done.folder).eval()
    assert near(output(case, live), case.wanted())


def test_converted_with_a_base_it_fits_the_class_of_the_base(tmp_path: Path) -> None:
    import torch
    import transformers
    from peft import PeftModel

    case = by_name("bert_bare_on_prefixed_base")
    convert(case.adapter, tmp_path / "peft", base=case.base)
    model = transformers.BertForPreTraining.from_pretrained(case.base, dtype=torch.float32)
    live = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    assert near(output(case, live.get_base_model().bert), case.wanted())


@pytest.mark.parametrize(
    "name",
    [
        "bert_multiple_choice",
        "roberta_static",
        "bert_multilabel",
        "gpt2_classification_static",
        "bert_tagging",
        "t5_classification",
    ],
)
def test_a_converted_head_keeps_its_class_and_labels(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    convert(case.adapter, tmp_path / "peft")
    merge(case.base, [tmp_path / "peft"], tmp_path / "again")
    merge(case.base, [case.adapter], tmp_path / "direct")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "direct" / file).read_bytes()


@pytest.mark.parametrize(
    "name", ["0.17.1-name-k-k", "0.17.1-name-layer-layer", "0.7.1-name-classifier-bert-seq-cls-classifier"]
)
def test_damaged_names_converted_without_a_base_are_restored_later(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    convert(case.adapter, tmp_path / case.adapter.name)
    merge(case.base, [tmp_path / case.adapter.name], tmp_path / "merged")
    assert near(forward(case, tmp_path / "merged"), case.wanted())


def test_a_classifier_task_without_a_classifier_is_refused(tmp_path: Path) -> None:
    ran = run(
        "convert",
        by_name("0.4.0-llama-default").adapter,
        "--output",
        tmp_path / "o",
        "--task-type",
        "SEQ_CLS",
    )
    only_complaint(ran, 2, "classifier")


def test_more_than_ten_labels_keep_their_order(tmp_path: Path) -> None:
    case = by_name("bert_classification")
    shutil.copytree(case.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "head_config.json"
    head = json.loads(file.read_text())
    head["config"]["label2id"] = {f"name {i}": i for i in range(12)}
    file.write_text(json.dumps(head))
    assert read_adapter(tmp_path / "adapter").labels == tuple(f"name {i}" for i in range(12))


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", 0), ("alpha", 10**400), ("alpha", "3"), ("alpha", True), ("attn_matrices", 3),
     ("attn_matrices", "qv"), ("attn_matrices", ["x"])],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_damage(field: str, value: Any, tmp_path: Path) -> None:
    shutil.copytree(by_name("gpt2_qv").adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["config"][field] = value
    file.write_text(json.dumps(config))
    with pytest.raises(DamagedFile, match=field):
        read_adapter(tmp_path / "adapter")


def test_text_that_is_no_unicode_is_damage(tmp_path: Path) -> None:
    shutil.copytree(by_name("gpt2_qv").adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace("bases/gpt2", "\\ud800"))
    with pytest.raises(DamagedFile, match="Unicode"):
        read_adapter(tmp_path / "adapter")


def test_a_small_file_that_claims_a_huge_tensor_is_refused(tmp_path: Path) -> None:
    import torch

    torch.save({"a.multi_lora_b": torch.zeros(1, 1).expand(10**9, 1)}, tmp_path / "huge.pt")
    with pytest.raises(Unsupported, match="repeats"):
        read_adapter(tmp_path / "huge.pt")


def test_a_vector_on_an_embedding_is_refused(tmp_path: Path) -> None:
    import torch

    base = FIXTURES / "old_peft" / "bases" / "gpt2"
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    torch.save({"transformer.wte.scl": torch.full((rows,), 2.0)}, tmp_path / "vectors.pt")
    ran = run(
        "merge",
        "--base",
        base,
        "--adapter",
        tmp_path / "vectors.pt",
        "--map",
        r"(.+)\.scl=output",
        "--output",
        tmp_path / "o",
    )
    only_complaint(ran, 3, "transformer.wte is an embedding")


def test_the_named_folder_above_an_adapter_is_not_written_into(tmp_path: Path) -> None:
    case = by_name("0.4.0-named-tuned")
    shutil.copytree(case.adapter.parent, tmp_path / "given")
    ran = run(
        "merge", "--base", case.base, "--adapter", tmp_path / "given", "--output", tmp_path / "given" / "x"
    )
    only_complaint(ran, 3, "lies inside the input folder")


@pytest.mark.parametrize("case", [c for c in GOOD if not c.two_sides], ids=lambda case: case.name)
def test_converting_keeps_every_bit_and_is_repeatable(case: AdapterCase, tmp_path: Path) -> None:
    read = read_adapter(case.adapter)
    for name in ("one", "two"):
        convert(read, tmp_path / name, allow_unused=case.unplaced)
    again = read_adapter(tmp_path / "one")
    assert again.format == "peft"
    assert {key: site.vector.tobytes() for key, site in read.sites.items()} == {
        key: site.vector.tobytes() for key, site in again.sites.items()
    }
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "case", [c for c in (*ADAPTERHUB, *RESEARCH) if c.refuse], ids=lambda case: case.name
)
def test_what_no_weight_can_hold_is_refused_by_name(case: AdapterCase, tmp_path: Path) -> None:
    ran = run("merge", "--base", case.base, "--adapter", case.adapter, "--output", tmp_path / "out")
    only_complaint(ran, 3, str(case.adapter), REASONS[case.name])
    assert not (tmp_path / "out").exists()


def test_deberta_of_adapterhub_is_refused() -> None:
    with pytest.raises(Unsupported, match="deberta"):
        read_adapter(by_name("deberta_adapter_model").adapter)


@pytest.mark.parametrize("allowed", [False, True], ids=["strict", "allow_missing"])
def test_a_vector_that_peft_overwrote_while_saving_is_not_guessed(allowed: bool, tmp_path: Path) -> None:
    case = by_name("0.17.1-name-attention-bert-attention")
    with pytest.raises(Refused, match=r"attention.output.dense and .*output.dense were saved under one key"):
        merge(case.base, [case.adapter], tmp_path / "out", recipe=Recipe(allow_missing=allowed))


def test_a_key_that_fits_the_wrong_module_is_caught_by_the_targets(tmp_path: Path) -> None:
    case = by_name("0.17.1-name-attention-bert-trap-attention")
    with pytest.raises(MissingVector, match=r"attention.output.dense"):
        merge(case.base, [case.adapter], tmp_path / "out")


def test_a_file_that_peft_emptied_is_refused() -> None:
    with pytest.raises(Refused, match="no IA3 vector"):
        read_adapter(by_name("0.21.2-data-parallel-outside-default").adapter)


@pytest.mark.parametrize(
    "name", ["0.17.1-name-layer-layer", "0.17.1-name-k-k", "0.17.1-name-ia3-ia3", "0.17.1-name-1-1"]
)
def test_damaged_names_are_restored_when_the_folder_has_another_name_too(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    shutil.copytree(case.adapter, tmp_path / "renamed")
    merge(case.base, [tmp_path / "renamed"], tmp_path / "merged")
    assert near(forward(case, tmp_path / "merged"), case.wanted())


def test_buffers_in_a_whole_state_dict_are_left_out(tmp_path: Path) -> None:
    """GPT-2's causal masks, which transformers saved with the weights until 4.31."""
    import torch

    case = by_name("tango_gpt2_whole")
    state = torch.load(case.adapter, weights_only=True)
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "whole.pt")
    adapter = read_adapter(tmp_path / "whole.pt")
    assert any("attn.bias" in warning for warning in adapter.warnings)
    merge(case.base, [adapter], tmp_path / "merged")
    assert near(forward(case, tmp_path / "merged"), case.wanted())


def test_a_head_of_another_adapter_is_pointed_out(tmp_path: Path) -> None:
    shutil.copytree(by_name("bert_classification").adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    weights = load_file(tmp_path / "adapter" / "adapter.safetensors")
    from safetensors.torch import save_file

    renamed = {key.replace(".task.", ".other."): value for key, value in weights.items()}
    save_file(renamed, tmp_path / "adapter" / "adapter.safetensors")
    file.write_text(json.dumps(config | {"name": "other"}))
    assert any("called task" in warning for warning in read_adapter(tmp_path / "adapter").warnings)


def test_a_level_of_the_path_is_restored_only_by_the_folders_name(tmp_path: Path) -> None:
    """Without it, ``encoder.0`` may as well belong to another model."""
    case = by_name("0.17.1-name-layer-bert-layer")
    shutil.copytree(case.adapter, tmp_path / "renamed")
    with pytest.raises(UnusedVector) as caught:
        merge(case.base, [tmp_path / "renamed"], tmp_path / "merged")
    assert "its folder must have the adapter's name" in caught.value.hint


@pytest.mark.parametrize("base", ["opt", "bert"])
def test_an_adapter_of_another_model_is_not_explained_away(base: str, tmp_path: Path) -> None:
    llama = by_name("0.4.0-llama-default").adapter
    with pytest.raises(UnusedVector):
        merge(FIXTURES / "old_peft" / "bases" / base, [llama], tmp_path / "merged")


def test_restored_names_are_said(tmp_path: Path) -> None:
    case = by_name("0.17.1-name-k-k")
    found = inspect(case.adapter, case.base)
    assert found.plan is not None
    assert any("PEFT removed" in warning and "k_proj" in warning for warning in found.plan.warnings)


def test_other_adapters_in_the_file_are_named_and_left_out() -> None:
    adapter = read_adapter(FIXTURES / "old_peft" / "0.17.1-two-en-en2" / "adapter" / "en")
    assert any("6 vectors of other adapters (en2)" in warning for warning in adapter.warnings)
    assert len(adapter.sites) == 6


def test_a_head_that_no_class_has_is_refused_until_it_may_be_dropped(tmp_path: Path) -> None:
    case = by_name("distilbert_classification")
    ran = run("merge", "--base", case.base, "--adapter", case.adapter, "--output", tmp_path / "out")
    only_complaint(ran, 3, "heads.task.1")
    with pytest.raises(UnusedVector, match="no class of transformers"):
        convert(case.adapter, tmp_path / "peft")


def test_labels_and_kind_of_problem_come_along(tmp_path: Path) -> None:
    case = by_name("bert_multilabel")
    merge(case.base, [case.adapter], tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    head = json.loads((case.adapter / "head_config.json").read_text())
    assert config["label2id"] == head["config"]["label2id"]
    assert config["problem_type"] == "multi_label_classification"
    assert config["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize("name", ["tfew_a_and_b", "tfew_bert_a_and_b"])
def test_vectors_on_both_sides_are_merged_and_refused_for_peft(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    with pytest.raises(Refused, match="both sides"):
        convert(case.adapter, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tfew_bert_a_and_b", "gpt2_vq_output", "bert_classification", "0.17.1-name-k-k", "tango_bloom"]
)
def test_verify_proves_merges_of_every_format(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    merge(case.base, [case.adapter], tmp_path / "merged")
    ran = run("verify", "--base", case.base, "--adapter", case.adapter, "--merged", tmp_path / "merged")
    assert ran.code == 0, ran


def test_a_checkpoint_with_half_of_the_layers_is_not_complete(tmp_path: Path) -> None:
    import torch

    case = by_name("tfew_gated_t5")
    state = torch.load(case.adapter, weights_only=True)
    torch.save({k: v for k, v in state.items() if ".block.1." not in k}, tmp_path / "half.pt")
    with pytest.raises(MissingVector, match=r"block.1"):
        merge(case.base, [tmp_path / "half.pt"], tmp_path / "out")
    merge(case.base, [tmp_path / "half.pt"], tmp_path / "out", recipe=Recipe(allow_missing=True))
    convert(tmp_path / "half.pt", tmp_path / "peft")
    with pytest.raises(MissingVector, match=r"block.1"):
        merge(case.base, [tmp_path / "peft"], tmp_path / "again")


@pytest.mark.skipif(
    not T_FEW.is_file(),
    reason="the authors' T0-3B checkpoint lies beside the repository only where it was fetched",
)
def test_the_checkpoint_of_the_papers_authors_is_what_is_known_of_it() -> None:
    adapter = read_adapter(T_FEW)
    values = [float(v) for site in adapter.sites.values() for v in (site.vector.min(), site.vector.max())]
    assert (adapter.format, len(adapter.sites), adapter.parameters) == ("tfew", 192, 540_672)
    assert (min(values), max(values)) == pytest.approx((-0.78757966, 2.04876447))
    assert sum(int((site.vector < 0).sum()) for site in adapter.sites.values()) == 12
    assert {site.direction for site in adapter.sites.values()} == {"out"}


@pytest.mark.skipif(
    not T_FEW.is_file(),
    reason="the authors' T0-3B checkpoint lies beside the repository only where it was fetched",
)
def test_the_checkpoint_of_the_papers_authors_loads_in_peft_after_conversion(tmp_path: Path) -> None:
    import torch
    from peft import load_peft_weights

    ran = run("convert", T_FEW, "--output", tmp_path / "peft", "--task-type", "SEQ_2_SEQ_LM", "--quiet")
    assert ran.code == 0, ran
    saved = load_peft_weights(str(tmp_path / "peft"), device="cpu")
    original = torch.load(T_FEW, weights_only=True)
    assert len(saved) == len(original)
    for key, value in original.items():
        module = key.removesuffix(".multi_lora_b")
        assert torch.equal(saved[f"base_model.model.{module}.ia3_l"], value), module


def test_inspect_of_safetensors_imports_no_torch() -> None:
    code = (
        "import sys; from ia3_export import inspect; inspect(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code, str(by_name("gpt2_qkv").adapter)], check=True, timeout=60)


def test_two_keys_of_one_vector_are_damage(tmp_path: Path) -> None:
    import torch

    state = torch.load(by_name("tfew_gated_t5").adapter, weights_only=True)
    key = min(state)
    torch.save(state | {f"model.{key}": state[key]}, tmp_path / "twice.pt")
    with pytest.raises(DamagedFile, match="both the output vector"):
        read_adapter(tmp_path / "twice.pt")


def test_old_names_are_restored_before_adapters_are_combined(tmp_path: Path) -> None:
    damaged, whole = by_name("0.17.1-name-k-k"), by_name("0.4.0-llama-default")
    assert any(
        "--base" in warning for warning in combine([damaged.adapter, whole.adapter], tmp_path / "a").warnings
    )
    combine([damaged.adapter, whole.adapter], tmp_path / "b", base=whole.base)
    assert set(read_adapter(tmp_path / "b").sites) == set(read_adapter(whole.adapter).sites)


def test_paths_of_two_classes_are_one_module_when_a_base_is_given(tmp_path: Path) -> None:
    """One adapter was trained on the bare model, the other on a class whose paths begin with "bert."."""
    bare, prefixed = by_name("bert_bare_on_prefixed_base"), by_name("bert_without_head")
    assert bare.base == prefixed.base
    combine([bare.adapter, prefixed.adapter], tmp_path / "both", base=bare.base)
    assert set(read_adapter(tmp_path / "both").sites) == set(read_adapter(prefixed.adapter).sites)


def test_what_convert_wrote_is_above_suspicion(tmp_path: Path) -> None:
    case = by_name("0.17.1-name-k-k")
    convert(case.adapter, tmp_path / "one", base=case.base)
    assert not convert(tmp_path / "one", tmp_path / "two").warnings
