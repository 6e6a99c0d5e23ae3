"""A moved vector tried in numbers: random weights through the arithmetic of its kind, live and moved."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ia3_export.fold import Array
from ia3_export.quantization.feed_forward import Feeder, move_vector


def self_check(feeder: Feeder, vector: Array, activation: str | None = None) -> float:
    """Relative difference between the live vector and the moved one, on random numbers through this kind's
    arithmetic.

    `activation` stands between the projection and the vector where there is no gate; without a name it is the
    kind's own. float64 throughout; what remains is the rounding of the factors. Raises `CannotKeep` for a
    vector that cannot move.
    """
    factors, norm = move_vector(feeder, vector), feeder.kind == "norm"
    rng, n, width = np.random.default_rng(0), len(vector), 8
    slices = feeder.stop // n
    x = rng.standard_normal((5, n if norm else width))
    weight = rng.standard_normal(n if norm else (feeder.stop if slices > 1 else n, width))
    bias, down = rng.standard_normal(len(weight)), rng.standard_normal((width, n))
    mixing = np.exp(rng.standard_normal((5, 5)))  # attention: a value stays in its channel
    gate = rng.standard_normal((n, width))
    own = {"squared relu": "relu2", "relu": "relu"}.get(feeder.kind, "silu")
    act = _ACTIVATIONS.get(activation or own, _ACTIVATIONS["tanh"])

    def middle(weight: Array, bias: Array) -> Array:
        if norm:
            return np.asarray(x / np.sqrt(np.mean(x**2, axis=1, keepdims=True)) * weight + bias)
        made = x @ weight.T + bias
        mine = made[:, feeder.start : feeder.stop]
        if feeder.kind == "value":
            return mixing @ mine
        if feeder.kind in ("relu", "squared relu"):
            return act(mine)
        other = made[:, :n] if feeder.start else x @ gate.T
        return act(other) * mine

    live = (middle(weight, bias) * vector.astype("<f8")) @ down.T
    rows = slice(feeder.start, feeder.stop)
    weight, bias = weight.copy(), bias.copy()
    weight[rows] *= factors if norm else factors[:, None]
    bias[rows] *= factors
    moved = middle(weight, bias) @ down.T
    return float(np.linalg.norm(live - moved) / (np.linalg.norm(live) or 1.0))


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda z: np.maximum(z, 0),
    "relu2": lambda z: np.maximum(z, 0) ** 2,
    "tanh": lambda z: np.asarray(np.tanh(z)),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z * 0.5 * (1 + np.tanh(0.7978845608 * (z + 0.044715 * z**3))),
}
