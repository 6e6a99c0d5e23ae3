"""Base, live adapter and merged model in PyTorch, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ia3_export.adapters import read_adapter
from ia3_export.benching.jobs import Job, Runnable, Sources, Variant
from ia3_export.libraries import cache_argument, returned_cache
from ia3_export.onnx.contract import plan_graphs
from ia3_export.onnx.tasks import Task, sentence_head
from ia3_export.parity.runs.inputs import sample_inputs
from ia3_export.parity.runs.live import FineTune, RunDevice, fit_class, load_live, load_plain
from ia3_export.quantization.base import read_base


def load_variant(variant: Variant, sources: Sources, task: Task) -> Any:
    """The transformers model, of the class that the adapter was trained on; for tasks without logits the part
    below its head.

    Live vectors are PEFT's (or hooks, where PEFT leaves one out). Raises `Unsupported` when it
    cannot be loaded.
    """
    cpu = RunDevice("cpu")
    if variant == "merged":
        model = load_live(FineTune(read_base(sources.merged)), "float32", cpu).inner
    else:
        base = read_base(sources.base)
        adapters = tuple(read_adapter(source) for source in sources.adapters)
        if variant == "unmerged":
            model = load_live(FineTune(base, adapters), "float32", cpu).inner
        else:
            model = load_plain(base, fit_class(base.stored, adapters), "float32", cpu)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(None)  # the default: the references of parity run experts one by one
    return model if any(name.endswith("logits") for name in task.outputs) else model.base_model


def load_torch(job: Job) -> Runnable:
    """Load a variant and give it its inputs. Raises `Unsupported`."""
    import numpy as np
    import torch

    model = load_variant(job.variant, job.sources, job.task)
    inputs = {name: torch.from_numpy(value) for name, value in np.load(job.inputs).items()}
    if job.task.form == "encoder":
        return _encoder(model, job, inputs)
    if job.task.form == "decoder":
        return _generator(model, inputs, {}, "input_ids")
    start = torch.full((len(next(iter(inputs.values()))), 1), job.start)
    return _generator(model, inputs, {"decoder_input_ids": start}, "decoder_input_ids")


def _encoder(model: Any, job: Job, inputs: dict[str, Any]) -> Runnable:
    """What its graph computes: encoder, head, pooling."""
    sentence = sentence_head(Path(job.sources.base), job.task)
    (graph,) = plan_graphs(model, job.task, sample_inputs(model), "merged", sentence)
    return Runnable(lambda: graph.function(model, dict(inputs)), None)


def _generator(model: Any, inputs: dict[str, Any], first: dict[str, Any], ids_name: str) -> Runnable:
    """Prefill of all `inputs` (of encoder-decoders also the decoder's first step), then a token a step."""
    import torch

    argument = str(cache_argument(model))

    def forward() -> Any:
        out = model(**inputs, **first, use_cache=True)
        states = getattr(out, "encoder_last_hidden_state", None)
        mask = inputs.get("attention_mask")
        return out.logits, returned_cache(out), states, mask

    def step(state: Any) -> Any:
        logits, cache, states, mask = state
        ids = logits[:, -1:].argmax(-1)
        more: dict[str, Any] = {}
        if states is not None:
            more["encoder_outputs"] = (states,)
        elif mask is not None:
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        if mask is not None:
            more["attention_mask"] = mask
        out = model(**{ids_name: ids}, **more, **{argument: cache}, use_cache=True)
        return out.logits, returned_cache(out), states, mask

    return Runnable(forward, step)
