"""What the exported graphs take and give; names, free axes and order are those of optimum and
transformers.js.

A graph is traced through a function from named inputs to a tuple of tensors; this module makes these
functions, one for each form of graph, and measures the shapes of the cache on a forward of the model itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ia3_export.errors import Unsupported
from ia3_export.libraries import cache_argument, filled_cache, returned_cache
from ia3_export.models.sentence import SentenceHead
from ia3_export.onnx.exported import CACHED, ENCODER, FIRST, MERGED
from ia3_export.onnx.options import DecoderForm
from ia3_export.onnx.tasks import Task

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
#: Lengths of the samples: 2 and more and all different, since torch specialises 0 and 1 and may
#: merge equal ones.
_LENGTH, _NEW, _PAST, _PAST_ENCODER = 11, 3, 5, 4
_TOTAL = "past_sequence_length + sequence_length"


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output: its `shape` holds the size of a fixed axis and the name of a free one."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class GraphSpec:
    """One ONNX file to be: ``function(model, {input: tensor}) -> outputs``, traced with `samples` for
    `inputs`.
    """

    file: str
    function: Callable[[Any, dict[str, Any]], tuple[Any, ...]]
    inputs: tuple[Port, ...]
    samples: tuple[Any, ...]
    outputs: tuple[Port, ...]


def plan_graphs(
    model: Any, task: Task, sample: Mapping[str, Any], decoder: DecoderForm, sentence: SentenceHead | None
) -> list[GraphSpec]:
    """The graphs of `model` for `task`. `sample` is a forward call of the model with a batch of 2 and more.

    Raises `Unsupported` for models whose cache is not one of keys and values.
    """
    if task.form == "encoder":
        return [_encoder(model, task, sample, sentence)]
    if task.form == "decoder":
        return [_decoder(model, sample)]
    first = _states_of_encoder(model, sample)
    layers = _measure_cache(model, sample)
    if decoder == "merged":
        return [first, _cross_decoder(MERGED, model, sample, layers, "either")]
    return [
        first,
        _cross_decoder(FIRST, model, sample, layers, "first"),
        _cross_decoder(CACHED, model, sample, layers, "cached"),
    ]


def input_names(model: Any) -> list[str]:
    """The inputs of an encoder of text, in optimum's order; ``token_type_ids`` where there are types to tell
    apart.
    """
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in _TEXT_INPUTS if name in accepted]
    if getattr(model.config, "type_vocab_size", 0) < 2 and "token_type_ids" in names:
        names.remove("token_type_ids")
    return names


def _encoder(model: Any, task: Task, sample: Mapping[str, Any], sentence: SentenceHead | None) -> GraphSpec:
    encoder_only = model.config.is_encoder_decoder and task.outputs == ("last_hidden_state",)
    inputs, samples = _encoder_inputs(model, sample)
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def function(traced: Any, named: dict[str, Any]) -> tuple[Any, ...]:
        if encoder_only:
            return (traced.get_encoder()(**named)[0],)
        out = traced(**named, **extra)
        if sentence is not None:
            hidden = out.last_hidden_state
            return hidden, sentence(hidden, named["attention_mask"])
        return tuple(out[name] for name in task.outputs)

    return GraphSpec(
        "model", function, inputs, samples, _outputs(model, function, inputs, samples, task.outputs)
    )


def _encoder_inputs(model: Any, sample: Mapping[str, Any]) -> tuple[tuple[Port, ...], tuple[Any, ...]]:
    """Text of free length, or the one tensor of images or sound in the shape that the model is made for."""
    import torch

    if "input_ids" in sample:
        ids = sample["input_ids"][:, -_LENGTH:]  # with the end, at which BART's classifier pools
        ports = tuple(Port(name, ("batch_size", "sequence_length")) for name in input_names(model))
        ones = torch.ones_like(ids)
        return ports, tuple(ids if port.name == "input_ids" else ones.clone() for port in ports)
    name = model.main_input_name
    value = sample[name]
    if name == "input_values" and value.ndim == 2:  # raw sound
        return (Port(name, ("batch_size", "sequence_length")),), (value,)
    return (Port(name, ("batch_size", *value.shape[1:])),), (value,)


def _outputs(
    model: Any,
    function: Callable[[Any, dict[str, Any]], tuple[Any, ...]],
    inputs: Sequence[Port],
    samples: Sequence[Any],
    names: Sequence[str],
) -> tuple[Port, ...]:
    """Output shapes, measured: an axis that changes when the inputs are cut to half their length is free."""
    import torch

    lengths = {v.shape[1] for port, v in zip(inputs, samples, strict=True) if isinstance(port.shape[1], str)}
    # cut at the front: some models look for the last token
    halves = [
        v[:, v.shape[1] // 2 :] if isinstance(p.shape[1], str) else v
        for p, v in zip(inputs, samples, strict=True)
    ]
    with torch.no_grad():
        whole, half = (
            function(model, {port.name: v for port, v in zip(inputs, values, strict=True)})
            for values in (samples, halves)
        )

    def axis(size: int, other: int) -> int | str:
        if size == other:
            return size
        return "sequence_length" if size in lengths else "output_length"

    return tuple(
        Port(
            name,
            ("batch_size", *(axis(*sizes) for sizes in zip(long.shape[1:], short.shape[1:], strict=True))),
        )
        for name, long, short in zip(names, whole, half, strict=False)
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """Heads and head sizes of a layer's keys and values."""

    key: tuple[int, int]
    value: tuple[int, int]


