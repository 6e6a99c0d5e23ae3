"""Where the input vector of a projection can be moved: onto the rows of the projection that feeds it.

Quantized weights often have one scale a row (or a group within a row), so that an output vector folds into
the scales without touching a code, and an input vector does not. But ``down(act(gate(x)) * up(x) * l)``
equals the same with ``up``'s rows and bias times l; a ReLU lets a positive l pass; a squared ReLU its root.
Whether that holds is a matter of the model's code and not of its names: a ``down_proj`` may have no gate, a
norm or a clamp before it. So only what ``tools/mlp_kinds.py`` has tried on the real classes of transformers
is moved: its results are ``feed_forward_table.json``, keyed by model type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from ia3_export.fold import Array
from ia3_export.quantization.packed import CannotKeep

#: Components that may stand before the layers of a composed model's own (text) part.
_OWN_PART = frozenset({"model", "transformer", "encoder", "decoder", "language_model", "layers", "h"})


#: What stands between a projection and the vector behind it.
Kind = Literal["gated", "fused gate and up", "relu", "squared relu", "norm", "value"]
#: Those of the table's ways with which no activation function stands there alone.
_KINDS: Mapping[str, Kind] = {
    "gated": "gated",
    "fused": "fused gate and up",
    "norm": "norm",
    "value": "value",
}


@dataclass(frozen=True, slots=True)
class Way:
    """A way out of the table on which a vector moves to the projection whose path ends in `tail`.

    `kind` is one of ``gated``, ``value``, ``plain`` and so on; of the projection's rows the vector gets those
    of part `number`, from 1, of `parts` equal ones.
    """

    kind: str
    number: int
    parts: int
    tail: str


@dataclass(frozen=True, slots=True)
class Feeder:
    """The projection whose output, times l, is the input of the module that has the vector.

    `module` is the path of the projection whose rows (and bias) are scaled, or of the norm whose weight (and
    bias) is: rows ``start:stop``, from 0 or from where the part of a fused projection starts.
    """

    module: str
    start: int
    stop: int
    kind: Kind

    @property
    def only_positive(self) -> bool:
        """Whether every l has to be greater than zero."""
        return self.kind in ("relu", "squared relu")


def find_feeder(
    module: str, length: int, config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
) -> Feeder:
    """The projection that can take the input vector (`length`,) of `module`.

    `config` is the checkpoint's config.json, `shapes` gives every parameter of the checkpoint its dense
    shape, (out, in) for projections, GPT-2's Conv1D too. Raises `CannotKeep` where there is none.
    """
    entry, part = _entry(module, config)
    model_type = part["model_type"]
    for pattern, ways in entry.get("move", {}).items():
        numbers = _match(pattern, module)
        if numbers is None:
            continue
        own = shapes.get(f"{module}.weight", ())
        if len(own) != 2 or own[1] != length:
            raise CannotKeep(f"{module} has no weight with {length} columns")
        names = [_fill(module, way.tail, numbers) for way in ways]
        for way, feeder in zip(ways, names, strict=True):
            if f"{feeder}.weight" in shapes:
                return _check(way, feeder, length, shapes, entry, part)
        raise CannotKeep(f"the checkpoint has no {' or '.join(names)}, which feeds {module}")
    if "reason" in entry and "att" not in module:
        raise CannotKeep(str(entry["reason"]))
    raise CannotKeep(
        f"no projection that could take the vector of {module} is known for model_type {model_type!r}"
    )


def feeding(module: str, config: Mapping[str, Any] | None) -> list[tuple[Way, str]]:
    """The projections that feed `module`, as (way, path); ``[]`` where that has not been reviewed."""
    with suppress(CannotKeep):
        for pattern, ways in _entry(module, config)[0].get("move", {}).items():
            numbers = _match(pattern, module)
            if numbers is not None:
                return [(way, _fill(module, way.tail, numbers)) for way in ways]
    return []


def activation_of(module: str, config: Mapping[str, Any] | None) -> str | None:
    """The activation between the projection that feeds `module` and `module`, where it matters (no gate) and
    is known."""
    with suppress(CannotKeep):
        return _activation(*_entry(module, config))
    return None


def move_vector(feeder: Feeder, vector: Array) -> Array:
    """The factors of the feeder's rows, float32 (float64 for a float64 vector): the vector, or its root for a
    squared ReLU. Raises `CannotKeep` for a vector that cannot move."""
    if feeder.only_positive and not np.all(vector > 0):
        between = "squared ReLU" if feeder.kind == "squared relu" else "ReLU"
        count = int(np.count_nonzero(~(vector > 0)))
        raise CannotKeep(
            f"a {between} lies between, and {count} of the vector's {len(vector)} elements are not positive"
        )
    dtype = "<f8" if vector.dtype == np.dtype("<f8") else "<f4"
    if feeder.kind == "squared relu":
        return np.asarray(np.sqrt(vector.astype("<f8")).astype(dtype))
    return vector.astype(dtype)


def _entry(module: str, config: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The table's entry for the part of the model that `module` lies in, and the config of that part. Raises
    `CannotKeep`."""
    if not config or not isinstance(config.get("model_type"), str):
        raise CannotKeep("config.json names no model_type")
    part, table, first = config, _table(), 0
    steps = _before_number(module)
    for i, step in enumerate(steps):
        key = table.get(part.get("model_type", ""), {}).get("parts", {}).get(step)
        if key is not None and isinstance(part.get(key), Mapping):
            part, first = part[key], i + 1
    if not isinstance(part.get("model_type"), str):
        raise CannotKeep(f"config.json names no model_type for the part of the model that holds {module}")
    entry = table.get(part["model_type"])
    if entry is None:
        raise CannotKeep(f"the feed-forward of model_type {part['model_type']!r} has not been reviewed")
    if entry.get("parts") and not set(steps[first:]) <= _OWN_PART:
        raise CannotKeep(
            f"{module} lies in a part of model_type {part['model_type']!r} that has not been reviewed"
        )
    return entry, part


