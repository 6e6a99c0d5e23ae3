"""Exported graphs in ONNX Runtime, as they are measured; neither torch nor transformers is imported."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ia3_export.benching.jobs import Job, Runnable
from ia3_export.errors import DamagedFile
from ia3_export.fold import Array
from ia3_export.onnx.runtime import (
    DecoderStep,
    OnnxModel,
    call,
    first_step,
    next_step,
    open_model,
    ort_values,
)


def load_onnx(job: Job) -> Runnable:
    """Open the graphs of a job and give them their inputs.

    Raises `DamagedFile` for a graph that does not load.
    """
    model = _open(job)
    arrays = dict(np.load(job.inputs))
    inputs = ort_values(arrays)
    if job.task.form == "encoder":
        return Runnable(lambda: call(model.decoder, inputs), None)
    if job.task.form == "decoder":
        ids, inputs = arrays["input_ids"], {}  # texts without padding
    else:
        ids = np.full((len(next(iter(arrays.values()))), 1), job.start)
    return Runnable(
        lambda: first_step(model, inputs, ids), lambda before: next_step(model, before, _greedy(before))
    )


def _open(job: Job) -> OnnxModel:
    graphs = [Path(graph) for graph in job.graphs]
    try:
        active = {name: Path(file) for name, file in job.active.items()}
        return open_model(graphs, threads=job.threads, adapters=active, task=job.row)
    except DamagedFile as error:  # the graphs lie in a temporary folder that is gone when this is read
        raise DamagedFile(
            str(error).replace(f"{graphs[0].parent}{os.sep}", ""),
            hint="leave out this --precision, and please report the architecture",
        ) from error


def _greedy(step: DecoderStep) -> Array:
    ids: Array = step.outputs["logits"].numpy()[:, -1:].argmax(-1)
    return ids
