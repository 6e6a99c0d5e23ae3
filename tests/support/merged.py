"""Comparing a merged folder with PEFT's answer and with another folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.tensors import same

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

#: What PEFT says where nothing is wrong: it asks transformers for the first, and corrects the second itself.
PEFT_WARNINGS = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
#: What the adapter of `tests.e2e.conftest.Tiny` folds of its base.
FOLDED = {
    f"model.layers.{layer}.{module}.weight"
    for layer in (0, 1)
    for module in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
}
#: The shards of that base without such a tensor.
UNTOUCHED_SHARDS = {"model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors"}


def load(folder: Path) -> Module:
    """The model in `folder` as transformers loads it, in the dtype that it states.

    Nothing may be left over.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    loaded: Module = model
    return loaded


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of the loaded model, from files of whatever kind."""
    return dict(load(folder).state_dict())


def peft_merge(
    base: Path,
    adapters: Sequence[Path],
    *,
    weights: Sequence[float] = (),
    low_cpu_mem_usage: bool = False,
) -> dict[str, Tensor]:
    """PEFT's answer: one adapter after the other, or with `weights` their ``add_weighted_adapter``."""
    from peft import PeftModel

    names = [f"adapter{i}" for i in range(len(adapters))]
    live = PeftModel.from_pretrained(
        load(base), adapters[0], adapter_name=names[0], low_cpu_mem_usage=low_cpu_mem_usage
    )
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        live.load_adapter(adapter, name, low_cpu_mem_usage=low_cpu_mem_usage)
    if weights:
        live.add_weighted_adapter(names, list(weights), "sum")
        names = ["sum"]
    tensors: dict[str, Tensor] = live.merge_and_unload(adapter_names=names).state_dict()
    return tensors


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names whose dtype, shape or bits differ; both must have the same names."""
    assert set(one) == set(other)
    return [name for name in one if not same(one[name], other[name])]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weight files, byte for byte."""
    names = {path.name for path in one.glob("model*")}
    assert names == {path.name for path in other.glob("model*")}
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def sha256(file: Path) -> str:
    """Of its bytes, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def files_below(folder: Path) -> dict[str, Path]:
    """All files of `folder` and its sub-folders, by their names in it."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
