"""The reload check: what was written, opened through the library that its users use, and compared weight by
weight.

A file that only we can read would be worth nothing. The dequantizers of bitsandbytes, compressed-tensors and
gguf make each weight what we read it as, or transformers loads the whole folder on the CPU.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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
from ia3_export.models.answers import remembered
from ia3_export.models.conversions import loading_rules
from ia3_export.models.model_class import quiet, sources
from ia3_export.parity.streamed_reload import (
    can_stream,
    class_facts,
    count_plain,
    library_weights,
)
from ia3_export.quantization.base import Base, read_base
from ia3_export.quantization.detection import Quantization
from ia3_export.quantization.gguf import reload_weights
from ia3_export.quantization.packed import read_flat
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
#: Weights that are compared at a time, beside one that is read, and elements of each.
_THREADS = 2
_BLOCK = 1 << 20
#: transformers' words for what a checkpoint has too little, too much and otherwise.
_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")
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
    library = _library(quantization, streamed=streamed)
    with ThreadPoolExecutor(_THREADS) as pool:
        plain = pool.submit(_compare_plain, dense, called) if streamed else None
        read = (_stream if streamed else _load)(dense, quantization, base, called)
        errors = list(_errors(read, dense, quantization, library, pool))
        compared = len(errors) + (plain.result() if plain is not None else 0)
    if not compared:
        return Reload(library, 0, 0.0, f"{library} has none of the weights under a name of the file")
    return Reload(library, compared, max(errors, default=0.0), "")


def _errors(
    read: Iterator[tuple[str, Array, str]],
    dense: Checkpoint,
    quantization: Quantization,
    library: str,
    pool: Executor,
) -> Iterator[float]:
    """The relative difference of every weight that was `read`, beside which earlier ones are compared in
    `pool`. Raises `CheckFailed` for one that is more than rounding."""
    pending: deque[tuple[str, Future[float]]] = deque()
    for name, found, dtype in read:
        written = dense.tensors.get(name)
        if written is None or written.dtype not in FLOAT_DTYPES:
            continue
        if found.size != written.size:
            raise CheckFailed(
                f"{library} reads {name} as {list(found.shape)}, it was written as {list(written.shape)}",
                hint=_REPORT,
            )
        held = written.dtype if name in quantization.packed else dtype
        pending.append((name, pool.submit(_difference, found, written, held)))
        if len(pending) >= _THREADS:
            yield _within_rounding(*pending.popleft(), quantization, library)
    for name, error in pending:
        yield _within_rounding(name, error, quantization, library)


def _within_rounding(name: str, error: Future[float], quantization: Quantization, library: str) -> float:
    packed = quantization.packed.get(name)
    limit, found = TOLERANCE.get(packed.method if packed else "dense", _SIXTEEN_BITS), error.result()
    if not found <= limit:
        raise CheckFailed(
            f"{library} reads {name} with a relative difference of {found:.2e} to what was written "
            f"(at most {limit:.0e} is rounding)",
            hint=_REPORT,
        )
    return found


def _difference(found: Array, written: StoredTensor, dtype: str) -> float:
    """Relative difference (Frobenius norm) to what was written, as `dtype` holds it; zero where both are
    equal, infinities too."""
    unit = written.computed.unit if written.computed is not None else 1
    step = max(_BLOCK // unit, 1) * unit
    flat, apart, whole = found.reshape(-1), 0.0, 0.0
    for first in range(0, written.size, step):
        part = flat[first : first + step]
        wanted = to_float(read_flat(written, first, len(part)), written.dtype).reshape(-1)
        if dtype != written.dtype:  # one rounding, which is not ours
            wanted = to_float(from_float(np.array(wanted), dtype), dtype)
        whole += float(np.vdot(wanted, wanted))
        if not np.array_equal(part, wanted):
            apart += float(np.sum(np.square(part.astype("<f4") - wanted), dtype="f8"))
    if not apart:
        return 0.0
    return math.sqrt(apart / (whole or 1.0)) if math.isfinite(whole) else math.inf


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
    return remembered(
        "unknown class", [config.get("model_type"), name], lambda: _unknown(config.get("model_type"), name)
    )


def _unknown(model_type: object, name: str) -> str:
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return f"transformers does not know model_type {model_type!r}"
    return "" if hasattr(transformers, name) else f"transformers has no class {name}"


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
    for kind in _KINDS:
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
        facts = class_facts(dense, quantization)
        for kind in _KINDS:
            _require_none(facts[kind], kind, dense, base, called)
        for kind in ("quantized", "dense"):
            if facts[kind]:
                raise CheckFailed(
                    f"transformers takes {facts[kind][0]} for {kind}, the file holds it otherwise",
                    hint="llm_int8_skip_modules of its quantization_config is at odds with the file",
                )
        with redirect_stderr(io.StringIO()):
            for name, values in library_weights(dense, quantization):
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
