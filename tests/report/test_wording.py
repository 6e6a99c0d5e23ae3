"""The words that the writers of reports share."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ia3_export.report.model import Distance, Generation
from ia3_export.report.wording import (
    IN_JUNIT,
    IN_TABLE,
    METRICS,
    ON_PAGE,
    ON_TERMINAL,
    DecodingWords,
    generation_in_words,
)


def test_every_metric_has_a_name() -> None:
    assert list(METRICS) == [field.name for field in fields(Distance)]
    assert METRICS["kl"].short == "KL, mean (nats)" and METRICS["cosine"].short == "cosine"


@pytest.mark.parametrize(
    ("words", "equal", "excused", "unexplained"),
    [
        (
            ON_PAGE,
            "12 tokens x 2 sequences: all equal",
            "12 tokens x 2 sequences: first differs at token 3 (counted from 0), where the reference's "
            "margin 0.995 is within rounding: excused",
            "12 tokens x 2 sequences: first differs at token 3 (counted from 0), where the reference's "
            "margin 0.995 is more than rounding explains",
        ),
        (
            ON_TERMINAL,
            "greedy decoding of 12 tokens after each of 2 inputs: all equal",
            "greedy decoding of 12 tokens after each of 2 inputs: differs from token 3 on, by a margin of "
            "0.995, which rounding explains",
            "greedy decoding of 12 tokens after each of 2 inputs: differs from token 3 on, by a margin of "
            "0.995, which rounding does not explain",
        ),
        (
            IN_JUNIT,
            "2 sequences, 12 tokens: all agree",
            "2 sequences, 12 tokens: token 3 differs, margin of the reference 0.995, within what rounding "
            "may decide",
            "2 sequences, 12 tokens: token 3 differs, margin of the reference 0.995",
        ),
        (IN_TABLE, "all agree", "differs at token 3", "differs at token 3"),
    ],
)
def test_what_each_writer_says_of_greedy_decoding(
    words: DecodingWords, equal: str, excused: str, unexplained: str
) -> None:
    assert generation_in_words(Generation(12, 2, None, None, True), words) == equal
    assert generation_in_words(Generation(12, 2, 3, 0.995, True), words) == excused
    assert generation_in_words(Generation(12, 2, 3, 0.995, False), words) == unexplained
