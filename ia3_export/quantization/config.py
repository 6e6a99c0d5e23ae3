"""What a checkpoint's configuration says of its quantization, wherever it says it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ia3_export.checkpoint.folder import Checkpoint, read_config
from ia3_export.expressions import bound_expressions
from ia3_export.ordering import enclosing

#: Files beside config.json in which some quantizers keep their settings, or once more a copy of them.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json")
#: auto-round's copy of what config.json says: never the only place.
_COPY = "quantization_config.json"
#: All that quantizers leave beside the weights, and that is not true of a dense output: settings, logs,
#: recipes.
SIDE_FILES = (*SETTINGS_FILES, _COPY, "quant_log.csv", "recipe.yaml")
#: What stands before an expression: compressed-tensors' mark, GPTQModel's for what is and is not quantized.
_MARKS = re.compile(r"^(re:|[+-]:)")
_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One entry of compressed-tensors' ``config_groups``."""

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]


def read_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The quantization settings of a checkpoint; ``{}`` when nothing states any.

    Old GPTQ and AWQ repositories keep them in a file of their own, composed models in a sub-configuration.
    """
    config = checkpoint.config or {}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _KEYS:
            if isinstance(part.get(key), dict):
                return dict(part[key])
    for name in SETTINGS_FILES:
        if name in checkpoint.side_files:
            found = read_config(checkpoint.folder / name)
            if name == "quantize_config.json":
                return {"quant_method": "gptq"} | found
            if name == "quant_config.json":
                return {"quant_method": "awq"} | _awq_names(found)
            if name == "quanto_qmap.json":
                return {"quant_method": "quanto", "qmap": found, "model": config}
            return {"quant_method": "modelopt"} | dict(found.get("quantization") or found)
    return {}


def check_expressions(where: str, settings: Mapping[str, Any], modules: Collection[str]) -> None:
    """Raise `DamagedFile` where an expression in `settings` takes too long with the names of `modules`: here
    and in the libraries, which take most texts in them for expressions."""
    names = {outer for module in modules for outer in enclosing(module)}
    bound_expressions(where, {_MARKS.sub("", text) for text in _texts(settings)}, names)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from (key, *_texts(entry))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


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
    "mxfp4": "modules_to_not_convert", "torchao": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules", "compressed-tensors": "ignore", "modelopt": "ignore",
    "hqq": "skip_modules",
}  # fmt: skip
#: The same lists under names that some files have instead.
_OTHER_LISTS = ("ignored_layers", "exclude_modules")
#: Without a list these choose for themselves (the head, in most models): a list replaces that, and has to
#: name all.
_CHOOSE = ("bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4", "torchao")
#: These quantize projections of the layers only, and never a head that is not named.
ONLY_BLOCKS = ("gptq", "auto-round")
#: What reads files in which some weights are dense, where not everything does that reads the format.
_READ_BY = {
    "gptq": (
        "GPTQModel, vLLM, and transformers with optimum know them by name; AutoGPTQ cannot load such a file"
    ),
    "auto-round": "auto-round, and transformers through it, know them by name (extra_config)",
}
#: Projections that vLLM and SGLang load as one, all of them quantized or none.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Which modules of an output are quantized: `leaving` are no longer, `staying` still are, and `dense` are
    all with a dense weight of two dimensions."""

    leaving: Collection[str]
    staying: Collection[str]
    dense: Collection[str]


class CannotExclude(Exception):
    """Settings cannot say that a module is not quantized. The text is a clause that says why; the planner
    catches it."""


