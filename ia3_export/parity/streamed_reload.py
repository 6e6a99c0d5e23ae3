"""What a format's own library makes of a checkpoint, one weight after the other: no model is loaded.

bitsandbytes and compressed-tensors have dequantizers for single weights, and safetensors reads the rest.
Which names the model has, and which modules its library takes for quantized, is asked of its class on the
meta device.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from ia3_export.checkpoint.folder import Checkpoint, first_class
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import CheckFailed
from ia3_export.fold import Array
from ia3_export.libraries import compiling_later, never_expected, tied_weights
from ia3_export.models.answers import remembered
from ia3_export.models.conversions import loading_rules, state_entry
from ia3_export.models.model_class import build_on_meta, needed_entries, quiet, sources
from ia3_export.quantization.detection import Quantization
from ia3_export.quantization.packed import Packed, read_flat

#: Methods whose library dequantizes single weights, and by what; older compressed-tensors could not.
_DEQUANTIZERS = {
    "bitsandbytes": ("bitsandbytes.functional", "dequantize_4bit"),
    "compressed-tensors": ("compressed_tensors.entrypoints.convert", "CompressedTensorsDequantizer"),
}
#: Elements that are compared at a time.
_ELEMENTS = 1 << 22


def can_stream(dense: Checkpoint, quantization: Quantization) -> bool:
    """Whether every weight of a checkpoint can be had alone from its library."""
    if any(shard.path.suffix != ".safetensors" for shard in dense.shards):
        return False
    return all(_has_dequantizer(method) for method in {p.method for p in quantization.packed.values()})


def _has_dequantizer(method: str) -> bool:
    module, name = _DEQUANTIZERS.get(method, ("", ""))
    try:
        with compiling_later():
            return bool(module) and hasattr(import_module(module), name)
    except ImportError:
        return False


def class_facts(dense: Checkpoint, quantization: Quantization) -> dict[str, Any]:
    """What the class on the meta device says of a checkpoint's names, asked once: `keys_apart`, and as
    ``quantized`` and ``dense`` the modules that its library takes for such, while the file holds them
    otherwise."""
    facts = {
        "config": dense.config,
        "tensors": {name: [tensor.dtype, tensor.shape] for name, tensor in dense.tensors.items()},
        "quantized": {name: packed.method for name, packed in quantization.packed.items()},
        "settings": dict(quantization.settings),
    }
    return remembered("reload", facts, lambda: _ask_class(dense, quantization))


def _ask_class(dense: Checkpoint, quantization: Quantization) -> dict[str, Any]:
    name = first_class(dense.config or {})
    assert name is not None  # what the check found before
    with quiet():
        model = build_on_meta(name, dense.config or {})
    apart = {kind: sorted(keys) for kind, keys in keys_apart(model, dense).items()}
    if all(packed.method != "bitsandbytes" for packed in quantization.packed.values()):
        return {**apart, "quantized": [], "dense": []}
    stored, taken = _quantized_modules(quantization, model)
    return {**apart, "quantized": sorted(taken - stored), "dense": sorted(stored - taken)}


def keys_apart(model: Any, dense: Checkpoint) -> dict[str, Collection[str]]:
    """Entries that the class needs and the checkpoint lacks, stored names that the class does not have, and
    entries of other shapes, by transformers' words for them."""
    rules, tensors = loading_rules(model), dense.tensors
    stored, converted = sources(rules, tensors)
    needed = needed_entries(model, rules.state) - stored.keys() - converted.keys()
    used = {*stored.values(), *(name for names in converted.values() for name in names)}
    optional = [re.compile(expression) for expression in never_expected(model)]
    return {
        "missing_keys": needed - tied_weights(model).keys(),
        "unexpected_keys": {n for n in tensors.keys() - used if not any(o.search(n) for o in optional)},
        "mismatched_keys": {e for e, n in stored.items() if tuple(rules.state[e].shape) != tensors[n].shape},
    }


