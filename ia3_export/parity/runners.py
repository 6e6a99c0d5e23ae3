"""Running models on cases: PyTorch and ONNX Runtime, each giving named numpy arrays."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.errors import DamagedFile, NotFound, Unsupported
from ia3_export.fold import Array
from ia3_export.parity.inputs import Case


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What one model gave: `outputs` by case, and the output of every module on the first case, in execution order."""

    outputs: list[dict[str, Any]]
    modules: Mapping[str, Array]

    def part(self, cases: Sequence[int]) -> Run:
        """The same with the outputs of some cases only."""
        return Run([self.outputs[i] for i in cases], self.modules)


def run_torch(model: Any, cases: Sequence[Case], *, hidden: bool = False, trace: bool = False) -> Run:
    """Outputs of every case (``logits``, ``last_hidden_state``), widened to float64, zero at padded positions.

    `hidden` adds the bare encoder's ``last_hidden_state``, whatever head the model has; `trace` also keeps the
    modules' outputs. Raises `Unsupported` when the model does not run on the inputs.
    """
    results: list[dict[str, Any]] = []
    modules: dict[str, Array] = {}
    for i, case in enumerate(cases):
        with ExitStack() as stack:
            if trace and i == 0:
                stack.enter_context(_traced(model, modules))
            captured = stack.enter_context(_encoder_output(model)) if hidden else []
            output = _forward(model, case)
        named = {
            name: value
            for name, value in output.items()
            if (name == "last_hidden_state" or name.endswith("logits")) and value is not None
        }
        if hidden:
            named["last_hidden_state"] = captured[-1].last_hidden_state
        if not named:
            named = {"output": next(v for v in output.values() if hasattr(v, "double"))}
        results.append(_attended(case, {name: to_numpy(value) for name, value in named.items()}))
    return Run(results, modules)


def to_numpy(value: Any) -> Array:
    """A torch tensor as float64 on the CPU."""
    array: Array = value.detach().double().cpu().numpy()
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
            if not case.past:
                return model(**inputs)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            first = model(input_ids=ids[:, : case.past], attention_mask=mask[:, : case.past], use_cache=True)
            return model(
                input_ids=ids[:, case.past :], attention_mask=mask, past_key_values=first.past_key_values
            )
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        raise Unsupported(
            f"the model does not run on these inputs ({case.name}): {type(error).__name__}: {error}",
            hint="give inputs that it takes with --inputs file.jsonl, .npz or .safetensors, or prove the --weights-only",
        ) from error


@contextmanager
def _encoder_output(model: Any) -> Iterator[list[Any]]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    captured: list[Any] = []
    handle = inner.base_model.register_forward_hook(lambda _m, _i, output: captured.append(output))
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def rounding_noise(model: Any, eps: float) -> Iterator[None]:
    """Move every element that a leaf module gives by one unit in the last place, up or down at random (seeded)."""
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
    """Collect the first tensor that each module gives at its first call, by its path without PEFT's wrapper."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
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


_PEFT_PARTS = ("base_layer", "ia3_l", "original_module", "modules_to_save")


def _attended(case: Case, outputs: dict[str, Any]) -> dict[str, Any]:
    """`outputs` with zeros at padded positions: what a model computes there is nobody's business (some give NaN)."""
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


def open_onnx(path: Path, device: str = "cpu") -> Any:
    """An ONNX Runtime session, on the CUDA execution provider if `device` is cuda and there is one.

    Raises `Unsupported` when ONNX Runtime is not installed, `DamagedFile` when it cannot load the file.
    """
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
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DamagedFile(
            f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}", hint="export the model again"
        ) from error


def run_onnx(session: Any, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Outputs of every case from an ONNX Runtime session. Raises `Unsupported` when the graph wants other inputs."""
    wanted = {node.name: node for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    results = []
    for case in cases:
        feeds = {name: value.numpy() for name, value in case.tensors.items() if name in wanted}
        if "token_type_ids" in wanted and "token_type_ids" not in feeds:
            feeds["token_type_ids"] = feeds["input_ids"] * 0
        for name, value in feeds.items():
            if wanted[name].type == "tensor(float16)":
                feeds[name] = value.astype(np.float16)
        try:
            values = session.run(None, feeds)
        except Exception as error:  # as above
            raise Unsupported(
                f"the graph does not run on these inputs ({case.name}): {str(error).splitlines()[0]}",
                hint=f"it wants {', '.join(sorted(wanted))}; give them with --inputs",
            ) from None
        results.append(_attended(case, dict(zip(names, values, strict=True))))
    return results


def find_onnx(location: str | Path) -> list[Path]:
    """The ``.onnx`` files of an exported folder (``model.onnx`` first, then its other precisions), or the file itself.

    Raises `NotFound`.
    """
    path = Path(location)
    if path.is_file():
        return [path]
    for folder in (path / "onnx", path):
        if (folder / "model.onnx").is_file():
            others = sorted(file for file in folder.glob("model_*.onnx") if file.is_file())
            return [folder / "model.onnx", *others]
    raise NotFound(
        f"{location} holds no onnx/model.onnx", hint="give the folder that ia3-export onnx wrote, or a file"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and torch draw progress bars and warn of their own internals; neither belongs into a report."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    others = {name: getLogger(name).level for name in ("accelerate", "bitsandbytes")}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in others:
        getLogger(name).setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        for name, before in others.items():
            getLogger(name).setLevel(before)
        if bars:
            logging.enable_progress_bar()


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