def _measure_cache(model: Any, sample: Mapping[str, Any]) -> tuple[list[_Layer], list[_Layer]]:
    """The layers of the self-attention cache and of the cross-attention cache."""
    import torch

    with torch.no_grad():
        cache = returned_cache(model(**{k: v[:1] for k, v in sample.items()}, use_cache=True))
    parts = [getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)]
    try:
        measured = [
            [
                _Layer(
                    (layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3])
                )
                for layer in part.layers
            ]
            if part is not None
            else []
            for part in parts
        ]
    except (AttributeError, IndexError):
        measured = [[], []]
    if not measured[0]:
        raise _without_cache(model)
    return measured[0], measured[1]


def _without_cache(model: Any) -> Unsupported:
    return Unsupported(
        f"{type(model).__name__} keeps no cache of keys and values (recurrent and hybrid models do not)",
        hint="--task feature-extraction exports its hidden states, without generation",
    )


def _cache_ports(prefix: str, layers: Sequence[_Layer], inner: str, length: str) -> list[Port]:
    return [
        Port(f"{prefix}.{i}{inner}.{part}", ("batch_size", heads, length, size))
        for i, layer in enumerate(layers)
        for part, (heads, size) in (("key", layer.key), ("value", layer.value))
    ]


def _empty(port: Port, sizes: Mapping[str, int]) -> Any:
    import torch

    return torch.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in port.shape])


def _decoder(model: Any, sample: Mapping[str, Any]) -> GraphSpec:
    """One graph for prefill and decoding.

    Past length 0 is allowed, and the cache is plain: a full-length one, in which sliding windows are the
    mask's business.
    """
    import torch

    accepted = inspect.signature(model.forward).parameters
    argument = cache_argument(model)
    if argument is None:
        raise _without_cache(model)
    text = {name: sample[name] for name in ("input_ids", "attention_mask") if name in accepted}
    layers, _ = _measure_cache(model, text)
    batch = sample["input_ids"].shape[0]
    ports = [Port("input_ids", ("batch_size", "sequence_length"))]
    samples = [sample["input_ids"][:, :_NEW]]
    if "attention_mask" in accepted:
        ports.append(Port("attention_mask", ("batch_size", _TOTAL)))
        samples.append(torch.ones(batch, _PAST + _NEW, dtype=torch.int64))
    if "position_ids" in accepted:
        ports.append(Port("position_ids", ("batch_size", "sequence_length")))
        samples.append(torch.arange(_PAST, _PAST + _NEW).repeat(batch, 1))
    past = _cache_ports("past_key_values", layers, "", "past_sequence_length")
    sizes = {"batch_size": batch, "past_sequence_length": _PAST}
    samples += [_empty(port, sizes) for port in past]

    def function(traced: Any, named: dict[str, Any]) -> tuple[Any, ...]:
        past = [
            [named.pop(f"past_key_values.{i}.{part}") for part in ("key", "value")]
            for i in range(len(layers))
        ]
        cache = filled_cache(past)
        out = traced(**named, **{argument: cache}, use_cache=True)
        return (out.logits, *_tensors(returned_cache(out)))

    present = _cache_ports("present", layers, "", _TOTAL)
    vocabulary = Port("logits", ("batch_size", "sequence_length", _vocabulary(model)))
    return GraphSpec("model", function, (*ports, *past), tuple(samples), (vocabulary, *present))


def _tensors(cache: Any) -> list[Any]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(head.weight.shape[0] if head is not None else model.config.get_text_config().vocab_size)


def _states_of_encoder(model: Any, sample: Mapping[str, Any]) -> GraphSpec:
    name = model.main_input_name
    inputs, samples = _encoder_inputs(model, {name: sample[name]})
    inputs, samples = (
        tuple(x for x, port in zip(xs, inputs, strict=True) if port.name in (name, "attention_mask"))
        for xs in (inputs, samples)
    )

    def function(traced: Any, named: dict[str, Any]) -> tuple[Any, ...]:
        return (traced.get_encoder()(**named)[0],)

    outputs = _outputs(model, function, inputs, samples, ("last_hidden_state",))
    return GraphSpec(ENCODER, function, inputs, samples, outputs)


_CrossStep = Literal["first", "cached", "either"]


