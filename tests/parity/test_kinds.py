"""No false alarm: the right merge of every model kind of the zoo passes the default gates.

Each kind in one dtype here; tools/bench/parity_margins.py runs all of them in all three.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ia3_export import RunSettings, verify
from tests.support import zoo

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

DTYPES = ("bfloat16", "float16", "float32")
#: transformers' own forward mixes float32 into 16 bits and stops.
NEEDS_FLOAT32 = ("deberta",)


def _dtype_of(kind: zoo.Kind) -> str:
    return "float32" if kind.name in NEEDS_FLOAT32 else DTYPES[zoo.KINDS.index(kind) % 3]


@pytest.mark.parametrize("kind", zoo.KINDS, ids=lambda kind: kind.name)
def test_a_right_merge_is_in_parity(kind: zoo.Kind, tmp_path: Path) -> None:
    model = zoo.build(kind, dtype=_dtype_of(kind))
    model.save_pretrained(tmp_path / "base")
    zoo.adapt(model, kind).save_pretrained(tmp_path / "adapter")
    report = verify(tmp_path / "base", [tmp_path / "adapter"], settings=RunSettings(device="cpu"))
    assert report.in_parity, (report.weights, report.steps[0].gates)
    (step,) = report.steps
    assert step.effect_present is not None and 0.9 < step.effect_present < 1.1
    assert step.layers, "modules are observed"
