"""Static scales of activations, and what vectors do to them.

A checkpoint that was calibrated holds one number for the inputs of a projection (``o_proj.input_scale``), for
its outputs, and for a quantized key-value cache. A vector on the output of a projection changes the range of
whatever it feeds: values reach the attention's output projection as weighted means, the linear half of a
gated feed-forward reaches its last layer as a factor, so that the range grows by the vector's largest
magnitude at most. Behind an activation function it cannot be known without calibrating again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.adapters.model import Fold
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.fold import Array
from ia3_export.quantization.feed_forward import activation_of, feeding
from ia3_export.quantization.packed import Packed, read_flat

#: Leaves of a module with the scale of its inputs. compressed-tensors' global scale of NVFP4 divides, all
#: others multiply.
INPUT_SCALES = ("input_scale", "activation_scale", "qscale_act", "input_global_scale")
#: A leaf with the scale of its outputs.
_OUTPUT_SCALE = "output_scale"
#: Scales of a quantized cache, beside the attention's projections; and the projections whose outputs they
#: fit.
CACHE_SCALES = {"k_scale": "k_proj", "v_scale": "v_proj"}
#: All leaves that a quantized cache or attention has beside its projections.
_OF_CACHE = (
    *CACHE_SCALES,
    "q_scale",
    "kv_scale",
    "prob_scale",
    "k_zero_point",
    "v_zero_point",
    "q_zero_point",
)
#: Methods that write such scales although activations are not quantized.
_NOT_STATIC = ("quanto",)
#: Last names of projections by what their output does in the attention, for models that the table of
#: feed-forwards lacks.
_QUERIES_AND_KEYS = ("q_proj", "k_proj", "query", "key", "q", "k", "q_a_proj", "q_b_proj")
_VALUES = (
    "v_proj",
    "value",
    "v",
    "kv_b_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "qkv",
    "Wqkv",
    "W_pack",
)
#: Last names of projections that end an attention or feed-forward: their output is added to the stream that
#: all later layers read.
_LAST = ("o_proj", "out_proj", "down_proj", "dense", "c_proj", "fc2", "wo", "w2", "dense_4h_to_h", "o")
#: Those whose output passes a norm before the next projection reads it.
_BEFORE_NORM = ("q_a_proj", "kv_a_proj_with_mqa")


@dataclass(frozen=True, slots=True, eq=False)
class OutputFactors:
    """The product of the vectors on the output of a module, an element a row, and these."""

    factors: Array
    folds: tuple[Fold, ...]


@dataclass(frozen=True, slots=True)
class Growth:
    """A scale of activations (`tensor`, by its stored name) that is multiplied by `factor`."""

    tensor: str
    factor: float
    folds: tuple[Fold, ...]


@dataclass(frozen=True, slots=True)
class Effects:
    """What vectors do to static scales: those that grow, modules whose range would be `unknown` with the
    reason, and warnings for people."""

    grown: tuple[Growth, ...]
    unknown: Mapping[str, str]
    warnings: tuple[str, ...]


def cache_scales(checkpoint: Checkpoint) -> dict[str, str]:
    """Stored scales of a quantized cache → the module whose output they were calibrated on."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in CACHE_SCALES and tensor.size == 1:
            last = parent.rpartition(".")[2]
            found[name] = parent if last == CACHE_SCALES[leaf] else f"{parent}.{CACHE_SCALES[leaf]}"
    return found


def cache_tensors(checkpoint: Checkpoint) -> set[str]:
    """Everything stored of a quantized cache: a dense model has none of it."""
    return {name for name in checkpoint.tensors if name.rpartition(".")[2] in _OF_CACHE}


def largest_factor(vector: Array) -> float:
    """The factor by which a range grows at most; a vector of zeros leaves it, since a scale of zero divides
    by zero."""
    return float(np.abs(vector).max(initial=0.0)) or 1.0


def off_center(module: str, parts: Mapping[str, StoredTensor], vector: Array) -> str:
    """Why the inputs of `module` cannot be turned around by a negative element of `vector`; empty where they
    can."""
    zero = parts.get(f"{module}.input_zero_point")
    if zero is None or not (vector < 0).any() or not read_flat(zero, 0, zero.size).any():
        return ""
    return f"{zero.name} was calibrated for a range that a negative element turns around"


