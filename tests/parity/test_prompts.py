"""Which inputs greedy decoding starts from, and in which folders a tokenizer lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from ia3_export.parity.runs.greedy import prompts
from ia3_export.parity.runs.inputs import Case, make_cases
from ia3_export.parity.runs.own_inputs import has_tokenizer
from tests.support import zoo


def test_decoding_starts_from_the_first_text_and_from_one_padded_on_the_left() -> None:
    model = zoo.build(next(kind for kind in zoo.KINDS if kind.name == "llama"))
    cases = make_cases(model)
    assert [case.side for case in cases][:3] == ["", "right", "left"]
    assert prompts(cases) == [cases[0], cases[2]]


def test_a_name_that_the_user_gave_says_nothing_of_padding() -> None:
    given = [Case("line 1", {}), Case("call padded on the left: input_ids [1, 3]", {})]
    assert prompts(given) == given[:1]


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("tokenizer.json", True),
        ("vocab.txt", True),
        ("spiece.model", True),
        ("tekken.json", True),
        ("tokenizer_config.json", True),  # ByT5, CANINE: bytes and characters need no vocabulary
        ("merges.txt", False),
        ("special_tokens_map.json", False),
        ("config.json", False),
    ],
)
def test_a_tokenizer_lies_where_its_vocabulary_or_configuration_does(
    tmp_path: Path, name: str, there: bool
) -> None:
    (tmp_path / name).write_text("{}", encoding="utf-8")
    assert has_tokenizer(tmp_path) is there
