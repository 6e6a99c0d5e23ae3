"""A tiny Llama and its adapters, written once by transformers and PEFT."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.e2e.command import merge
from tests.support import zoo
from tests.support.bad_input import Case

CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n\n# A tiny Llama\n"


@dataclass(frozen=True)
class Tiny:
    """Folders, read-only by agreement: a test that damages one copies it first."""

    base: Path
    """bfloat16, in six shards, with a tokenizer and a card.

    No vector touches the first and the last shard.
    """
    single: Path
    """The same model in float32, in one file, with the configuration alone."""
    adapter: Path
    """IA3 on k_proj, v_proj (output) and down_proj (input)."""
    other: Path
    """IA3 on q_proj, k_proj (output) and down_proj (input), with other values."""
    merged: Path
    """What ``merge`` makes of `base` and `adapter`."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    kind = zoo.by_name("llama")
    other = replace(kind, targets=("q_proj", "k_proj", "down_proj"), feedforward=("down_proj",))
    base = zoo.build(kind, dtype="bfloat16")
    base.save_pretrained(folder / "base", max_shard_size="10KB")
    words = WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "tiny": 4}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text(CARD)
    zoo.build(kind).save_pretrained(folder / "single")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(folder / "adapter")
    zoo.adapt(zoo.build(kind), other, seed=2).save_pretrained(folder / "other")
    assert len(list((folder / "base").glob("*.safetensors"))) == 6
    merge(folder / "base", folder / "adapter", folder / "merged", "--quiet")
    return Tiny(*(folder / name for name in ("base", "single", "adapter", "other", "merged")))


@pytest.fixture
def case(tiny: Tiny, tmp_path: Path) -> Case:
    """Copies of the base and the adapter, to damage."""
    shutil.copytree(tiny.base, tmp_path / "base")
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    return Case(tmp_path)
