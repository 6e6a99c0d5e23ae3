"""What a checkpoint's configuration says of its quantization, wherever it says it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ia3_export.checkpoint.folder import Checkpoint, read_config

#: Files beside config.json that some quantizers write.
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json")
#: Patterns that may take exponential time: a repeated group that repeats something itself.
_EXPLODES = re.compile(r"[*+}][^)]*\)[*+{]|(\.[*+].*){6}")
_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One entry of compressed-tensors' ``config_groups``."""

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]


def read_settings(base: Checkpoint) -> dict[str, Any]:
    """The quantization settings of a checkpoint; ``{}`` when nothing states any.

    Old GPTQ and AWQ repositories keep them in a file of their own, composed models in a sub-configuration.
    """
    config = base.config or {}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _KEYS:
            if isinstance(part.get(key), dict):
                return dict(part[key])
    for name in SIDE_FILES:
        if name in base.side_files:
            found = read_config(base.folder / name)
            if name == "quantize_config.json":
                return {"quant_method": "gptq"} | found
            if name == "quant_config.json":
                return {"quant_method": "awq"} | _awq_names(found)
            if name == "quanto_qmap.json":
                return {"quant_method": "quanto", "qmap": found, "model": config}
            return {"quant_method": "modelopt"} | dict(found.get("quantization") or found)
    return {}


def _awq_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    return {names.get(key, key): value for key, value in settings.items()}


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as that of a dense checkpoint."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    return {
        key: {k: v for k, v in value.items() if k not in _KEYS} if isinstance(value, dict) else value
        for key, value in plain.items()
    }


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with other quantization settings, in the place where it has them."""
    if any(key in config for key in _KEYS):
        return {key: dict(settings) if key in _KEYS else value for key, value in config.items()}
    return {
        key: with_settings(value, settings)
        if isinstance(value, dict) and not value.keys().isdisjoint(_KEYS)
        else value
        for key, value in config.items()
    }


#: Where a method's settings list the modules that are not quantized.
_SKIP_LISTS = {
    "awq": "modules_to_not_convert", "fp8": "modules_to_not_convert", "fbgemm_fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert", "torchao": "modules_to_not_convert", "compressed-tensors": "ignore",
    "modelopt": "ignore", "hqq": "skip_modules",
}  # fmt: skip


def exclude(
    settings: Mapping[str, Any], modules: Collection[str], dense: Collection[str]
) -> dict[str, Any] | str:
    """`settings` that say that `modules` are no longer quantized, or why they cannot say it; `dense` are all modules of the
    output with a dense weight of two dimensions."""
    method = str(settings.get("quant_method"))
    edited = dict(settings)
    if method == "bitsandbytes":
        # None means the library's own choice, which a list replaces: it has to name them all
        edited["llm_int8_skip_modules"] = sorted(dense)
    elif method == "gptq":
        rules: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in sorted(modules)}
        edited["dynamic"] = {**rules, **(settings.get("dynamic") or {})}
    elif method in _SKIP_LISTS:
        key = "ignored_layers" if "ignored_layers" in settings else _SKIP_LISTS[method]
        listed = settings.get(key) or []
        if not isinstance(listed, list):
            return f"{key} in the configuration is no list"
        before = list(listed)
        edited[key] = before + sorted(set(modules) - set(before))
    else:
        return f"settings of {method} have no list of modules that are not quantized"
    return edited


def promote(settings: Mapping[str, Any], groups: Collection[str]) -> dict[str, Any]:
    """`settings` of compressed-tensors in which the weights of `groups` have a scale a channel."""
    content = {
        name: group | {"weights": group["weights"] | {"strategy": "channel"}} if name in groups else group
        for name, group in settings["config_groups"].items()
    }
    return dict(settings) | {"config_groups": content}


def schemes(settings: Mapping[str, Any]) -> Iterator[Scheme]:
    """The groups of a compressed-tensors configuration."""
    groups = settings.get("config_groups")
    for name, content in (groups if isinstance(groups, dict) else {}).items():
        if isinstance(content, dict):
            targets = tuple(str(target) for target in content.get("targets") or ())
            yield Scheme(str(name), targets, content.get("weights") or {})


def scheme_of(settings: Mapping[str, Any], module: str) -> Scheme | None:
    """The group that `module` belongs to: by its path, else by its class, of which a checkpoint only knows Linear."""
    found = list(schemes(settings))
    for scheme in found:
        if any(_matches(target, module) for target in scheme.targets):
            return scheme
    return next((scheme for scheme in found if "Linear" in scheme.targets), None)


def _matches(target: str, module: str) -> bool:
    """Whether a name or ``re:`` pattern of compressed-tensors means `module`."""
    if target.startswith("re:"):
        if _EXPLODES.search(target):
            return False
        try:
            return re.match(target.removeprefix("re:"), module) is not None
        except re.error:
            return False
    return target == module


def block_shape(settings: Mapping[str, Any], scheme: Scheme | None) -> tuple[int, int] | None:
    """Rows and columns of an FP8 block, as configured."""
    size: Any = settings.get("weight_block_size")
    if scheme is not None:
        size = scheme.weights.get("block_structure") or size
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return int(size[0]), int(size[1])
    return None