def _activation(entry: Mapping[str, Any], part: Mapping[str, Any]) -> str | None:
    """The activation's name by the key that the class reads; one that config.json leaves out has its
    default."""
    if "activation" not in entry:
        return None
    key, default = entry["activation"]
    name = part.get(key, default)
    return name.split("-")[-1] if isinstance(name, str) else repr(name)  # T5 writes "gated-gelu"


def _check(
    way: Way,
    feeder: str,
    length: int,
    shapes: Mapping[str, tuple[int, ...]],
    entry: Mapping[str, Any],
    part: Mapping[str, Any],
) -> Feeder:
    """The feeder, once the conditions of its kind hold. Raises `CannotKeep`."""
    kind, shape = way.kind, shapes[f"{feeder}.weight"]
    if shape[0] != way.parts * length or len(shape) != (1 if kind == "norm" else 2):
        if kind == "value":
            raise CannotKeep(
                f"{feeder} has {shape[0]} rows for {length} columns: heads share keys and "
                "values, or are padded"
            )
        raise CannotKeep(f"{feeder} has shape {list(shape)}, which does not fit a vector of {length}")
    attention = part.get("attn_config") or {}
    if kind == "value" and (
        part.get("clip_qkv") or attention.get("clip_qkv") or part.get("num_kv_shared_layers")
    ):
        raise CannotKeep(
            f"config.json has the values of {feeder} clipped or shared (clip_qkv, num_kv_shared_layers)"
        )
    clamped = any(part[key] for key in part if key.startswith("swiglu_limit"))
    if kind in ("gated", "fused") and clamped and not entry.get("clamps_elsewhere"):
        raise CannotKeep(f"config.json has the output of {feeder} clamped (swiglu_limit)")
    start, stop = (way.number - 1) * length, way.number * length
    if kind in ("plain", "relu", "always_relu", "squared"):
        between = {"squared": "relu2", "always_relu": "relu"}.get(kind, _activation(entry, part))
        if between not in ("relu", "relu2") or (kind == "relu" and between == "relu2"):
            raise CannotKeep(f"a {between} lies between {feeder} and the vector, and there is no gate")
        return Feeder(feeder, start, stop, "squared relu" if between == "relu2" else "relu")
    return Feeder(feeder, start, stop, _KINDS[kind])


def _before_number(module: str) -> list[str]:
    steps = module.split(".")
    return steps[: next((i for i, step in enumerate(steps) if step.isdigit()), 0)]


def _match(pattern: str, module: str) -> list[str] | None:
    """The numbers that stand for the stars where `module` behind its first number is `pattern`."""
    steps, expected = module.split(".")[len(_before_number(module)) + 1 :], pattern.split(".")
    if len(steps) != len(expected):
        return None
    if not all(
        step.isdigit() if want == "*" else step == want for step, want in zip(steps, expected, strict=True)
    ):
        return None
    return [step for step, want in zip(steps, expected, strict=True) if want == "*"]


def _fill(module: str, tail: str, numbers: list[str]) -> str:
    """`tail` with the numbers of `module` for its stars, behind the same first number."""
    remaining = iter(numbers)
    behind = [next(remaining, "*") if step == "*" else step for step in tail.split(".")]
    return ".".join([*module.split(".")[: len(_before_number(module)) + 1], *behind])


def read_table() -> dict[str, Any]:
    """The table as ``tools/mlp_kinds.py`` wrote it: what is known of each model type."""
    text = (files("ia3_export.quantization") / "feed_forward_table.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["model_types"])


@cache
def _table() -> dict[str, Any]:
    """The reviewed model types, ``move`` with the ways of each pattern of paths."""
    return {
        model_type: entry
        | {"move": {pattern: [*map(_read_way, ways)] for pattern, ways in entry.get("move", {}).items()}}
        for model_type, entry in read_table().items()
    }


def _read_way(text: str) -> Way:
    """``gated up_proj``; ``fused:2/2 gate_up_proj`` is the second half of the rows."""
    word, tail = text.split()
    kind, _, place = word.partition(":")
    number, parts = map(int, place.split("/")) if place else (1, 1)
    return Way(kind, number, parts, tail)