def _cross_decoder(
    file: str,
    model: Any,
    sample: Mapping[str, Any],
    layers: tuple[list[_Layer], list[_Layer]],
    step: _CrossStep,
) -> GraphSpec:
    """The decoder of an encoder-decoder: its ``first`` step, a ``cached`` one, or ``either`` in one graph.

    For ``either`` the model is given only those encoder states whose keys and values are not in the cache yet
    (all at first, none later), and the cache's own concatenation joins both: no ``If``, every weight once,
    and nothing in it depends on the model.
    """
    import torch

    own, cross = layers
    argument = cache_argument(model)
    if argument is None:
        raise _without_cache(model)
    ids = sample["decoder_input_ids"][:, :_NEW]
    with torch.no_grad():
        encoded = {k: v for k, v in sample.items() if k in (model.main_input_name, "attention_mask")}
        states = model.get_encoder()(**encoded)[0]
    masked = "attention_mask" in sample and model.main_input_name == "input_ids"
    length: int | str = "encoder_sequence_length" if masked else states.shape[1]
    inputs = [(Port("input_ids", ("batch_size", "decoder_sequence_length")), ids)]
    if masked:
        mask = torch.ones(states.shape[:2], dtype=torch.int64)
        inputs.insert(0, (Port("encoder_attention_mask", ("batch_size", "encoder_sequence_length")), mask))
    if step != "cached":
        inputs.append((Port("encoder_hidden_states", ("batch_size", length, states.shape[2])), states))
    if step != "first":
        inputs += _cross_past(own, cross, len(ids))
    logits = Port("logits", ("batch_size", "decoder_sequence_length", _vocabulary(model)))
    total = "past_decoder_sequence_length + decoder_sequence_length"
    if step == "cached":
        present = _cache_ports("present", own, ".decoder", total)
    else:
        present = _layerwise("present", own, cross, total, length)
    ports, samples = zip(*inputs, strict=True)
    return GraphSpec(
        file, _cross_function(argument, len(own), len(ids), step), ports, samples, (logits, *present)
    )


def _cross_past(own: Sequence[_Layer], cross: Sequence[_Layer], batch: int) -> list[tuple[Port, Any]]:
    """The inputs of the cache and their samples, in the order by which optimum's ORTModel pairs them."""
    sizes = {
        "batch_size": batch,
        "past_decoder_sequence_length": _PAST,
        "encoder_sequence_length_out": _PAST_ENCODER,
    }
    _, own_length, cross_length = sizes
    ports = _layerwise("past_key_values", own, cross, own_length, cross_length)
    return [(port, _empty(port, sizes)) for port in ports]


def _cross_function(
    argument: str, layers: int, batch: int, step: _CrossStep
) -> Callable[[Any, dict[str, Any]], tuple[Any, ...]]:
    """What is traced of a decoder of so many `layers` that takes its cache by the name `argument`."""
    import torch
    from transformers import EncoderDecoderCache

    def function(traced: Any, named: dict[str, Any]) -> tuple[Any, ...]:
        cached = range(0 if step == "first" else layers)
        past = [[named[f"past_key_values.{i}.{part}"] for part in _PARTS] for i in cached]
        own, cross = (filled_cache([layer[part : part + 2] for layer in past]) for part in (0, 2))
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = dict.fromkeys(cached, step == "cached")
        states = named.get("encoder_hidden_states")
        if step != "first":
            length = named["past_key_values.0.encoder.key"].shape[2]
            states = states[:, length:] if states is not None else torch.zeros(batch, length, 1)
        mask = named.get("encoder_attention_mask")
        extra = {} if mask is None else {"attention_mask": _additive(mask)}
        out = traced(
            encoder_outputs=(states,),
            decoder_input_ids=named["input_ids"],
            use_cache=True,
            **{argument: cache},
            **extra,
        )
        filled = returned_cache(out)
        decoder = _tensors(filled.self_attention_cache)
        if step == "cached":
            return (out.logits, *decoder)
        encoder = _tensors(filled.cross_attention_cache)
        pairs = range(0, len(decoder), 2)
        return (out.logits, *(t for i in pairs for t in (*decoder[i : i + 2], *encoder[i : i + 2])))

    return function


_PARTS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


def _layerwise(
    prefix: str, own: Sequence[_Layer], cross: Sequence[_Layer], length: str, cross_length: int | str
) -> list[Port]:
    ports = []
    for i, (mine, theirs) in enumerate(zip(own, cross, strict=True)):
        shapes = (
            (mine.key, length),
            (mine.value, length),
            (theirs.key, cross_length),
            (theirs.value, cross_length),
        )
        for part, ((heads, size), extent) in zip(_PARTS, shapes, strict=True):
            ports.append(Port(f"{prefix}.{i}.{part}", ("batch_size", heads, extent, size)))
    return ports


def _additive(mask: Any) -> Any:
    """``(batch, length)`` of ones and zeros as ``(batch, 1, 1, length)`` to be added to attention scores."""
    import torch

    return (1.0 - mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
