"""Merging on every model kind of the zoo: bit-identical to PEFT, byte-identical elsewhere, loads complete.

Bases are written by transformers' ``save_pretrained``, adapters by PEFT's. The reference is PEFT's
``merge_and_unload`` in the stored dtype, saved by transformers; where PEFT cannot merge, its
unmerged forward.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ia3_export import merge
from tests.support import zoo
from tests.support.tensors import read_folder, same

DTYPES = ("float32", "bfloat16", "float16")


def _dtype_of(kind: zoo.Kind) -> str:
    """Each kind is tried in one dtype, spread over the table so that all three occur."""
    return DTYPES[[k.name for k in zoo.KINDS].index(kind.name) % 3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", zoo.KINDS, ids=lambda kind: kind.name)
def test_a_merge_has_pefts_bits_and_nothing_else_changes(kind: zoo.Kind, tmp_path: Path) -> None:
    import torch
    import transformers
    from peft import PeftModel

    dtype = _dtype_of(kind)
    model = zoo.build(kind, dtype=dtype)
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    model.save_pretrained(base)
    zoo.adapt(model, kind).save_pretrained(adapter)

    merge(base, [adapter], output)

    cls = getattr(transformers, kind.model_class)
    loaded, report = cls.from_pretrained(output, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    before, merged = read_folder(base), read_folder(output)
    assert set(before) <= set(merged)
    changed = {name for name in merged if name not in before or not same(before[name], merged[name])}
    assert changed, "the adapter must change something"

    live = PeftModel.from_pretrained(cls.from_pretrained(base, dtype=getattr(torch, dtype)), adapter).eval()
    if kind.peft_merge is None:
        live.merge_and_unload().save_pretrained(tmp_path / "reference")
        reference = read_folder(tmp_path / "reference")
        assert set(reference) == set(merged)
        different = [
            n for n in merged if merged[n].dtype == reference[n].dtype and not same(merged[n], reference[n])
        ]
        assert not different
        # transformers keeps a few tensors in float32 whatever the file says, and PEFT folds them there
        widened = [n for n in merged if merged[n].dtype != reference[n].dtype]
        for name in widened:
            rounded = reference[name].to(merged[name].dtype)
            assert same(merged[name], rounded), name
    else:
        inputs = zoo.example_inputs(loaded)
        with torch.no_grad():
            expected, got = live(**inputs)[0], loaded.eval()(**inputs)[0]
        tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )
