"""Which weights have 4 bits: rounding by moments, what each costs, and the mixes that are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ia3_export.onnx.blocks import decode, encode
from ia3_export.onnx.calibration import Moments
from ia3_export.onnx.mix_page import mix_page
from ia3_export.onnx.mixing import Aim, Calibrated, find_choices
from ia3_export.onnx.precision import choose_bits, convert_precision
from ia3_export.onnx.replaceable import loss_of, open_replaceable
from ia3_export.onnx.rounding import encode_nearest

pytestmark = pytest.mark.filterwarnings("ignore")

#: A table, two products of which the second weighs ten times as much, and a tied head.
GRAPH = """
g (int64[n, m] input_ids, int64[n, m] attention_mask) => (float[n, m, 320] logits) {
  x = Gather(embedding, input_ids)
  a = MatMul(x, small)
  b = MatMul(x, large)
  c = Add(a, b)
  h = Tanh(c)
  head = Transpose <perm = [1, 0]> (embedding)
  logits = MatMul(h, head)
}
"""


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _write(path: Path) -> Path:
    weights = {"embedding": _random(320, 64), "small": 0.01 * _random(64, 64), "large": 0.1 * _random(64, 64)}
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {GRAPH}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    onnx.save(model, path)
    return path


def _feeds() -> list[dict[str, Any]]:
    ids = np.arange(400).reshape(4, 100) % 320
    return [{"input_ids": row[None], "attention_mask": np.ones((1, 100), np.int64)} for row in ids]


@pytest.fixture
def graph(tmp_path: Path) -> Calibrated:
    return Calibrated(_write(tmp_path / "model.onnx"), _feeds())


def test_rounding_by_moments_makes_products_nearer_and_keeps_every_code_within_a_step() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((500, 100)).astype(np.float32) @ (np.eye(100) + 0.2 * _random(100, 100))
    inputs = inputs.astype(np.float32)
    matrix = 0.05 * _random(80, 100)
    moments = inputs.T @ inputs / np.float32(len(inputs))
    known, unknown = encode_nearest(matrix, moments), encode_nearest(matrix, None)
    fresh = rng.standard_normal((500, 100)) @ (np.eye(100) + 0.2 * _random(100, 100))
    errors = [
        float((((decode(codes, 100) - matrix) @ fresh.T) ** 2).mean())
        for codes in (known, unknown, encode(matrix, 4))
    ]
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]
    for codes in (known, unknown):
        steps = np.repeat(codes.scales, 32, axis=1)[:, :100]
        assert (abs(decode(codes, 100) - matrix) <= 1.001 * steps).all()


def test_moments_are_those_of_the_attended_activations(graph: Calibrated) -> None:
    feed = dict(graph.feeds[0])
    feed["attention_mask"] = feed["attention_mask"].copy()
    feed["attention_mask"][0, 50:] = 0
    table = next(t for t in onnx.load(graph.path).graph.initializer if t.name == "embedding")
    rows = onnx.numpy_helper.to_array(table)[feed["input_ids"][0, :50]]
    moments = Moments(graph.path, [feed], {"x": 64, "h": 64})
    assert moments.of("h") is not None and moments.of("logits") is None
    np.testing.assert_allclose(moments.of("x"), rows.T @ rows / 50, rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in graph.path.parent.iterdir()) == ["model.onnx"]


def test_a_weight_costs_what_replacing_it_alone_costs(graph: Calibrated) -> None:
    choices = {choice.name: choice for choice in find_choices(graph, lambda _: None)}
    assert sorted(choices) == ["embedding", "large", "small"]
    # ten times the weight, a hundred times the loss
    assert 30 < choices["large"].loss / choices["small"].loss < 300
    whole = open_replaceable(graph.path, graph.feeds[:1])
    large = decode(choices["large"].narrow, 64).T
    assert choices["large"].loss == pytest.approx(whole.loss({"large": large}), rel=1e-5)
    assert whole.loss({}) == 0


def test_mixes_meet_a_loss_or_a_size(graph: Calibrated, tmp_path: Path) -> None:
    def made(aim: Aim) -> tuple[int, float, set[str]]:
        mix = choose_bits([graph], aim, lambda _: None)
        target = tmp_path / "target.onnx"
        convert_precision(graph.path, target, "int4", mix.codes["model"])
        names = {t.name for t in onnx.load(target).graph.initializer}
        return target.stat().st_size, mix.loss, {n.removesuffix("_Q4") for n in names if n.endswith("_Q4")}

    widest, narrowest = made(Aim(loss=0)), made(Aim(loss=np.inf))
    assert (widest[2], narrowest[2]) == (set(), {"embedding", "large", "small"})
    assert widest[1] < narrowest[1] and widest[0] > narrowest[0]
    between = made(Aim(loss=0.5 * (widest[1] + narrowest[1])))
    assert "small" in between[2] and len(between[2]) < 3
    assert between[1] <= 0.5 * (widest[1] + narrowest[1])
    for budget in (widest[0] - 1, between[0], narrowest[0]):
        assert made(Aim(size=budget))[0] <= budget
    assert made(Aim(size=widest[0] + 5000)) == widest
    assert made(Aim(size=1)) == narrowest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "target.onnx"]


def test_the_page_has_every_mix_and_every_weight(graph: Calibrated) -> None:
    mix = choose_bits([graph], Aim(loss=0.01), lambda _: None)
    shown = mix_page(mix).decode()
    assert shown.count("<circle") == len(mix.tried) > 1
    assert shown.count('<circle class="chosen"') == 1
    for choice in mix.order:
        assert f"<td>{choice.name}</td>" in shown


@pytest.mark.parametrize("size", [0.001, 1, 30])
def test_losses_are_divergences_of_logits(size: float) -> None:
    a = size * _random(2, 3, 7)
    b = 1.5 * a[::-1] + 1
    wide = (torch.from_numpy(x.astype(np.float64)).log_softmax(-1) for x in (a, b))
    expected = torch.nn.functional.kl_div(*wide, reduction="none", log_target=True).sum(-1).mean()
    assert loss_of("logits", [a], [b]) == pytest.approx(float(expected), rel=1e-4)
    assert loss_of("logits", [b], [b]) == 0
    assert loss_of("logits", [a * np.nan], [b]) == np.inf


def test_losses_of_other_outputs_are_shares() -> None:
    a, b = _random(2, 3, 7), _random(2, 3, 7)[::-1]
    share = ((a - b) ** 2).sum() / (b**2).sum()
    assert loss_of("last_hidden_state", [a], [b]) == pytest.approx(share, rel=1e-5)
    assert loss_of("last_hidden_state", [a * np.nan], [b]) == np.inf
