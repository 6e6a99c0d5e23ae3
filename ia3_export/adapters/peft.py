"""Reader of PEFT's IA3 adapters (``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``).

Layout as written by ``PeftModel.save_pretrained`` (peft 0.4 to 0.21, ``utils/save_and_load.py``): keys
``base_model.model.<module path>.ia3_l``, shape (out, 1) on an output and (1, in) on an input of Linear and
Conv1D, (1, n, 1, 1[, 1]) for convolutions; further base tensors (``modules_to_save``, embeddings) lie beside
them under ``base_model.model.<name>``.

Keys that PEFT itself would load as nothing, leaving every vector at one, are read for what they
are, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ia3_export.adapters.model import (
    Adapter,
    Pattern,
    Site,
    TargetRules,
    as_pattern,
    inside,
    same_in_every_layer,
)
from ia3_export.adapters.sites import make_site, unwrapped_key
from ia3_export.adapters.source import Source
from ia3_export.checkpoint.folder import read_config
from ia3_export.checkpoint.header import Shard, StoredTensor, same_bytes
from ia3_export.checkpoint.manifest import MANIFEST
from ia3_export.checkpoint.wrapped import PEFT_PREFIX
from ia3_export.errors import DamagedFile, NotFound, Refused, ShapeMismatch, Unsupported, UnusedVector
from ia3_export.expressions import Matcher, check_expression
from ia3_export.fold import Direction

_VECTOR = ".ia3_l"
_OTHER_METHODS = re.compile(
    r"\.(lora_[A-Za-z_]+|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|vera_\w+|hra_u|ln_tuning\w*|fourierft\w*)(\.|$)"
)
#: What training leaves beside an adapter that PEFT does not load with it, such as LLaVA's projector.
_BESIDE = ("non_lora_trainables.*", "non_lora_state_dict.*", "mm_projector.*")


def is_peft(source: Source) -> bool:
    """Whether the configuration names a PEFT method."""
    return "peft_type" in source.config


def read_peft(source: Source) -> Adapter:
    """The adapter in files that PEFT wrote.

    Raises `Unsupported` (another PEFT method, a mixed adapter), `DamagedFile`, `Refused` (a configuration
    that contradicts the vectors, or leaves the direction of convolutions open), `ShapeMismatch`,
    `UnusedVector`.
    """
    config_file, config = source.config_file, source.config
    assert config_file is not None
    if config["peft_type"] != "IA3":
        raise Unsupported(
            f"{config_file} is a PEFT adapter of type {config['peft_type']}; ia3-export folds "
            "IA3 adapters only",
            hint="PEFT's own merge_and_unload() merges LoRA and its relatives",
        )
    for key in ("task_type", "base_model_name_or_path"):
        if not isinstance(config.get(key), str | None):
            raise DamagedFile(
                f"{config_file} has a {key} that is no text: {config[key]!r}", hint="fetch the file again"
            )
    warnings: list[str] = []
    vectors, extras = _sort_keys(source, warnings)
    warnings += [
        (
            f"{file.name} beside the adapter holds further trained weights (a projector), which are no "
            "part of it and are not merged"
        )
        for pattern in _BESIDE
        for file in sorted(source.folder.glob(pattern))
    ]
    rules = _read_rules(config_file, config, vectors, warnings)
    sites = {module: _read_site(module, tensor, rules) for module, tensor in vectors.items()}
    labels, config = _recorded(source, config)
    return Adapter(
        name=source.name,
        format="peft",
        location=source.location,
        files=source.files,
        sites=sites,
        extras=extras,
        rules=rules,
        config=config,
        labels=labels,
        warnings=tuple(warnings),
    )


def _recorded(source: Source, config: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """What ``convert``, ``combine`` keep beside an adapter, for which PEFT's configuration has no place."""
    try:
        manifest = read_config(source.folder / MANIFEST)
    except (NotFound, DamagedFile):
        return (), config
    labels = manifest.get("labels")
    named = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    added = {key: True for key in ("names_checked",) if manifest.get(key) is True}
    if isinstance(manifest.get("problem_type"), str):
        added["problem_type"] = manifest["problem_type"]
    return tuple(labels) if named and labels else (), {**config, **added}


