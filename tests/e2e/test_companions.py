"""Tokenizer, chat template, generation and processor settings beside an adapter, written by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.e2e.command import contents, edit_json, merge, only_complaint, run
from tests.e2e.conftest import Tiny

TUNED = "TUNED {{ messages[0]['content'] }}"
Edit = Callable[[Any], object]


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    """The tiny base with a chat template; its embedding has 128 rows, its tokenizer 5 tokens."""
    folder = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = "</s>", "BASE {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


def beside(
    tiny: Tiny, base: Path, folder: Path, edit: Edit = lambda _: None, source: Path | None = None
) -> Path:
    """An adapter with a tokenizer beside it: the base's, edited as training scripts edit it."""
    shutil.copytree(source or tiny.adapter, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    edit(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def add_tokens(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"


def set_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TUNED


def taken(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "ia3_export.json").read_text())["taken_from_adapters"])


def pad_with_eos(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (add_tokens, "added tokens, special tokens"),
        (set_template, "chat template"),
        (pad_with_eos, "special tokens"),
        (lambda t: t.add_tokens(["ia3"]), "added tokens"),
    ],
    ids=["special tokens", "template", "pad token", "tokens"],
)
def test_the_tokenizer_that_was_trained_with_is_taken(
    tiny: Tiny, base: Path, edit: Edit, words: str, tmp_path: Path
) -> None:
    adapter = beside(tiny, base, tmp_path / "tuned", edit)
    ran = merge(base, adapter, tmp_path / "merged")
    assert f"the tokenizer is that of tuned, which differs from the base's in {words}" in ran.stdout
    assert set(taken(tmp_path / "merged")) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    ours, trained = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "merged", adapter))
    text = "<|im_start|> tiny ia3 </s>"
    assert ours(text).input_ids == trained(text).input_ids
    assert ours.special_tokens_map == trained.special_tokens_map
    assert ours.chat_template == trained.chat_template

    merge(base, adapter, tmp_path / "plain", "--tokenizer", "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "plain" / name).read_bytes() == (base / name).read_bytes()
    assert taken(tmp_path / "plain") == {}


def older_form(folder: Path) -> None:
    """The same tokenizer as transformers 4 wrote it.

    More files, the template in the configuration, state of the last call.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    decoder = {str(row["id"]): {"content": row["content"], "special": True} for row in whole["added_tokens"]}
    edit_json(
        folder / "tokenizer_config.json",
        chat_template=template,
        added_tokens_decoder=decoder,
        padding_side="left",
        backend=None,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    special = {
        role: {"content": token, "lstrip": False} for role, token in config.items() if role.endswith("_token")
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


@pytest.mark.parametrize("form", ["copy", "older"])
def test_the_same_tokenizer_in_any_form_says_nothing(
    tiny: Tiny, base: Path, form: str, tmp_path: Path
) -> None:
    adapter = beside(tiny, base, tmp_path / "tuned")
    if form == "older":
        older_form(adapter)
    ran = merge(base, adapter, tmp_path / "merged")
    assert "warning: the tokenizer" not in ran.stdout
    assert taken(tmp_path / "merged") == {}
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes()


def test_ids_beyond_the_embedding_do_not_fit(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    adapter = beside(tiny, base, tmp_path / "tuned", lambda t: t.add_tokens([f"more{i}" for i in range(130)]))
    ran = merge(base, adapter, tmp_path / "merged")
    assert (
        "has ids up to 134 ('more129'), and the output's embedding has 128 rows: the base's are kept"
        in ran.stdout
    )
    assert taken(tmp_path / "merged") == {}
    refused = (
        "merge",
        "--base",
        base,
        "--adapter",
        adapter,
        "--output",
        tmp_path / "no",
        "--tokenizer",
        "adapter",
    )
    only_complaint(run(*refused), 3, "has ids up to 134")


def test_a_template_alone_comes_to_the_bases_tokenizer(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(tiny.adapter, tmp_path / "tuned"))
    (adapter / "chat_template.jinja").write_text(TUNED)
    ran = merge(base, adapter, tmp_path / "merged")
    assert "the chat template is that of tuned" in ran.stdout
    assert taken(tmp_path / "merged") == {"chat_template.jinja": "tuned"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TUNED
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(base))


def test_a_tokenizer_that_is_none_or_brings_code_is_left_beside(
    tiny: Tiny, base: Path, tmp_path: Path
) -> None:
    adapter = beside(tiny, base, tmp_path / "tuned", set_template)
    edit_json(
        adapter / "tokenizer_config.json", auto_map={"AutoTokenizer": ["someone/else--code.Tokenizer", None]}
    )
    assert (
        "names code of its own (auto_map): the base's are kept"
        in merge(base, adapter, tmp_path / "code").stdout
    )
    (adapter / "tokenizer.json").write_text("{")
    assert "the tokenizer beside tuned cannot be read" in merge(base, adapter, tmp_path / "broken").stdout
    (adapter / "tokenizer.json").unlink()
    (adapter / "chat_template.jinja").unlink()
    edit_json(adapter / "tokenizer_config.json", eos_token="tiny", auto_map=None)
    assert "come without a vocabulary: the base's are kept" in merge(base, adapter, tmp_path / "part").stdout
    (adapter / "tokenizer.json").symlink_to(tmp_path / "base" / "tokenizer.json")
    only_complaint(
        run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "no"), 3, "is a link to"
    )


def test_adapters_that_differ_leave_the_bases(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    one = beside(tiny, base, tmp_path / "one", set_template)
    two = beside(tiny, base, tmp_path / "two", add_tokens, tiny.other)
    ran = merge(base, one, tmp_path / "merged", "--adapter", two)
    assert "one and two bring different tokenizers: the base's are kept" in ran.stdout
    assert taken(tmp_path / "merged") == {}
    words = ("merge", "--base", base, "--adapter", one, "--adapter", two, "--tokenizer", "adapter")
    only_complaint(run(*words, "--output", tmp_path / "no"), 3, "one and two bring different tokenizers")
    # one that brings nothing does not disagree
    merge(base, one, tmp_path / "again", "--adapter", tiny.other)
    assert set(taken(tmp_path / "again").values()) == {"one"}
    each = (
        "merge",
        "--base",
        base,
        "--adapter",
        one,
        "--adapter",
        two,
        "--output-per-adapter",
        tmp_path / "each",
    )
    assert run(*each).code == 0
    assert [set(taken(tmp_path / "each" / name).values()) for name in ("one", "two")] == [{"one"}, {"two"}]


def test_asking_for_an_adapters_that_brings_none_is_an_error(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    words = (
        "merge",
        "--base",
        base,
        "--adapter",
        tiny.adapter,
        "--output",
        tmp_path / "no",
        "--tokenizer",
        "adapter",
    )
    only_complaint(run(*words), 3, "no tokenizer, generation or processor settings lie beside adapter")


def test_generation_settings_are_taken_apart_from_the_tokenizer(
    tiny: Tiny, base: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(tiny.adapter, tmp_path / "tuned"))
    edit_json(base / "config.json", eos_token_id=2)
    GenerationConfig(eos_token_id=2, max_new_tokens=9).save_pretrained(base)
    GenerationConfig(eos_token_id=[3, 4], max_new_tokens=9, use_cache=False).save_pretrained(adapter)
    ran = merge(base, adapter, tmp_path / "merged")
    assert (
        "the generation_config.json is that of tuned, which differs from the base's in eos_token_id"
        in ran.stdout
    )
    assert "config.json still says the base's eos_token_id 2" in ran.stdout
    assert taken(tmp_path / "merged") == {"generation_config.json": "tuned"}
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [3, 4]
    GenerationConfig(eos_token_id=2, max_new_tokens=9, use_cache=False).save_pretrained(adapter)
    assert "warning: the generation" not in merge(base, adapter, tmp_path / "same").stdout
    GenerationConfig(eos_token_id=500).save_pretrained(adapter)
    assert (
        "say eos_token_id 500, and the output's embedding has 128 rows"
        in merge(base, adapter, tmp_path / "high").stdout
    )


def test_an_end_that_generation_does_not_know_is_said(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    GenerationConfig(eos_token_id=2).save_pretrained(base)
    ran = merge(base, beside(tiny, base, tmp_path / "tuned", add_tokens), tmp_path / "merged")
    assert (
        "ends a text with '<|im_end|>' (id 6), generation_config.json with 2: generation would not stop there"
        in ran.stdout
    )


def test_processor_settings_count_by_what_they_say(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(tiny.adapter, tmp_path / "tuned"))
    processor = {"size": {"height": 224}, "image_processor_type": "ViTImageProcessor"}
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    newer = {**processor, "image_processor_type": "ViTImageProcessorFast", "device": None, "do_pad": False}
    (adapter / "preprocessor_config.json").write_text(json.dumps(newer))
    merge(base, adapter, tmp_path / "same")
    assert taken(tmp_path / "same") == {}
    (adapter / "preprocessor_config.json").write_text(json.dumps(newer | {"size": {"height": 384}}))
    ran = merge(base, adapter, tmp_path / "merged")
    assert "the processor configuration is that of tuned, which differs from the base's in size" in ran.stdout
    assert taken(tmp_path / "merged") == {"preprocessor_config.json": "tuned"}


def test_inspect_says_it_and_verify_reads_texts_as_the_artifact_does(
    tiny: Tiny, base: Path, tmp_path: Path
) -> None:
    adapter = beside(tiny, base, tmp_path / "tuned", add_tokens)
    assert "the tokenizer is that of tuned" in run("inspect", adapter, "--base", base).stdout
    merge(base, adapter, tmp_path / "merged")
    before = contents(tmp_path)
    (tmp_path / "texts").write_text("<|im_start|> tiny <|im_end|>\n")
    words = ("verify", "--base", base, "--adapter", adapter, "--merged", tmp_path / "merged")
    ran = run(*words, "--text", tmp_path / "texts")
    assert ran.code == 0, ran
    assert "differs from what a merge writes" not in ran.stdout
    report = tmp_path / "report.json"
    assert run(*words, "--text", tmp_path / "texts", "--report", report).code == 0
    assert (
        "length 3" in json.loads(report.read_text())["reference"]["inputs"][0]
    )  # the base's takes nine tokens
    shutil.copy(base / "tokenizer.json", tmp_path / "merged")
    ran = run(*words, "--weights-only")
    assert "the tokenizer differs from what a merge writes" in ran.stdout
    assert before.keys() <= contents(tmp_path).keys()


def test_another_end_of_text_is_no_other_model(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    """What ends a text is never decoded.

    Taken from each model's own settings, two equal models would write different texts.
    """
    adapter = beside(tiny, base, tmp_path / "tuned")
    GenerationConfig(eos_token_id=list(range(3, 128))).save_pretrained(adapter)
    merge(base, adapter, tmp_path / "merged")
    assert taken(tmp_path / "merged") == {"generation_config.json": "tuned"}
    ran = run("verify", "--base", base, "--adapter", adapter, "--merged", tmp_path / "merged", "--json")
    assert ran.code == 0, ran
    assert json.loads(ran.stdout)["steps"][0]["generation"]["tokens"] == 12