def exclude(settings: Mapping[str, Any], mixture: Mixture) -> dict[str, Any]:
    """`settings` that say which modules of `mixture` are quantized, in the words of every library that reads
    the format. Raises `CannotExclude`."""
    method = str(settings.get("quant_method"))
    edited = dict(settings)
    for key in ("dynamic", "extra_config"):
        if not isinstance(settings.get(key) or {}, dict):
            raise CannotExclude(f"{key} in the configuration is no table")
    if method in ("gptq", "awq"):  # GPTQModel and vLLM; first, since the first rule that matches counts
        rules: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in sorted(mixture.leaving)}
        edited["dynamic"] = {**rules, **(settings.get("dynamic") or {})}
        if settings.get("lm_head") and "lm_head" in mixture.leaving:
            edited["lm_head"] = False
    if method == "gptq":  # optimum, which does not know `dynamic`
        edited["modules_in_block_to_quantize"] = [_by_ending(mixture)]
    elif method == "auto-round":
        rest = settings.get("extra_config") or {}
        plain = {"bits": 16, "data_type": "float"}
        edited["extra_config"] = {**rest, **{module: dict(plain) for module in sorted(mixture.leaving)}}
    elif method in _SKIP_LISTS:
        key = next((name for name in _OTHER_LISTS if name in settings), _SKIP_LISTS[method])
        listed = settings.get(key)
        if listed is None:
            listed = sorted(mixture.dense) if method in _CHOOSE else []
        if not isinstance(listed, list):
            raise CannotExclude(f"{key} in the configuration is no list")
        edited[key] = [*listed, *sorted(set(mixture.leaving) - set(map(str, listed)))]
    else:
        own = f"settings of {method}" if settings.get("quant_method") else "its settings"
        raise CannotExclude(f"{own} have no list of modules that are not quantized")
    return edited


def exclude_beside(checkpoint: Checkpoint, method: str, mixture: Mixture) -> dict[str, dict[str, Any]]:
    """The settings that `checkpoint` has beside its config.json, by file, edited like those within.

    GPTQModel reads such a file before config.json. Raises `CannotExclude`.
    """
    edited: dict[str, dict[str, Any]] = {}
    for name in (*SETTINGS_FILES, _COPY):
        if name not in checkpoint.side_files:
            continue
        whole = read_config(checkpoint.folder / name)
        own = whole
        if name == "hf_quant_config.json" and isinstance(whole.get("quantization"), dict):
            own = {"exclude_modules": []} | whole["quantization"]
        found = exclude({"quant_method": method} | own, mixture)
        if "quant_method" not in own:
            del found["quant_method"]
        edited[name] = found if own is whole else whole | {"quantization": found}
    return edited


def mixture_warnings(method: str, mixture: Mixture) -> Iterator[str]:
    """What cannot load a file in which the modules of `mixture` are dense, for people."""
    if method in _READ_BY:
        yield f"{len(mixture.leaving)} weights are dense among quantized ones: {_READ_BY[method]}"
    split = sorted(
        module
        for module in mixture.leaving
        for names in _FUSED
        if module.rpartition(".")[2] in names
        and any(f"{module.rpartition('.')[0]}.{name}" in mixture.staying for name in names)
    )
    if split:
        yield (
            f"{split[0]} is dense and what vLLM and SGLang fuse with it is not ({len(split)} such "
            "weights): they cannot load such a file"
        )


def _by_ending(mixture: Mixture) -> list[str]:
    """The modules that stay quantized by the ends of their names: those behind the number of the layer, and
    whole names where such an end would be that of a dense one too."""
    others = [*mixture.leaving, *mixture.dense]
    ends: dict[str, bool] = {}
    found: dict[str, None] = {}
    for module in sorted(mixture.staying):
        end = re.sub(r"^.*?\.\d+\.", "", module)
        if end not in ends:
            ends[end] = not any(other.endswith(end) for other in others)
        found[end if ends[end] else module] = None
    return list(found)


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
    """The group that `module` belongs to: by its path, else by its class, of which a checkpoint only knows
    Linear."""
    found = list(schemes(settings))
    for scheme in found:
        if any(_matches(target, module) for target in scheme.targets):
            return scheme
    return next((scheme for scheme in found if "Linear" in scheme.targets), None)


def _matches(target: str, module: str) -> bool:
    """Whether a name or ``re:`` pattern of compressed-tensors means `module`."""
    if target.startswith("re:"):
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
