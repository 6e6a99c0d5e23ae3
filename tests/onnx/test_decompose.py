"""Programs that are decomposed node by node compute what torch does, in ONNX Runtime."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ia3_export.onnx.decompose import decomposed_by_node

pytestmark = pytest.mark.filterwarnings("ignore")
Tensor = torch.Tensor


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class _Normalized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6)
        self.norm.running_mean = torch.linspace(-1, 1, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _halves(x: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return one.sigmoid() * other


def _written(x: Tensor) -> Tensor:
    y = x * 3
    y += x
    return y.clamp_(min=0.5)


def _sizes(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * 2, -1) @ torch.ones(3, 2)


def _constant(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.tensor(-2.0)).detach()


def _same_dtype(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.to(torch.float32), (x.to(torch.float64) * 2).to(torch.float32)


def _compared(x: Tensor) -> Tensor:
    return torch.max(x, 1 - x) * ((x > 0) & (x < 1))


NODE_BY_NODE = {
    "batch norm": _Normalized(),
    "several outputs": _Function(_halves),
    "written into what is its own": _Function(_written),
    "sizes": _Function(_sizes),
    "constant": _Function(_constant),
    "output that is an input": _Function(_same_dtype),
    "comparisons": _Function(_compared),
}


def _seen_by_others(x: Tensor) -> Tensor:
    y = x * 3
    first = y[:, :2]
    y += 1
    return y.sum() + first


def _branches(x: Tensor) -> Tensor:
    chosen: Tensor = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))
    return chosen


def _written_in_a_narrower_dtype(x: Tensor) -> Tensor:
    y = x * 3
    y += x.to(torch.float64)
    return y


WHOLE = {
    "written into what others see": _Function(_seen_by_others),
    "written in a narrower dtype": _Function(_written_in_a_narrower_dtype),
    "branches": _Function(_branches),
}


def _check(model: torch.nn.Module, caplog: pytest.LogCaptureFixture, *, whole: bool) -> None:
    import onnxruntime

    sample = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    axes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model.eval(), (sample,), dynamic_shapes=axes, strict=False)
    with caplog.at_level(logging.DEBUG, "ia3_export.onnx.decompose"):
        exported = torch.onnx.export(decomposed_by_node(program), dynamo=True, optimize=False, verbose=False)
    assert ("the whole program is decomposed" in caplog.text) == whole
    assert "nn_module_stack not found" not in caplog.text
    file = io.BytesIO()
    exported.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for rows in (4, 1, 9):
        x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            wanted = model(x)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for mine, theirs in zip(got, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NODE_BY_NODE)
def test_a_program_of_single_nodes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _check(NODE_BY_NODE[name], caplog, whole=False)


@pytest.mark.parametrize("name", WHOLE)
def test_a_program_that_is_decomposed_as_torch_does_it(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _check(WHOLE[name], caplog, whole=True)
