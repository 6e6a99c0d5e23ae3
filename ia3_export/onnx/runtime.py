"""Exported graphs in ONNX Runtime: the files of a model opened, and its decoder driven with its cache from
step to step.

Neither torch nor transformers is imported, and what goes from step to step stays with ONNX Runtime: `bench`
measures with this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ia3_export.errors import DamagedFile, Unsupported, first_line
from ia3_export.fold import Array
from ia3_export.onnx.exported import CACHED, ENCODER, FIRST, MERGED, TASK, plain_stem

_PAST, _PRESENT = "past_key_values", "present"
_FLOATS = {"tensor(float16)": "<f2", "tensor(float)": "<f4", "tensor(double)": "<f8"}

#: Tensors by name: numpy arrays, or values of ONNX Runtime (``OrtValue``).
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OnnxGraph:
    """One open file: the shapes of its `inputs`, the numpy types of those that are `floats`, the names of its
    `outputs`, and by which name the next step takes those that are its `cache`. All is read once, since what
    a step costs is measured. `active` are the options of a run with an adapter, and the adapter itself, which
    must live as long; `task` is the row that a graph with tables takes, for all of a batch, or one
    for each element."""

    session: Any
    inputs: Mapping[str, tuple[int | str | None, ...]]
    floats: Mapping[str, str]
    outputs: tuple[str, ...]
    cache: Mapping[str, str]
    active: tuple[Any, ...] = ()
    task: int | Array = 0

    @property
    def plain_inputs(self) -> list[str]:
        """The inputs that are no part of the cache."""
        return [name for name in self.inputs if not name.startswith(_PAST)]


@dataclass(frozen=True, slots=True, eq=False)
class OnnxModel:
    """The open files of one exported model, by file name without ``.onnx`` and precision: ``model``, or an
    ``encoder_model`` with ``decoder_model_merged`` or with optimum's two decoders."""

    graphs: Mapping[str, OnnxGraph]

    @property
    def decoder(self) -> OnnxGraph:
        """What gives the outputs at the first step."""
        return next(self.graphs[stem] for stem in ("model", MERGED, FIRST) if stem in self.graphs)

    @property
    def cached(self) -> bool:
        """Whether decoding is step by step, with a cache of keys and values."""
        return CACHED in self.graphs or len(self.decoder.plain_inputs) < len(self.decoder.inputs)

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return str(self.decoder.session.get_providers()[0])


@dataclass(frozen=True, slots=True, eq=False)
class DecoderStep:
    """What a decoder gave for the tokens of a step, as values of ONNX Runtime: its `outputs` beside the
    cache, and the `cache`, under the names by which the next step takes it. `mask` is int64 (batch, tokens so
    far), an encoder-decoder's that of its encoder, whose `states` it has, too."""

    outputs: Values
    cache: Values
    mask: Any
    states: Any = None


def open_model(
    paths: Sequence[Path],
    *,
    device: str = "cpu",
    threads: int | None = None,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    task: int = 0,
) -> OnnxModel:
    """Open the files of one model (`find_onnx`), each with its operators in so many `threads` (None: ONNX
    Runtime's choice), with the ``.onnx_adapter`` file that `adapters` name for it (by file name), and to be
    run with the row `task` of its tables.

    Raises `Unsupported` without ONNX Runtime, `DamagedFile` for a file it cannot load.
    """
    alone = len(paths) == 1 and not paths[0].stem.startswith(ENCODER)
    opened = {
        "model" if alone else plain_stem(path) or path.stem: _open(
            path, device, threads, adapters.get(path.name)
        )
        for path in paths
    }
    return OnnxModel({stem: replace(graph, task=task) for stem, graph in opened.items()})


def _open(path: Path, device: str, threads: int | None, adapter: Path | None) -> OnnxGraph:
    try:
        import onnxruntime
    except ImportError:
        raise Unsupported(
            "ONNX Runtime is not installed", hint="pip install 'ia3-export[cpu]' (or [gpu], never both)"
        ) from None
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DamagedFile(
            f"ONNX Runtime cannot load {path}: {first_line(error)}", hint="export the model again"
        ) from error
    ports, outputs = session.get_inputs(), tuple(port.name for port in session.get_outputs())
    return OnnxGraph(
        session=session,
        inputs={port.name: tuple(port.shape) for port in ports},
        floats={port.name: _FLOATS[port.type] for port in ports if port.type in _FLOATS},
        outputs=outputs,
        cache={n: n.replace(_PRESENT, _PAST, 1) for n in outputs if n.startswith(f"{_PRESENT}.")},
        active=_activate(adapter) if adapter is not None else (),
    )


def _activate(adapter: Path) -> tuple[Any, ...]:
    import onnxruntime

    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    try:
        loaded.Load(str(adapter.resolve()))
        options.add_active_adapter(loaded)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DamagedFile(
            f"ONNX Runtime cannot load {adapter}: {first_line(error)}", hint="export the model again"
        ) from error
    return options, loaded


