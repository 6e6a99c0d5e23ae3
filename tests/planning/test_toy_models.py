"""The shapes of PEFT's own IA3 toy models (its ``tests/test_custom_models.py``), rebuilt.

Linear, Conv1D, convolutions.

Each is saved as a bare state dict without a configuration, as research code does it, and must come out with
the bits of ``merge_and_unload`` in every dtype. Convolutions include grouped and square ones in both
directions, which a file cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ia3_export import merge
from tests.support.tensors import read_folder, same

pytestmark = pytest.mark.filterwarnings("ignore")


def _mlp(bias: bool = True) -> Any:
    from torch import nn

    return nn.ModuleDict(
        {
            "lin0": nn.Linear(10, 20, bias=bias),
            "lin1": nn.Linear(20, 2, bias=bias),
            "square": nn.Linear(20, 20),
        }
    )


def _conv1d() -> Any:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return nn.ModuleDict({"emb": nn.Embedding(100, 5), "conv1d": Conv1D(1, 5), "wide": Conv1D(8, 5)})


def _conv2d() -> Any:
    from torch import nn

    return nn.ModuleDict(
        {
            "conv2d": nn.Conv2d(5, 10, 3),
            "square": nn.Conv2d(6, 6, 3),
            "grouped": nn.Conv2d(6, 12, 3, groups=3),
            "depthwise": nn.Conv2d(5, 5, 3, groups=5),
            "lin0": nn.Linear(10, 2),
        }
    )


def _conv3d() -> Any:
    from torch import nn

    return nn.ModuleDict(
        {"conv3d": nn.Conv3d(5, 10, 3), "grouped": nn.Conv3d(4, 8, 2, groups=2), "lin0": nn.Linear(10, 2)}
    )


CASES: list[tuple[str, Callable[[], Any], list[str], list[str]]] = [
    ("linear out", _mlp, ["lin0"], []),
    ("linear in", _mlp, ["lin0"], ["lin0"]),
    ("two linears", _mlp, ["lin0", "lin1"], ["lin1"]),
    ("no bias", lambda: _mlp(bias=False), ["lin0", "lin1"], ["lin0"]),
    ("square linear out", _mlp, ["square"], []),
    ("square linear in", _mlp, ["square"], ["square"]),
    ("conv1d out", _conv1d, ["conv1d", "wide"], []),
    ("conv1d in", _conv1d, ["conv1d", "wide"], ["conv1d", "wide"]),
    ("conv2d out", _conv2d, ["conv2d", "square", "grouped", "depthwise", "lin0"], []),
    (
        "conv2d in",
        _conv2d,
        ["conv2d", "square", "grouped", "depthwise", "lin0"],
        ["conv2d", "square", "grouped", "depthwise", "lin0"],
    ),
    ("conv3d out", _conv3d, ["conv3d", "grouped", "lin0"], ["lin0"]),
    ("conv3d in", _conv3d, ["conv3d", "grouped", "lin0"], ["conv3d", "grouped"]),
]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("make", "targets", "feedforward"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_toy_models_have_pefts_bits(
    tmp_path: Path, make: Callable[[], Any], targets: list[str], feedforward: list[str], dtype: str
) -> None:
    import torch
    from peft import IA3Config, PeftModel, get_peft_model
    from safetensors.torch import save_file

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    model = make().to(kind)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).to(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    tuned = get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=feedforward))
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.4 * torch.randn(parameter.shape, dtype=parameter.dtype)
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = make().to(kind)
    fresh.load_state_dict(state)
    expected = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()

    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    merged = read_folder(tmp_path / "out")
    assert set(merged) == set(expected)
    assert not [name for name in merged if not same(merged[name], expected[name])]
    touched = {name for name in merged if not same(merged[name], state[name])}
    assert {name.rpartition(".")[0] for name in touched} == set(targets)
