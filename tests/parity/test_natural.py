"""Made-up inputs are what a model would see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ia3_export.parity.runs import natural
from ia3_export.parity.runs.inputs import Case, make_cases
from ia3_export.parity.runs.natural import CONTINUED, RANDOM, SENTENCES
from tests.support import zoo
from tests.support.exported import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")


def _model(name: str) -> Any:
    kind = KINDS[name]
    return zoo.build(replace(kind, config={**kind.config, "vocab_size": 300})).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte for a token, and a chat template."""
    from transformers import ByT5Tokenizer

    made = ByT5Tokenizer(extra_ids=0)
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    return made


@pytest.fixture(scope="module")
def decoder() -> Any:
    """A language model with strong opinions."""
    model = _model("llama")
    model.lm_head.weight.data *= 30
    return model


def _rows(cases: list[Case]) -> list[Any]:
    return [
        row[mask.bool()]
        for case in cases
        for row, mask in zip(case.tensors["input_ids"], case.tensors["attention_mask"], strict=True)
    ]


def test_a_language_model_writes_its_inputs_itself(decoder: Any, tokenizer: Any) -> None:
    cases = make_cases(decoder, tokenizer=tokenizer)
    assert {case.origin for case in cases} == {CONTINUED}
    for row in _rows([case for case in cases if case.tensors["input_ids"].shape[1] < 20]):
        with torch.no_grad():
            logits = decoder(row[None]).logits[0, 4:-1]
        logits[:, decoder.generation_config.eos_token_id] = -torch.inf  # nothing ends early
        likely = logits.softmax(-1)
        chosen = likely.gather(-1, row[5:, None])
        before = likely.where(likely > chosen, 0).sum(-1)
        assert (before < 0.96).all()  # what is likelier than a sampled token has less than top_p


def test_it_goes_on_from_sentences_and_in_a_chat(decoder: Any, tokenizer: Any) -> None:
    cases = make_cases(decoder, tokenizer=tokenizer)
    assert {case.origin for case in cases} == {CONTINUED}
    texts = [tokenizer.decode(row[:40].clamp(max=258)) for row in _rows(cases)]
    assert texts[0].startswith("The r") and texts[1].startswith("How l")
    longest = max(texts, key=len)
    assert longest.startswith("user: How long does it take for")


def test_another_model_gets_sentences(tokenizer: Any) -> None:
    model = _model("bert-masked-lm")
    cases = make_cases(model, tokenizer=tokenizer)
    assert {case.origin for case in cases} == {SENTENCES}
    end = tokenizer.eos_token_id
    for row in _rows(cases):
        text = tokenizer.decode(row[:-1])
        assert any(sentence.startswith(text[:20]) for sentence in natural._TEXTS) and row[-1] == end


def test_without_a_tokenizer_of_its_own_the_ids_are_random(decoder: Any, tokenizer: Any) -> None:
    assert {case.origin for case in make_cases(decoder)} == {RANDOM}
    model = _model("bert-masked-lm")
    assert {case.origin for case in make_cases(model)} == {RANDOM}
    small = _model("bert-masked-lm")
    small.config.vocab_size = 50
    assert {case.origin for case in make_cases(small, tokenizer=tokenizer)} == {RANDOM}


def test_a_seed_gives_the_same_inputs(decoder: Any, tokenizer: Any) -> None:
    ids = [
        [case.tensors["input_ids"].tolist() for case in make_cases(decoder, seed=s, tokenizer=tokenizer)]
        for s in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_a_decoder_of_an_encoder_is_given_what_it_wrote(tokenizer: Any) -> None:
    model = _model("t5")
    cases = make_cases(model, tokenizer=tokenizer)
    assert {case.origin for case in cases} == {SENTENCES}
    for case in cases:
        assert (case.tensors["decoder_input_ids"][:, 0] == model.config.decoder_start_token_id).all()