def ort_values(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """`arrays` as values of ONNX Runtime, which no call converts again. On a CPU they share the memory of the
    arrays."""
    return {name: _ort_value(array) for name, array in arrays.items()}


def _ort_value(array: Array, dtype: str | None = None) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype))


def call(graph: OnnxGraph, inputs: Values) -> dict[str, Any]:
    """All outputs by name, as values of ONNX Runtime. Of `inputs` the graph takes those that it has and that
    are not None, arrays of floats in its own type; ``token_type_ids`` are zeros where they are missing, and
    ``task`` the graph's own.

    Raises what ONNX Runtime does, for missing inputs, too.
    """
    feeds = {
        name: _ort_value(value, graph.floats.get(name)) if isinstance(value, np.ndarray) else value
        for name, value in inputs.items()
        if name in graph.inputs and value is not None
    }
    if "token_type_ids" in graph.inputs and "token_type_ids" not in feeds:
        feeds["token_type_ids"] = _ort_value(np.zeros_like(inputs["input_ids"]))
    if TASK in graph.inputs and TASK not in feeds:
        known = next(
            name for name, shape in graph.inputs.items() if name in feeds and shape[0] == "batch_size"
        )
        feeds[TASK] = _ort_value(np.full(feeds[known].shape()[0], graph.task, "<i8"))
    values = graph.session.run_with_ort_values(graph.outputs, feeds, *graph.active[:1])
    return dict(zip(graph.outputs, values, strict=True))


def encode(model: OnnxModel, inputs: Values) -> DecoderStep:
    """What an encoder-decoder's decoder starts from: the states of the encoder and its mask."""
    states = next(iter(call(model.graphs[ENCODER], inputs).values()))
    return DecoderStep({}, {}, inputs.get("attention_mask"), states)


def first_step(model: OnnxModel, inputs: Values, ids: Array) -> DecoderStep:
    """The first step: all tokens `ids` (batch, length), those of an encoder-decoder's decoder after `inputs`
    of its encoder. Of a decoder's `inputs` the ``attention_mask`` counts (all ones by default)."""
    if ENCODER in model.graphs:
        return cross_step(model, ids, encode(model, inputs))
    mask = inputs.get("attention_mask", np.ones(ids.shape, np.int64))
    return self_step(model, ids, mask, positions_of(mask), {})


def next_step(model: OnnxModel, before: DecoderStep, ids: Array) -> DecoderStep:
    """The step after `before`, for one more token of every text: `ids` (batch, 1)."""
    if ENCODER in model.graphs:
        return cross_step(model, ids, before)
    mask = np.concatenate([before.mask, np.ones(ids.shape, np.int64)], axis=1)
    return self_step(model, ids, mask, mask.sum(-1, keepdims=True) - 1, before.cache)


def positions_of(mask: Array) -> Array:
    """Positions (batch, length), counted from the first attended token of every text."""
    positions: Array = np.maximum(mask.cumsum(-1) - 1, 0)
    return positions


def self_step(model: OnnxModel, ids: Array, mask: Array, positions: Array, cache: Values) -> DecoderStep:
    """A step of a decoder alone: `ids` and `positions` are those of the new tokens, `mask` that of all. An
    empty `cache` is the beginning of the texts."""
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    feeds["use_cache_branch"] = np.array([bool(cache)])  # of optimum's older decoders
    return _step(model.decoder, {**feeds, **(cache or _empty_cache(model.decoder, len(ids)))}, mask)


def cross_step(model: OnnxModel, ids: Array, before: DecoderStep) -> DecoderStep:
    """A step of an encoder-decoder's decoder, after `before`: the encoder's states and mask, and the cache if
    there is one."""
    cache, merged = before.cache, model.graphs.get(MERGED)
    graph = merged or model.graphs[CACHED if cache and CACHED in model.graphs else FIRST]
    feeds = {
        "input_ids": ids,
        "encoder_hidden_states": before.states,
        "use_cache_branch": np.array([bool(cache)]),
        "encoder_attention_mask": before.mask,
        **(cache or _empty_cache(graph, len(ids))),
    }
    done = _step(graph, feeds, before.mask, before.states)
    # optimum's decoder with past does not give the keys and values of the encoder again
    return replace(done, cache={**cache, **done.cache}) if len(done.cache) < len(cache) else done


def _step(graph: OnnxGraph, feeds: Values, mask: Any, states: Any = None) -> DecoderStep:
    outputs = call(graph, feeds)
    cache = {past: outputs.pop(present) for present, past in graph.cache.items()}
    return DecoderStep(outputs, cache, mask, states)


def _empty_cache(graph: OnnxGraph, batch: int) -> dict[str, Array]:
    """Past keys and values of length 0."""
    return {
        name: np.zeros(
            [batch if axis == "batch_size" else axis if isinstance(axis, int) else 0 for axis in shape],
            graph.floats.get(name, "<f4"),
        )
        for name, shape in graph.inputs.items()
        if name.startswith(_PAST)
    }
