"""Layers of one kind are traced once, and only those."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ia3_export.onnx.layers import RepeatedLayers, find_repeated
from tests.support import zoo
from tests.support.exported import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")


def _layer(**attributes: Any) -> Any:
    """A layer with a linear module, a scale and a cache of its own."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.scale = 1.0
            self.index = 0
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self, hidden: Any, shared: Any = None, cache: Any = None) -> Any:
            hidden = self.linear(hidden) * self.scale
            if shared is not None:
                hidden = hidden + shared
            if cache is not None:
                keys, _ = cache.update(hidden[:, None], hidden[:, None], self.index)
                hidden = hidden + keys.sum(2)
            return hidden

    return Layer()


def _found(layers: list[Any], *shared: Any, cache: Any = None) -> list[RepeatedLayers]:
    import torch

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})

    def forward() -> None:
        hidden = torch.ones(2, 3, 4)
        for i, layer in enumerate(layers):
            hidden = layer(hidden, shared[i % len(shared)] if shared else None, cache)

    with torch.no_grad():
        return find_repeated(model, forward)


def _repeated(*numbers: int) -> RepeatedLayers:
    first, *others = [(f"layers.{i}", None) for i in numbers]
    return RepeatedLayers(first, tuple(others))


def test_layers_that_do_the_same_are_one_kind_whatever_their_parameters() -> None:
    assert _found([_layer(index=i) for i in range(3)]) == [_repeated(0, 1, 2)]


def test_a_layer_without_another_of_its_kind_is_not_listed() -> None:
    assert _found([_layer()]) == []
    assert _found([_layer(), _layer(scale=0.5)]) == []


def test_another_number_is_another_kind() -> None:
    """As GPT-2's ``scale_attn_by_inverse_layer_idx``."""
    scales = [1.0, 0.5, 1.0, 0.5]
    assert _found([_layer(scale=scale) for scale in scales]) == [_repeated(0, 2), _repeated(1, 3)]


def test_an_attribute_that_makes_no_difference_to_the_sample_is_another_kind() -> None:
    """A window that is longer than the sample."""
    windows = [8, None, 8, None]
    assert _found([_layer(window=window) for window in windows]) == [_repeated(0, 2), _repeated(1, 3)]


def test_a_tensor_from_elsewhere_must_be_the_same_unless_it_is_an_argument() -> None:
    import torch

    one, two = torch.ones(4), torch.ones(4)
    assert _found([_layer(), _layer()], one, two) == [_repeated(0, 1)]
    layers = [_layer(outside=outside) for outside in (one, two, one)]
    for layer in layers:
        layer.forward = lambda hidden, *_, layer=layer: layer.linear(hidden) + layer.outside
    assert _found(layers) == [_repeated(0, 2)]


def test_a_tied_parameter_is_its_own_kind_unless_all_share_it() -> None:
    layers = [_layer() for _ in range(4)]
    layers[3].linear.weight = layers[2].linear.weight
    assert _found(layers) == [_repeated(0, 1), _repeated(2, 3)]


def test_what_is_called_twice_or_writes_elsewhere_is_traced() -> None:
    layer = _layer()
    assert _found([layer, layer]) == []
    layers = [_layer(), _layer()]
    for layer in layers:
        layer.forward = lambda hidden, *_: hidden.add_(1)
    assert _found(layers) == []


def test_each_layer_has_its_entry_of_the_cache() -> None:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(2):
        cache.update(torch.ones(2, 1, 5, 4), torch.ones(2, 1, 5, 4), i)
    found = _found([_layer(index=0), _layer(index=1)], cache=cache)
    assert found == [RepeatedLayers(("layers.0", 0), (("layers.1", 1),))]
    # an entry that is begun in the layer was no tensor before it
    assert _found([_layer(index=0), _layer(index=1)], cache=DynamicCache()) == []


def test_layers_inside_of_repeated_ones_are_not_listed() -> None:
    import torch

    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(2)]
    for block in blocks:
        block.append(torch.nn.Linear(4, 4))
    model = torch.nn.Sequential(*blocks)
    assert find_repeated(model, lambda: model(torch.ones(1, 4))) == [
        RepeatedLayers(("0", None), (("1", None),))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "file", "kinds"),
    [
        ("gemma2", {"num_hidden_layers": 4}, "model", 2),
        ("t5", {"num_decoder_layers": 3}, "decoder_model_merged", 1),
    ],
)
def test_the_graph_is_that_of_all_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: dict[str, Any], file: str, kinds: int
) -> None:
    """Same operators, same weights, same numbers as when every layer is traced."""
    import numpy as np
    import onnx_ir
    import onnxruntime

    from ia3_export.onnx import trace as tracing
    from ia3_export.onnx.contract import plan_graphs
    from ia3_export.onnx.tasks import TASKS
    from ia3_export.parity.runs.inputs import sample_inputs

    kind = KINDS[name]
    model = zoo.build(replace(kind, config={**kind.config, **config}))
    task = TASKS["text-generation" if file == "model" else "text2text-generation"]
    spec = next(s for s in plan_graphs(model, task, sample_inputs(model), "merged", None) if s.file == file)
    found = []

    def counted(*args: Any) -> list[RepeatedLayers]:
        found.extend(find_repeated(*args))
        return list(found)

    monkeypatch.setattr(tracing, "find_repeated", counted)
    once = tracing.trace(model, spec, 20)
    monkeypatch.setattr(tracing, "find_repeated", lambda *_: [])
    whole = tracing.trace(model, spec, 20)
    assert len(found) == kinds
    assert Counter(n.op_type for n in once.graph) == Counter(n.op_type for n in whole.graph)
    weights = [
        {k: v.const_value.tobytes() for k, v in m.graph.initializers.items() if k.endswith("weight")}
        for m in (once, whole)
    ]
    assert weights[0] == weights[1] and len(weights[0]) > 20
    inputs = {p.name: t[:1].numpy() for p, t in zip(spec.inputs, spec.samples, strict=True)}
    answers = []
    for model_ir in (once, whole):
        onnx_ir.save(model_ir, tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        answers.append(session.run(None, inputs))
    assert len(answers[0]) == len(spec.outputs)
    for one, two in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, two)