def _sort_keys(
    source: Source, warnings: list[str]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Split the file into vectors by module path and extra tensors by their name in the trained model."""
    shard = source.weights
    own = source.folder.name
    extras: dict[str, StoredTensor] = {}
    by_adapter: dict[str, dict[str, StoredTensor]] = {}
    odd = []
    vector_key = _vector_key(shard, own)
    whole = (
        None if "peft_version" in source.config else {t.name.removeprefix(PEFT_PREFIX) for t in shard.tensors}
    )
    for tensor in shard.tensors:
        if _OTHER_METHODS.search(tensor.name):
            raise Unsupported(
                f"{shard.path} holds {tensor.name}, which is not IA3: a mixed or mislabelled adapter",
                hint="ia3-export folds IA3 alone; merge the other method with PEFT first",
            )
        key = unwrapped_key(tensor.name)
        name = key.removeprefix(PEFT_PREFIX)
        if key != tensor.name or name == key:
            odd.append(tensor.name)
        match = vector_key.fullmatch(name)
        if "original_module" in name.split("."):
            continue  # the base's own head, as PEFT keeps it beside the trained one
        if match is None:
            _add_extra(extras, _unwrapped(name, own, whole).replace(".base_layer.", "."), tensor)
            continue
        suffix = match["adapter"]
        # saving "en" also removed its name from the keys of "en2"
        owner = suffix.removeprefix(".") if suffix[:1] in ("", ".") else own + suffix
        _add(by_adapter.setdefault("" if owner == "weight" else owner, {}), match["module"], tensor)
    if odd:
        warnings.append(
            f"{len(odd)} keys of {shard.path.name} are not of PEFT's form, first: {odd[0]}; they were read "
            "all the same, PEFT would load such an adapter as ones"
        )
    vectors = _choose_adapter(shard, by_adapter, own, warnings)
    for name, tensor in extras.items():
        if name.rpartition(".")[0] in vectors and ".base_layer." not in tensor.name:
            raise Refused(
                f"{shard.path} holds {tensor.name} beside a vector for the same module; PEFT "
                "ignores that tensor",
                hint="remove it from the adapter, or put the weight into the base",
            )
    return vectors, extras


def _vector_key(shard: Shard, adapter: str) -> re.Pattern[str]:
    """An expression for the keys of vectors in `shard`, as the PEFT that wrote them named them.

    Of an adapter called ``ia3``, whatever its folder is called now, PEFT below 0.18 left ``_l``
    of ``.ia3_l``.
    """
    keys = [tensor.name for tensor in shard.tensors]
    if not any(_VECTOR in key for key in keys):
        for suffix in (_VECTOR.replace(f".{adapter}", ""), "_l"):
            if suffix and any(re.search(rf"{re.escape(suffix)}(\.|$)", key) for key in keys):
                return re.compile(rf"(?P<module>.+){re.escape(suffix)}(?P<adapter>|\.[^.]+)")
    return re.compile(rf"(?P<module>.+){re.escape(_VECTOR)}(?P<adapter>|\.[^.]+|[^.]+)")


def _unwrapped(name: str, adapter: str, whole: set[str] | None) -> str:
    """The model's name of a tensor that PEFT wrote under its wrapper's name, as it does resized embeddings.

    PEFT below 0.18 may have removed more than that from names; there the rest must be one of the `whole`
    names of the file.
    """
    name = re.sub(rf"\.modules_to_save\.(?:default|{re.escape(adapter)})\.", ".", name)
    plain = name.replace(".modules_to_save.", ".")
    return plain if whole is None or plain in whole else name


def _add_extra(extras: dict[str, StoredTensor], name: str, tensor: StoredTensor) -> None:
    """Add a tensor of ``modules_to_save``.

    Of a resized embedding PEFT writes the same twice, once under its wrapper's name.
    """
    if name not in extras or not same_bytes(extras[name], tensor):
        _add(extras, name, tensor)


def _add(table: dict[str, StoredTensor], name: str, tensor: StoredTensor) -> None:
    if name in table:
        raise DamagedFile(
            f"{tensor.file} holds {name} twice, as {table[name].name} and as {tensor.name}",
            hint="save the adapter again with PEFT's save_pretrained()",
        )
    table[name] = tensor


def _choose_adapter(
    shard: Shard, by_adapter: Mapping[str, dict[str, StoredTensor]], own: str, warnings: list[str]
) -> dict[str, StoredTensor]:
    """Choose the adapter's own vectors among those of several adapters in one file.

    Those without any adapter's name, else those of its `own`, or of the only name there is.

    Before peft 0.20, saving one of several IA3 adapters wrote the keys of all of them.
    """
    if not by_adapter:
        raise Refused(
            f"{shard.path} holds no IA3 vector",
            hint="was the adapter saved before training, or with the wrong adapter name?",
        )
    chosen = next((name for name in ("", own, "default") if name in by_adapter), None)
    if chosen is None and len(by_adapter) > 1:
        raise UnusedVector(
            f"{shard.path} holds vectors of {', '.join(sorted(by_adapter))}, and none without "
            "an adapter's name",
            hint="save each adapter alone: save_pretrained(..., selected_adapters=[name])",
        )
    chosen = next(iter(by_adapter)) if chosen is None else chosen
    others = {name: len(vectors) for name, vectors in by_adapter.items() if name != chosen}
    if others:
        warnings.append(
            f"{shard.path.name} also holds {sum(others.values())} vectors of other adapters "
            f"({', '.join(sorted(others))}), which are left out"
        )
    return by_adapter[chosen]


def _read_rules(
    config_file: Path, config: Mapping[str, Any], vectors: Mapping[str, StoredTensor], warnings: list[str]
) -> TargetRules:
    patterns = {
        key: _read_pattern(config_file, config, key)
        for key in ("target_modules", "feedforward_modules", "exclude_modules")
    }
    target, inputs, exclude = patterns.values()
    to_save = _saved(config_file, config.get("modules_to_save"))
    if inputs is None:
        inputs = _by_shape(config_file, vectors)
        warnings.append(
            f"{config_file.name} has no feedforward_modules: by the shapes of the vectors, inputs are "
            f"scaled in {len(inputs or ())} modules (PEFT takes a table of model types instead)"
        )
    if target is None:
        warnings.append(
            f"{config_file.name} has no target_modules: what the vectors are on, in all "
            "layers, counts as them"
        )
        target = same_in_every_layer(vectors)
    rules = TargetRules(
        target=target, feedforward=inputs, exclude=exclude, to_save=to_save, matcher=Matcher(str(config_file))
    )
    rules.look_at(vectors)
    return rules


def _read_pattern(config_file: Path, config: Mapping[str, Any], key: str) -> Pattern:
    try:
        return as_pattern(config.get(key))
    except ValueError as error:
        raise DamagedFile(
            f"{config_file} has {key} that cannot be read: {error}",
            hint="it is a list of names or one regular expression",
        ) from None


def _by_shape(config_file: Path, vectors: Mapping[str, StoredTensor]) -> Pattern:
    """The modules whose vector is (1, n), which scales their input.

    Raises `Refused` where a shape is the same either way (convolutions).
    """
    unclear = [name for name, t in vectors.items() if len(t.shape) != 2 or t.shape == (1, 1)]
    if unclear:
        raise Refused(
            f"{config_file} has no feedforward_modules, and the vector of {unclear[0]} does not tell by "
            "its shape whether it scales an input",
            hint='add "feedforward_modules": [...] with the modules whose input is scaled',
        )
    return tuple(sorted(name for name, tensor in vectors.items() if tensor.shape[0] == 1))


def _saved(config_file: Path, value: object) -> tuple[str, ...]:
    try:
        names = as_pattern([value] if isinstance(value, str) else value) or ()
        for name in names:
            check_expression(inside(name))
    except ValueError as error:
        raise DamagedFile(
            f"{config_file} has modules_to_save that cannot be read: {error}",
            hint="it is a list of names, which PEFT takes for parts of a regular expression",
        ) from None
    return tuple(sorted(names))


def _read_site(module: str, tensor: StoredTensor, rules: TargetRules) -> Site:
    shape = tensor.shape
    where = f"{tensor.file}: the vector of {module}"
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
    return make_site(module, shaped, tensor)
