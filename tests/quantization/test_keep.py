"""``--quantized keep``: the vectors in the scales, no code touched, the function that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ia3_export import OutputOptions, Recipe, merge
from ia3_export.adapters.model import Fold
from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.checkpoint.header import read_bytes
from ia3_export.errors import Refused
from ia3_export.fold import make_scale
from ia3_export.planning.keep_quantized import keep_codes
from ia3_export.planning.quantized_placement import WeightFolds
from ia3_export.quantization.base import read_base
from tests.support.quantized import CASES, FIXTURES, dense_model, logits, unmerged_logits, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

#: Formats whose scales share rows, are powers of two or 8-bit floats: nothing of them can be kept.
_NEVER = {
    "ct-fp8-block": "rows share a scale",
    "ct-nvfp4": "8-bit floats",
    "ct-mxfp4": "powers of two",
    "ct-mxfp8": "powers of two",
    "ct-nvfp4-static": "8-bit floats",
    "fp8-block64": "rows share a scale",
    "fp8-block128": "whole tensor",
    "fp8-ragged": "rows share a scale",
    "fp8-ue8m0": "powers of two",
    "fp8-tensor": "whole tensor",
    "torchao-float8-tensor": "whole tensor",
    "hqq-4bit-axis0-g64": "groups run down the rows",
    "hqq-3bit-axis0-g32": "groups run down the rows",
    "gpt2-bnb-nf4": "gelu",
    "gpt2-bnb-int8": "gelu",
}
_FOLDS = (Fold("adapter", "model.layers.0.self_attn.o_proj", "out"),)
#: Largest relative error of the logits, by the dtype of a format's scales.
_BOUNDS = {
    **dict.fromkeys(("bnb-", "ct-fp8-", "ct-int8", "ct-w4a16-channel", "ct-w8a16"), 1e-6),
    "mxfp4-gpt-oss": 1.5e-2,
    "quanto-qint2": 1.2e-2,  # bfloat16 scales and shifts that nearly cancel
    "quanto-qint4-grouped": 1.2e-2,
    "quanto-": 1.5e-3,
    "gptq-asym-wrap": 1e-3,  # every third row is positive throughout
    "torchao-intx": 3e-3,
    "torchao-": 1e-6,
    "hqq-4bit-native-fp16": 1.5e-3,
    "hqq-": 1e-6,
    "": 3.3e-4,
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An adapter for the model of a fixture; one for all models of the same shape."""
    folder = tmp_path_factory.mktemp("adapters")

    def made(case: str) -> Path:
        config = _config(case)
        sizes = ("intermediate_size", "hidden_size", "head_dim", "num_key_value_heads", "vocab_size")
        key = "-".join(str(config.get(name)) for name in ("model_type", *sizes))
        return folder / key if (folder / key).exists() else write_adapter(folder / key, config)

    return made


def _config(case: str) -> dict[str, Any]:
    return dict(json.loads((FIXTURES / case / "config.json").read_text()))


def _relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("case", [case for case in CASES if case not in _NEVER])
def test_kept_is_what_was_trained(case: str, adapters: Callable[[str], Path], tmp_path: Path) -> None:
    merge(FIXTURES / case, [adapters(case)], tmp_path / "out", recipe=Recipe(quantized="keep"))
    error = _relative(logits(dense_model(tmp_path / "out")), unmerged_logits(FIXTURES / case, adapters(case)))
    assert error <= next(bound for prefix, bound in _BOUNDS.items() if case.startswith(prefix))
    control = _relative(
        logits(dense_model(FIXTURES / case)), unmerged_logits(FIXTURES / case, adapters(case))
    )
    assert control > 0.02, "the adapter does nothing, so the test proves nothing"


