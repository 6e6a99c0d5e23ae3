"""Reader of PEFT's IA3 adapters (``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``).

Layout as written by ``PeftModel.save_pretrained`` (peft 0.4 to 0.21, ``utils/save_and_load.py``): keys
``base_model.model.<module path>.ia3_l``, shape (out, 1) on an output and (1, in) on an input of Linear and
Conv1D, (1, n, 1, 1[, 1]) for convolutions; further base tensors (``modules_to_save``, embeddings) lie beside
them under ``base_model.model.<name>``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ia3_export.adapters.model import Adapter, Site, TargetRules, as_pattern
from ia3_export.checkpoint.folder import read_config
from ia3_export.checkpoint.header import Shard, StoredTensor, read_header, read_values
from ia3_export.checkpoint.hub import Location, locate
from ia3_export.errors import DamagedFile, NotFound, Refused, ShapeMismatch, Unsupported, UnusedVector
from ia3_export.fold import FLOAT_DTYPES, Direction

_PREFIX = "base_model.model."
_VECTOR_KEY = re.compile(r"(?P<module>.+)\.ia3_l(\.(?P<adapter>[^.]+))?")
_OTHER_METHODS = re.compile(
    r"\.(lora_[A-Za-z_]+|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|vera_\w+|hra_u|ln_tuning\w*|fourierft\w*)(\.|$)"
)


def read_peft(source: str | Path) -> Adapter:
    """Read a PEFT IA3 adapter: its folder, the folder above a named adapter, its weight file, or a hub id.

    Raises `NotFound`, `DamagedFile`, `Unsupported` (another PEFT method, a mixed adapter), `Refused` (a
    configuration that does not say the directions, or contradicts the vectors), `ShapeMismatch`,
    `UnusedVector` (keys that PEFT would not load either).
    """
    location = locate(source)
    folder = _adapter_folder(location)
    config_file = folder / "adapter_config.json"
    config = read_config(config_file)
    _check_type(config_file, config)
    for key in ("task_type", "base_model_name_or_path"):
        if not isinstance(config.get(key), str | None):
            raise DamagedFile(
                f"{config_file} has a {key} that is no text: {config[key]!r}", hint="fetch the file again"
            )
    shard = _read_weights(location, folder)
    vectors, extras = _sort_keys(shard, folder.name)
    rules = _read_rules(config_file, config, vectors)
    sites = {module: _read_site(module, tensor, rules) for module, tensor in vectors.items()}
    name = location.hub_id.rpartition("/")[2] if location.hub_id and folder == location.path else folder.name
    files = (config_file.name, shard.path.name)
    return Adapter(
        name, "peft", Location(location.given, folder, location.hub_id, location.revision), files,
        sites, extras, rules, config,
    )  # fmt: skip


def _adapter_folder(location: Location) -> Path:
    path = location.path if location.path.is_dir() else location.path.parent
    path = path.resolve() if path.name in ("", ".", "..") else path
    if (path / "adapter_config.json").is_file():
        return path
    if location.path.is_dir():
        named = sorted(file.parent for file in path.glob("*/adapter_config.json"))
        if len(named) == 1:
            return named[0]
        if named:
            raise NotFound(
                f"{path} holds several adapters: {', '.join(folder.name for folder in named)}",
                hint=f"name one of them, for example --adapter {named[0]}",
            )
    raise NotFound(
        f"{path} holds no adapter_config.json",
        hint="give the folder that PeftModel.save_pretrained() wrote",
    )


def _check_type(config_file: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind == "IA3":
        return
    if kind is None:
        raise Unsupported(
            f"{config_file} has no peft_type: it is no PEFT adapter",
            hint="this version reads adapters that PEFT's save_pretrained() wrote",
        )
    raise Unsupported(
        f"{config_file} is a PEFT adapter of type {kind}; ia3-export folds IA3 adapters only",
        hint="PEFT's own merge_and_unload() merges LoRA and its relatives",
    )


def _read_weights(location: Location, folder: Path) -> Shard:
    candidates = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    if location.path.is_file() and location.path.name != "adapter_config.json":
        candidates = [location.path]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise NotFound(
            f"{folder} holds neither adapter_model.safetensors nor adapter_model.bin",
            hint="the adapter was saved incompletely; save it again with save_pretrained()",
        )
    if file.suffix == ".safetensors":
        return read_header(file)
    from ia3_export.checkpoint.pickled import read_bin

    return read_bin(file)


def _sort_keys(shard: Shard, adapter_name: str) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Split the file into vectors by module path and extra tensors by their name in the trained model."""
    vectors: dict[str, StoredTensor] = {}
    extras: dict[str, StoredTensor] = {}
    for tensor in shard.tensors:
        if _OTHER_METHODS.search(tensor.name):
            raise Unsupported(
                f"{shard.path} holds {tensor.name}, which is not IA3: a mixed or mislabelled adapter",
                hint="ia3-export folds IA3 alone; merge the other method with PEFT first",
            )
        if not tensor.name.startswith(_PREFIX):
            raise UnusedVector(
                f"{shard.path}: key {tensor.name} does not begin with {_PREFIX!r}; PEFT would not load it either",
                hint="save the adapter with PeftModel.save_pretrained(), not with torch.save of a state dict",
            )
        name = tensor.name.removeprefix(_PREFIX)
        match = _VECTOR_KEY.fullmatch(name)
        if match is None:
            name = name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
            extras[name] = tensor
        elif match["adapter"] in (None, "default", adapter_name):
            if match["module"] in vectors:
                raise DamagedFile(
                    f"{shard.path} holds two vectors for module {match['module']}",
                    hint="save the adapter again with PEFT's save_pretrained()",
                )
            vectors[match["module"]] = tensor
        else:
            raise UnusedVector(
                f"{shard.path}: key {tensor.name} belongs to another adapter, {match['adapter']!r}",
                hint="save each adapter alone: save_pretrained(..., selected_adapters=[name])",
            )
    for name, tensor in extras.items():
        if name.rpartition(".")[0] in vectors and ".base_layer." not in tensor.name:
            raise Refused(
                f"{shard.path} holds {tensor.name} beside a vector for the same module; PEFT ignores that tensor",
                hint="remove it from the adapter, or put the weight into the base",
            )
    if not vectors:
        raise Refused(
            f"{shard.path} holds no IA3 vector",
            hint="was the adapter saved before training, or with the wrong adapter name?",
        )
    return vectors, extras


