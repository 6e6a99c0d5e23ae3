"""Running PyTorch models on cases, giving named numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.errors import Unsupported, kind_and_line
from ia3_export.fold import Array
from ia3_export.libraries import cache_argument, returned_cache
from ia3_export.models.sentence import SentenceHead
from ia3_export.parity.runs.inputs import Case

#: Modules that PEFT puts around or into those of the model.
_PEFT_PARTS = ("base_layer", "ia3_l", "original_module", "modules_to_save")


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What a forward shall give besides the model's outputs.

    The bare encoder's ``last_hidden_state`` (`hidden`), whatever head the model has, and what the `sentence`
    head makes of it.
    """

    hidden: bool = False
    sentence: SentenceHead | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ForwardOutputs:
    """What one model gave: `outputs` by case, and the output of every module on the first case, in execution
    order.
    """

    outputs: list[dict[str, Any]]
    modules: Mapping[str, Array]

    def part(self, cases: Sequence[int]) -> ForwardOutputs:
        """The same with the outputs of some cases only."""
        return ForwardOutputs([self.outputs[i] for i in cases], self.modules)


def run_torch(model: Any, cases: Sequence[Case], wanted: Wanted, *, trace: bool = False) -> ForwardOutputs:
    """Outputs of every case (``logits``, ``last_hidden_state``, what else is `wanted`), zero at padded
    positions; float32, of a float64 model float64.

    `trace` also keeps the modules' outputs. Raises `Unsupported` when the model does not run on the inputs.
    """
    results: list[dict[str, Any]] = []
    modules: dict[str, Array] = {}
    for i, case in enumerate(cases):
        with ExitStack() as stack:
            if trace and i == 0:
                stack.enter_context(_traced(model, modules))
            captured = stack.enter_context(_encoder_output(model)) if wanted.hidden else []
            output = _forward(model, case)
        named = {
            name: value
            for name, value in output.items()
            if (name == "last_hidden_state" or name.endswith("logits")) and value is not None
        }
        if wanted.hidden:
            named["last_hidden_state"] = captured[-1].last_hidden_state
            if wanted.sentence is not None:
                states = named["token_embeddings"] = named["last_hidden_state"]
                named["sentence_embedding"] = wanted.sentence(
                    states, case.tensors["attention_mask"].to(states.device)
                )
        if not named:
            named = {"output": next(v for v in output.values() if hasattr(v, "double"))}
        results.append(attended(case, {name: to_numpy(value) for name, value in named.items()}))
    return ForwardOutputs(results, modules)


def inner_model(model: Any) -> Any:
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def to_numpy(value: Any) -> Array:
    """A torch tensor on the CPU, float64 if it is, else float32, which holds every narrower one exactly."""
    import torch

    held = value.detach() if value.dtype == torch.float64 else value.detach().float()
    array: Array = held.cpu().numpy()
    return array


def place(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` on the model's device, floating ones in its dtype."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    device = parameter.device if parameter.device.type != "meta" else model.device
    return {
        name: value.to(device, parameter.dtype) if value.is_floating_point() else value.to(device)
        for name, value in tensors.items()
    }


def _forward(model: Any, case: Case) -> Any:
    import torch

    inputs = place(model, case.tensors)
    try:
        with torch.no_grad():
            return _with_past(model, inputs, case.past) if case.past else model(**inputs)
    except (
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        AssertionError,
        RuntimeError,
    ) as error:
        raise Unsupported(
            f"the model does not run on these inputs ({case.name}): {kind_and_line(error)}",
            hint="give inputs that it takes with --inputs file.jsonl, .npz or .safetensors, or prove the "
            "--weights-only",
        ) from error


def _with_past(model: Any, inputs: Mapping[str, Any], past: int) -> Any:
    """The forward of what follows the first `past` tokens of the decoder, with their cache."""
    argument = cache_argument(inner_model(model))
    if argument is None:
        raise ValueError(f"{type(inner_model(model)).__name__} takes no cache of keys and values")
    if "decoder_input_ids" in inputs:
        ids, rest = inputs["decoder_input_ids"], {n: v for n, v in inputs.items() if n != "decoder_input_ids"}
        first = model(**rest, decoder_input_ids=ids[:, :past], use_cache=True)
        return model(
            encoder_outputs=(first.encoder_last_hidden_state,),
            attention_mask=rest.get("attention_mask"),
            decoder_input_ids=ids[:, past:],
            **{argument: returned_cache(first)},
        )
    before = {name: value[:, :past] for name, value in inputs.items()}
    after = {n: v if n == "attention_mask" else v[:, past:] for n, v in inputs.items()}
    return model(**after, **{argument: returned_cache(model(**before, use_cache=True))})


@contextmanager
def _encoder_output(model: Any) -> Iterator[list[Any]]:
    inner = inner_model(model)
    encoder = inner.get_encoder() if inner.config.is_encoder_decoder else inner.base_model
    captured: list[Any] = []
    handle = encoder.register_forward_hook(lambda _m, _i, output: captured.append(output))
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def rounding_noise(model: Any, eps: float) -> Iterator[None]:
    """Move each element that a leaf module gives a unit in the last place, up or down at random (seeded)."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def moved(_module: Any, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + eps * signs)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(moved) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _traced(model: Any, modules: dict[str, Array]) -> Iterator[None]:
    """Collect the first tensor that each module gives at its first call, by path without PEFT's wrapper."""
    import torch

    inner = inner_model(model)
    handles = []

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, Mapping):
                output = next(iter(output.values()), None)
            while isinstance(output, tuple | list) and output:
                output = output[0]
            if isinstance(output, torch.Tensor) and output.is_floating_point() and name not in modules:
                modules[name] = to_numpy(output)

        return hook

    for name, module in inner.named_modules():
        if name and not any(part in _PEFT_PARTS for part in name.split(".")):
            handles.append(module.register_forward_hook(keep(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attended(case: Case, outputs: dict[str, Any]) -> dict[str, Any]:
    """`outputs` with zeros at padded positions.

    What a model computes there is nobody's business (some give NaN).
    """
    mask = case.tensors.get("attention_mask")
    if mask is None or mask.ndim != 2 or "decoder_input_ids" in case.tensors or case.past:
        return outputs
    kept = mask.cpu().numpy().astype(bool)
    return {
        name: np.where(kept.reshape(*kept.shape, *(1,) * (values.ndim - 2)), values, 0)
        if values.ndim > 2 and values.shape[:2] == kept.shape  # a classifier's logits have no positions
        else values
        for name, values in outputs.items()
    }


@contextmanager
def exact_matmul(allow_tf32: bool = False) -> Iterator[None]:
    """TF32 off unless asked for: it keeps 10 bits of the 23 that the bound counts on."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
