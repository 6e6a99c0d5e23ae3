"""The reload check: what was written, opened through the library that its users use, and compared weight by
weight.

A file that only we can read would be worth nothing. The dequantizers of bitsandbytes, compressed-tensors and
gguf make each weight what we read it as, or transformers loads the whole folder on the CPU.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError

from ia3_export.checkpoint.folder import Checkpoint, adapterless, architectures, first_class
from ia3_export.checkpoint.header import StoredTensor, read_values
from ia3_export.errors import CheckFailed, DamagedFile, kind_and_line
from ia3_export.fold import FLOAT_DTYPES, Array, from_float, to_float
from ia3_export.models.conversions import loading_rules
from ia3_export.models.model_class import build_on_meta, quiet, sources
from ia3_export.parity.streamed_reload import (
    can_stream,
    count_plain,
    keys_apart,
    library_weights,
)
from ia3_export.quantization.base import Base, read_base
from ia3_export.quantization.detection import Quantization
from ia3_export.quantization.gguf import reload_weights
from ia3_export.words import STORED_NAMES, torch_name

#: Largest relative difference (Frobenius norm) of a weight: rounding of libraries that compute in 16 bits.
TOLERANCE = {"bitsandbytes": 1e-6, "gguf": 0.0, "dense": 0.0}
_SIXTEEN_BITS = 6e-3
#: Methods that transformers loads on a CPU with one more package, or without any.
_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "fp8": "",
    "torchao": "torchao",
    "mxfp4": "",
}
#: Copies of the dense weights that loading and comparing take.
_COPIES = 3.0
_REPORT = "please report it with the base's name; --no-reload-check writes the output all the same"


@dataclass(frozen=True, slots=True)
class Reload:
    """What the reload check found: the `library` that opened the output, how many `weights` were compared,
    and their largest relative difference `error`; or why there was no check (`skipped`)."""

    library: str
    weights: int
    error: float
    skipped: str

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return asdict(self)


def check_reload(
    folder: Path, base: Base | None = None, *, called: str = "the output", whole: bool = False
) -> Reload:
    """Open the checkpoint in `folder`, a merge of `base`, through its users' library and compare every weight
    that both have, as the library's dtype holds it; weight by weight where the library can, unless the model
    is to be loaded `whole`. What is raised calls the checkpoint so.

    Raises `CheckFailed` when the library cannot load it, misses or invents a tensor, or reads other weights.
    """
    written = read_base(folder)
    quantization, dense = written.quantization, written.dense
    streamed = not whole and not dense.is_gguf and can_stream(dense, quantization)
    reason = _impossible(dense, quantization, streamed=streamed)
    if reason:
        return Reload("", 0, 0.0, reason)
    library, compared, worst = _library(quantization, streamed=streamed), 0, 0.0
    expected = {n: t for n, t in dense.tensors.items() if t.dtype in FLOAT_DTYPES}
    if streamed:
        compared = _compare_plain(dense, called)
        weights = _stream(dense, quantization, base, called)
    else:
        weights = _load(dense, quantization, base, called)
    for name, found, dtype in weights:
        if name not in expected:
            continue
        wanted = read_values(expected[name])
        packed = quantization.packed.get(name)
        if found.size != wanted.size:
            raise CheckFailed(
                f"{library} reads {name} as {list(found.shape)}, it was written as {list(wanted.shape)}",
                hint=_REPORT,
            )
        if packed is None and dtype != expected[name].dtype:  # one rounding, which is not ours
            wanted = to_float(from_float(np.array(wanted).reshape(-1), dtype), dtype).reshape(wanted.shape)
        error = _difference(found.reshape(wanted.shape), wanted)
        limit = TOLERANCE.get(packed.method if packed else "dense", _SIXTEEN_BITS)
        if not error <= limit:
            raise CheckFailed(
                f"{library} reads {name} with a relative difference of {error:.2e} to what was written "
                f"(at most {limit:.0e} is rounding)",
                hint=_REPORT,
            )
        compared, worst = compared + 1, max(worst, error)
    if not compared:
        return Reload(library, 0, 0.0, f"{library} has none of the weights under a name of the file")
    return Reload(library, compared, worst, "")


def _difference(found: Array, wanted: Array) -> float:
    """Relative difference (Frobenius norm); zero where both are equal, infinities too."""
    if np.array_equal(found, wanted):
        return 0.0
    scale = float(np.linalg.norm(wanted)) or 1.0
    return float(np.linalg.norm(found.astype("<f4") - wanted)) / scale


def check_output(folder: Path, base: Base, *, dense: bool, whole: bool) -> Reload:
    """`check_reload` of a merge of `base` in `folder`, which is `dense` or still quantized.

    Where a library reads the base itself wrongly, what it makes of the output says nothing of the merge.
    """
    try:
        return check_reload(folder, base, whole=whole)
    except CheckFailed:
        if dense:
            raise
        try:
            check_reload(base.stored.location.path, called="the base", whole=whole)
        except CheckFailed as of_base:
            return Reload("", 0, 0.0, f"the base itself is read wrongly: {of_base}")
        raise


def _impossible(dense: Checkpoint, quantization: Quantization, *, streamed: bool) -> str:
    """Why the check cannot be made here; empty when it can."""
    import psutil

    if dense.is_gguf:
        return ""
    config = dense.config or {}
    try:
        name = first_class(config)
    except DamagedFile as error:
        return str(error)
    if name is None:
        return "config.json names no architecture"
    methods = {packed.method for packed in quantization.packed.values()}
    for method in methods:
        if method not in _PACKAGES:
            return f"transformers loads {method} weights only with other packages or on a GPU"
        package = _PACKAGES[method]
        if package and importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
    needed = int(sum(t.nbytes for t in dense.tensors.values()) * _COPIES)
    if not streamed and needed > psutil.virtual_memory().available:
        return f"loading it takes about {needed:,} bytes of memory, which are not free"
    import transformers

    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        return f"transformers does not know model_type {config.get('model_type')!r}"
    if not hasattr(transformers, name):
        return f"transformers has no class {name}"
    return ""


def _library(quantization: Quantization, *, streamed: bool) -> str:
    if "gguf" in {packed.method for packed in quantization.packed.values()}:
        return f"gguf {metadata.version('gguf')}"
    names = ["safetensors" if streamed else "transformers"]
    for method in sorted({packed.method for packed in quantization.packed.values()}):
        names += [_PACKAGES[method].replace("_", "-")] if _PACKAGES.get(method) else []
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def _load(
    dense: Checkpoint, quantization: Quantization, base: Base | None, called: str
) -> Iterator[tuple[str, Array, str]]:
    """The weights by stored name as the library reads them, dequantized, and the dtype in which it holds
    them. Raises `CheckFailed` when it cannot."""
    if dense.is_gguf:
        for key, values in reload_weights(dense.shards[0].path, quantization.settings):
            yield key, values, "F32"
        return
    import torch

    model, info = _load_model(dense, called)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        _require_none({str(key) for key in info.get(kind) or ()}, kind, dense, base, called)
    with torch.no_grad():
        dequantized = dict(_bitsandbytes(model))
        stored, _ = sources(loading_rules(model), dense.tensors)
        for key, tensor in model.state_dict().items():
            name = stored.get(key, key)
            if key not in dequantized and tensor.is_floating_point() and not _is_code(name, quantization):
                yield name, _plain(tensor), STORED_NAMES.get(torch_name(tensor.dtype), "F32")
        for key, values in dequantized.items():
            yield stored.get(key, key), values, "F32"


def _stream(
    dense: Checkpoint, quantization: Quantization, base: Base | None, called: str
) -> Iterator[tuple[str, Array, str]]:
    """The quantized weights by stored name as the library dequantizes them, once the class has the names of
    the checkpoint. Raises `CheckFailed`."""
    try:
        name = first_class(dense.config or {})
        assert name is not None  # what `_impossible` found
        with quiet():
            model = build_on_meta(name, dense.config or {})
        for kind, keys in keys_apart(model, dense).items():
            _require_none(keys, kind, dense, base, called)
        with redirect_stderr(io.StringIO()):
            for name, values in library_weights(dense, quantization, model):
                yield name, values, "F32"
    except CheckFailed:
        raise
    except Exception as error:  # whatever a library raises is the finding
        raise CheckFailed(
            f"{_library(quantization, streamed=True)} cannot read {called}: {kind_and_line(error)}",
            hint=_REPORT,
        ) from error


def _compare_plain(dense: Checkpoint, called: str) -> int:
    """How many tensors safetensors reads as they were written. Raises `CheckFailed`."""
    try:
        return count_plain(dense)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckFailed(
            f"safetensors cannot read {called}: {kind_and_line(error)}", hint=_REPORT
        ) from error


def _require_none(
    keys: Collection[str], kind: str, dense: Checkpoint, base: Base | None, called: str
) -> None:
    """Raise `CheckFailed` for keys that transformers reports, of this `kind`."""
    found = set(keys) - (_harmless(keys, dense, base) if kind == "unexpected_keys" else set())
    if found:
        raise CheckFailed(
            f"transformers reports {kind.replace('_', ' ')} in {called}: {', '.join(sorted(found)[:3])}",
            hint=_REPORT,
        )


def _load_model(dense: Checkpoint, called: str) -> tuple[Any, Mapping[str, Any]]:
    """The model that transformers makes of a checkpoint's folder, and what it says of the names. Raises
    `CheckFailed`."""
    import transformers

    name = first_class(dense.config or {})
    assert name is not None  # what `_impossible` found
    with quiet(), redirect_stderr(io.StringIO()):  # compressed-tensors draws bars of its own
        try:
            with TemporaryDirectory(prefix="ia3-export-") as scratch:
                model, info = getattr(transformers, name).from_pretrained(
                    adapterless(dense, Path(scratch)),
                    dtype="auto",
                    output_loading_info=True,
                    trust_remote_code=False,
                )
            compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
            if compressor is not None and hasattr(compressor, "decompress_model"):
                compressor.decompress_model(model=model)
        except Exception as error:  # whatever a library raises is the finding
            raise CheckFailed(
                f"transformers cannot load {called} as {name}: {kind_and_line(error)}",
                hint=_REPORT,
            ) from error
    return model, info


def _harmless(unexpected: Collection[str], dense: Checkpoint, base: Base | None) -> set[str]:
    """Tensors of the base that the output's class does not have and does not need: the head of the class that
    it was, and biases of zeros, which AutoGPTQ writes for projections without one."""
    zero = {name for name in unexpected if name in dense.tensors and _is_zero(dense.tensors[name])}
    if base is None or architectures(dense.config or {}) == architectures(base.stored.config or {}):
        return zero
    return zero | (set(unexpected) & (base.stored.tensors.keys() | base.quantization.packed.keys()))


def _is_zero(tensor: StoredTensor) -> bool:
    return tensor.dtype in FLOAT_DTYPES and len(tensor.shape) == 1 and not read_values(tensor).any()


def _is_code(key: str, quantization: Quantization) -> bool:
    """Whether an entry holds codes under the name of the dense weight (8-bit floats that stay packed)."""
    packed = quantization.packed.get(key)
    return (
        packed is not None
        and key in packed.parts
        and packed.method not in ("compressed-tensors", "fp8", "mxfp4")
    )


def _bitsandbytes(model: Any) -> Iterator[tuple[str, Array]]:
    kinds = {"Linear4bit", "Linear8bitLt"}
    modules = {n: m for n, m in model.named_modules() if type(m).__name__ in kinds}
    if not modules:
        return
    import torch
    from bitsandbytes import functional
    from transformers.pytorch_utils import Conv1D

    for path, module in modules.items():
        if type(module).__name__ == "Linear4bit":
            module.weight.quant_state.dtype = torch.float32
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            weight = functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        turned = getattr(module, "source_cls", None) is Conv1D
        yield f"{path}.weight", _plain(weight.T if turned else weight)


def _plain(tensor: Any) -> Array:
    values: Array = tensor.detach().float().contiguous().cpu().numpy()
    return values