def _read_rules(config_file: Path, config: dict[str, Any], vectors: dict[str, StoredTensor]) -> TargetRules:
    if config.get("feedforward_modules") is None:
        inputs = {
            name.rpartition(".")[2] for name, t in vectors.items() if t.shape[:1] == (1,) != t.shape[-1:]
        }
        raise Refused(
            f"{config_file} has no feedforward_modules, so it does not say which vectors scale an input",
            hint=f'by their shapes, "feedforward_modules": {sorted(inputs)}; add it if that is what was trained'
            .replace("'", '"'),
        )  # fmt: skip
    if config.get("target_modules") is None:
        raise Refused(
            f"{config_file} has no target_modules", hint="add the names of the modules that were adapted"
        )
    try:
        return TargetRules(
            as_pattern(config["target_modules"]),
            as_pattern(config["feedforward_modules"]),
            as_pattern(config.get("exclude_modules")),
            _saved(config.get("modules_to_save")),
        )
    except (ValueError, re.error, TypeError) as error:
        raise DamagedFile(
            f"{config_file} has target_modules, feedforward_modules, exclude_modules or modules_to_save "
            f"that cannot be read: {error}",
            hint="each is a list of names or one regular expression",
        ) from None


def _saved(value: object) -> tuple[str, ...]:
    names = as_pattern([value] if isinstance(value, str) else value) or ()
    for name in names:
        re.compile(name)
    return tuple(names)


def _read_site(module: str, tensor: StoredTensor, rules: TargetRules) -> Site:
    shape = tensor.shape
    where = f"{tensor.file}: the vector of {module}"
    if tensor.dtype not in FLOAT_DTYPES:
        raise Unsupported(
            f"{where} has dtype {tensor.dtype}", hint="IA3 vectors are float64, float32, float16 or bfloat16"
        )
    long = [axis for axis, extent in enumerate(shape) if extent != 1]
    if len(shape) not in (2, 4, 5) or len(long) > 1 or (len(shape) > 2 and long not in ([], [1])):
        raise ShapeMismatch(
            f"{where} has shape {list(shape)}",
            hint="PEFT writes (n, 1) or (1, n) for Linear and (1, n, 1, 1[, 1]) for convolutions",
        )
    configured: Direction = "in" if rules.is_feedforward(module) else "out"
    shaped: Direction = configured
    if len(shape) == 2 and long:
        shaped = "in" if long == [1] else "out"
    if shaped != configured:
        raise Refused(
            f"{where} has shape {list(shape)}, so it scales the module's {shaped}put, but by "
            f"feedforward_modules it would scale the {configured}put",
            hint="adapter_config.json is not the one this adapter was trained with",
        )
    return Site(module, shaped, read_values(tensor).reshape(-1), shape, tensor.dtype)
