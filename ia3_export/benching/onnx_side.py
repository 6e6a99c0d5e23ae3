"""Exported graphs in ONNX Runtime; neither torch nor transformers is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.benching.jobs import Job, Runnable
from ia3_export.errors import DamagedFile, first_line

_PAST, _PRESENT = "past_key_values.", "present."

Values = dict[str, Any]


def load_onnx(job: Job) -> Runnable:
    """Open the graphs of a job and give them their inputs. Raises `DamagedFile` for a graph that does not load."""
    sessions = [_open(Path(graph), job.threads) for graph in job.graphs]
    inputs = dict(np.load(job.inputs))
    if job.task.form == "encoder":
        values = _values(inputs)
        return Runnable(lambda: _run(sessions[0], values), None)
    if job.task.form == "decoder":
        return _decoder(sessions[0], inputs)
    return _encoder_decoder(*sessions, inputs=inputs, start=job.start)


def _open(graph: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DamagedFile(
            f"ONNX Runtime cannot load {graph.name}: {first_line(error)}",
            hint="leave out this --precision, and please report the architecture",
        ) from error


def _decoder(session: Any, inputs: Mapping[str, Any]) -> Runnable:
    batch, length = inputs["input_ids"].shape

    def call(ids: Any, total: int, cache: Values) -> Any:
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.arange(total - ids.shape[1], total)[None].repeat(batch, 0),
        }
        logits, cache = _split(_run(session, _values(feeds) | cache))
        return logits, cache, total

    def step(state: Any) -> Any:
        logits, cache, total = state
        return call(_greedy(logits), total + 1, cache)

    return Runnable(lambda: call(inputs["input_ids"], length, _no_cache(session, batch)), step)


def _encoder_decoder(encoder: Any, decoder: Any, *, inputs: Mapping[str, Any], start: int) -> Runnable:
    given = _values(inputs)
    batch = len(next(iter(inputs.values())))
    mask = {"encoder_attention_mask": given["attention_mask"]} if "attention_mask" in given else {}

    def call(ids: Any, states: Any, cache: Values) -> Any:
        feeds = {"input_ids": _value(ids), "encoder_hidden_states": states}
        logits, cache = _split(_run(decoder, feeds | mask | cache))
        return logits, states, cache

    def forward() -> Any:
        states = _run(encoder, given)["last_hidden_state"]
        return call(np.full((batch, 1), start), states, _no_cache(decoder, batch))

    def step(state: Any) -> Any:
        logits, states, cache = state
        return call(_greedy(logits), states, cache)

    return Runnable(forward, step)


def _run(session: Any, values: Values) -> Values:
    """All outputs by name. Values stay ONNX Runtime's: no cache is copied on its way to the next step."""
    feeds = {port.name: values[port.name] for port in session.get_inputs()}
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run_with_ort_values(names, feeds), strict=True))


def _split(outputs: Values) -> tuple[Any, Values]:
    """Logits, and the cache under the names of the next step's inputs."""
    cache = {n.replace(_PRESENT, _PAST, 1): v for n, v in outputs.items() if n.startswith(_PRESENT)}
    return outputs["logits"], cache


def _no_cache(session: Any, batch: int) -> Values:
    """Past keys and values of length 0."""
    free = {"batch_size": batch}
    return _values({
        port.name: np.zeros([free.get(axis, 0) if isinstance(axis, str) else axis for axis in port.shape], "<f4")
        for port in session.get_inputs()
        if port.name.startswith(_PAST)
    })  # fmt: skip


def _greedy(logits: Any) -> Any:
    return logits.numpy()[:, -1:].argmax(-1)


def _value(array: Any) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _values(arrays: Mapping[str, Any]) -> Values:
    return {name: _value(array) for name, array in arrays.items()}