def input_scales(packed: Packed) -> list[str]:
    """The stored static scales of the inputs of a quantized weight."""
    if packed.method in _NOT_STATIC:
        return []
    names = (f"{packed.module}.{leaf}" for leaf in INPUT_SCALES)
    return [name for name in names if name in packed.parts]


def grow(name: str, factor: float) -> float:
    """The factor of the stored number `name` when the range of what it was calibrated on grows by
    `factor`."""
    return 1 / factor if name.endswith("input_global_scale") else factor


def follow(
    outputs: Mapping[str, OutputFactors], checkpoint: Checkpoint, packed: Mapping[str, Packed]
) -> Effects:
    """What the vectors on `outputs` (by module) do to the static scales of `checkpoint`.

    `packed` are its quantized weights.
    """
    grown = [
        Growth(name, largest_factor(outputs[module].factors), outputs[module].folds)
        for name, module in cache_scales(checkpoint).items()
        if module in outputs
    ]
    static = {p.module: p for p in packed.values() if input_scales(p)}
    for weight in packed.values():
        name = f"{weight.module}.{_OUTPUT_SCALE}"
        if weight.module in outputs and name in weight.parts and weight.method not in _NOT_STATIC:
            grown.append(
                Growth(name, largest_factor(outputs[weight.module].factors), outputs[weight.module].folds)
            )
    unknown: dict[str, str] = {}
    for module, weight in static.items():
        for source, factors, reason in _reaching(module, outputs, checkpoint.config):
            reason = reason or off_center(module, weight.parts, factors)
            if reason:
                unknown[module] = reason
                break
            grown += [
                Growth(name, grow(name, largest_factor(factors)), outputs[source].folds)
                for name in input_scales(weight)
            ]
    return Effects(tuple(grown), unknown, tuple(_warnings(outputs, static)))


def _warnings(outputs: Mapping[str, OutputFactors], static: Mapping[str, Packed]) -> Iterator[str]:
    if not static:
        return
    into_stream = [module for module in outputs if module.rpartition(".")[2] in (*_LAST, *_BEFORE_NORM)]
    if into_stream:
        yield (
            f"the vector on {into_stream[0]} ({len(into_stream)} such) changes what all later layers read, "
            "and their static scales of activations were calibrated without it: calibrate again, or use "
            "--quantized dequantize"
        )
    if outputs:
        yield (
            "the base quantizes activations with static scales: those that a vector reaches "
            "grow by its largest magnitude. The forwards of verify do not quantize activations "
            "and cannot see what that costs"
        )


def _reaching(
    module: str, outputs: Mapping[str, OutputFactors], config: Mapping[str, Any] | None
) -> Iterator[tuple[str, Array, str]]:
    """The modules of `outputs` whose output is the input of `module` or a factor of it: the path, the factors
    that reach it, and why its range is then unknown."""
    parent = module.rpartition(".")[0]
    ways = {feeder: way for way, feeder in feeding(module, config)}
    if not ways and module.rpartition(".")[2] not in _LAST:
        return  # it reads the stream, as its neighbours do
    siblings = [name for name in outputs if name != module and name.rpartition(".")[0] == parent]
    for name in dict.fromkeys((*siblings, *(feeder for feeder in ways if feeder in outputs))):
        factors, leaf = outputs[name].factors, name.rpartition(".")[2]
        way = ways.get(name)
        if (way is not None and way.kind in ("gated", "value")) or (not ways and leaf in _VALUES):
            yield name, factors, ""  # of a fused projection of unequal parts all rows
        elif way is not None and way.kind == "fused":
            parts = np.array_split(factors, way.parts)
            own = parts.pop(way.number - 1)
            yield name, own, "" if all((part == 1).all() for part in parts) else _behind(name)
        elif way is not None and activation_of(module, config) == "relu" and (factors > 0).all():
            yield name, factors, ""
        elif leaf not in (*_QUERIES_AND_KEYS, *_BEFORE_NORM):
            yield name, factors, _behind(name)


def _behind(source: str) -> str:
    return (
        f"the vector on {source} reaches its inputs through an activation function, or in a way that is "
        "not known, and they have a static scale that was calibrated without it"
    )