@pytest.mark.parametrize("case", [case for case in CASES if case not in _NEVER])
def test_no_code_and_no_other_tensor_is_touched(
    case: str, adapters: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = merge(
        FIXTURES / case, [adapters(case)], tmp_path / "out", recipe=Recipe(quantized="keep")
    ).content
    base, out = read_checkpoint(FIXTURES / case), read_checkpoint(tmp_path / "out")
    changed = {row["tensor"] for row in manifest["changes"]}
    assert base.tensors.keys() - set(manifest["quantization"]["dropped"]) == out.tensors.keys()
    for name, tensor in out.tensors.items():
        if name not in changed:
            assert read_bytes(tensor) == read_bytes(base.tensors[name]), name
        else:
            assert tensor.dtype in ("F32", "F16", "BF16") or ".quant_state." in name, f"{name} holds codes"
    # un-nested scales: 8 bits become 32 for every 64 weights of the touched modules; scales by
    # row instead of one
    grows = ("bnb-nf4-double", "bnb-nf4-damaged", "ct-fp8", "ct-int8", "channel", "ct-mixed")
    assert out.nbytes <= base.nbytes * (1.06 if any(word in case for word in grows) else 1.0)


@pytest.mark.parametrize("case", sorted(_NEVER))
def test_what_cannot_be_kept_is_refused_and_says_why(
    case: str, adapters: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(Refused) as raised:
        merge(FIXTURES / case, [adapters(case)], tmp_path / "out", recipe=Recipe(quantized="keep"))
    sites = [str(raised.value)]
    assert any(_NEVER[case] in text for text in sites), sites
    assert "keep-or-dense" in raised.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", sorted(_NEVER))
def test_keep_or_dense_writes_what_cannot_be_kept_dense(
    case: str, adapters: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = merge(
        FIXTURES / case, [adapters(case)], tmp_path / "out", recipe=Recipe(quantized="keep-or-dense")
    ).content
    error = _relative(logits(dense_model(tmp_path / "out")), unmerged_logits(FIXTURES / case, adapters(case)))
    assert error <= 4e-3  # 16-bit weights
    outcomes = {site["outcome"] for site in manifest["quantization"]["sites"]}
    assert "dense" in outcomes
    out = read_checkpoint(tmp_path / "out")
    assert out.nbytes < 3 * read_checkpoint(FIXTURES / case).nbytes


@pytest.mark.parametrize("case", CASES)
def test_dequantized_is_what_was_trained(case: str, adapters: Callable[[str], Path], tmp_path: Path) -> None:
    merge(FIXTURES / case, [adapters(case)], tmp_path / "out", recipe=Recipe(dtype="float32"))
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    error = _relative(logits(dense_model(tmp_path / "out")), unmerged_logits(FIXTURES / case, adapters(case)))
    assert error <= 1e-6


@pytest.mark.parametrize(
    ("case", "dtype"), [("gptq-4bit-g32", None), ("ct-w4a16-g32-sym", "F32"), ("bnb-nf4", "F32")]
)
def test_scales_that_would_leave_their_dtype_are_widened_or_refused(
    case: str, dtype: str | None, adapters: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = shutil.copytree(adapters(case), tmp_path / "adapter")
    vectors = load_file(adapter / "adapter_model.safetensors")
    key = next(name for name in vectors if "k_proj" in name)
    vectors[key].reshape(-1)[3] = 1e-6
    save_file(vectors, adapter / "adapter_model.safetensors", {"format": "pt"})
    if dtype is None:
        with pytest.raises(Refused, match="leaves the range of float16"):
            merge(FIXTURES / case, [adapter], tmp_path / "out", recipe=Recipe(quantized="keep"))
        return
    merge(
        FIXTURES / case,
        [adapter],
        tmp_path / "out",
        recipe=Recipe(quantized="keep"),
        options=OutputOptions(reload_check="none"),
    )
    out = read_checkpoint(tmp_path / "out")
    scales = [
        t.dtype
        for name, t in out.tensors.items()
        if "k_proj" in name and ("scale" in name or "absmax" in name)
    ]
    assert scales == [dtype]
    error = _relative(logits(dense_model(tmp_path / "out")), unmerged_logits(FIXTURES / case, adapter))
    assert error <= 3.3e-4


def test_vectors_of_a_weight_are_all_kept_or_none() -> None:
    base = read_base(FIXTURES / "gptq-4bit-g32")
    packed = base.quantization.packed["model.layers.0.self_attn.o_proj.weight"]
    rows, columns = packed.shape
    out = make_scale(np.full(rows, 2, "<f4"), packed.shape, "out", "linear")
    into = make_scale(np.full(columns, 2, "<f4"), packed.shape, "in", "linear")
    kept = keep_codes([WeightFolds(packed, (out,), _FOLDS)], base, or_dense=False)
    assert [o.kind for o in kept.outcomes] == ["exact"] and kept.changes.keys() == {f"{packed.module}.scales"}
    kept = keep_codes([WeightFolds(packed, (out, into), _FOLDS)], base, or_dense=False)
    assert [o.kind for o in kept.outcomes] == ["refused"] and not kept.changes and not kept.warnings
    assert "heads share keys and values" in kept.outcomes[0].reason
    kept = keep_codes([WeightFolds(packed, (out, into), _FOLDS)], base, or_dense=True)
    assert [o.kind for o in kept.outcomes] == ["dense"] and kept.changes.keys() == {packed.name}
    assert f"{packed.module}.scales" in kept.drops