def library_weights(dense: Checkpoint, quantization: Quantization) -> Iterator[tuple[str, Array]]:
    """The quantized weights by stored name, as their library dequantizes them: float32, in the shape of the
    dense parameter. Raises `CheckFailed` where the library takes other modules for quantized."""
    methods = {packed.method for packed in quantization.packed.values()}
    converter = None
    if "compressed-tensors" in methods:
        import torch
        from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

        converter = CompressedTensorsDequantizer(str(dense.folder), dtype=torch.float32)
    for name, packed in quantization.packed.items():
        tensors = {part: _tensor(stored) for part, stored in packed.parts.items()}
        if converter is None:
            yield name, _of_bitsandbytes(packed, tensors)
            continue
        found = converter.process(tensors).get(name)
        if found is None or not found.is_floating_point():
            raise CheckFailed(
                f"compressed-tensors does not take {packed.module} for quantized, as config.json says it",
                hint="the targets and the list `ignore` of its quantization_config are at odds with the file",
            )
        yield name, found.float().numpy()


def _of_bitsandbytes(packed: Packed, tensors: Mapping[str, Any]) -> Array:
    import torch
    from bitsandbytes import functional

    if f"{packed.module}.SCB" in tensors:
        weight = functional.int8_vectorwise_dequant(tensors[packed.name], tensors[f"{packed.module}.SCB"])
    else:
        kept = {name.removeprefix(f"{packed.name}."): t for name, t in tensors.items() if name != packed.name}
        state = functional.QuantState.from_dict(kept, device=torch.device("cpu"))
        state.dtype = torch.float32
        weight = functional.dequantize_4bit(tensors[packed.name], state)
    values: Array = (weight.T if packed.conv1d else weight).float().contiguous().numpy()
    return values


def _quantized_modules(quantization: Quantization, model: Any) -> tuple[set[str], set[str]]:
    """Paths of the modules that are stored quantized, and of those that transformers makes layers of
    bitsandbytes of; `model` is changed."""
    from transformers.quantizers import AutoHfQuantizer

    rules = loading_rules(model)
    stored = {state_entry(rules, name)[0].removesuffix(".weight") for name in quantization.packed}
    with quiet():
        quantizer = AutoHfQuantizer.from_config(dict(quantization.settings), pre_quantized=True)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    kinds = ("Linear4bit", "Linear8bitLt")
    taken = {path for path, module in model.named_modules() if type(module).__name__ in kinds}
    return stored, taken


def _tensor(stored: StoredTensor) -> Any:
    """A stored tensor as safetensors gives it."""
    from safetensors import safe_open

    with safe_open(stored.file, framework="pt") as opened:
        return opened.get_tensor(stored.name)


def count_plain(dense: Checkpoint) -> int:
    """Compare what is stored as it is with what safetensors reads; how many tensors there were. Raises
    `CheckFailed`."""
    plain = [tensor for tensor in dense.tensors.values() if tensor.computed is None]
    for stored in plain:
        if not _is_read_alike(stored):
            raise CheckFailed(f"safetensors reads {stored.name} otherwise than it was written")
    return len(plain)


def _is_read_alike(stored: StoredTensor) -> bool:
    """Whether safetensors gives the bytes of a tensor, some rows at a time, each time from the file opened
    anew: what was read of it stays in memory as long as it is open."""
    import torch
    from safetensors import safe_open

    rows = stored.shape[0] if stored.shape else 1
    columns = stored.size // max(1, rows)
    step = max(1, _ELEMENTS // max(1, columns))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        with safe_open(stored.file, framework="pt") as opened:
            whole = not stored.shape
            read: Any = opened.get_tensor(stored.name) if whole else opened.get_slice(stored.name)[first:last]
            found = read.contiguous().view(-1).view(torch.uint8).numpy()
            ours = read_flat(stored, first * columns, (last - first) * columns).view("u1")
            if not np.array_equal(found, ours):
                return False
    return True
