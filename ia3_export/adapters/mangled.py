"""Module paths that PEFT damaged while saving.

peft 0.4 to 0.17 removed the adapter's name from the keys by replacing ``.<name>`` wherever it occurs
(``get_peft_model_state_dict``): of an adapter called ``layer``, ``bert.encoder.layer.0...`` is saved as
``bert.encoder.0...``, and of one called ``k``, ``self_attn.k_proj`` as ``self_attn_proj``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.wrapped import PEFT_PREFIX
from ia3_export.errors import Refused

#: What PEFT always saves of a classifier (``PeftModelForSequenceClassification``).
_CLASSIFIERS = ("classifier", "score")


def may_be_damaged(adapter: Adapter) -> bool:
    """Whether PEFT below 0.18 can have written the names.

    Later versions record themselves, and we what was checked.
    """
    return adapter.format == "peft" and not {"peft_version", "names_checked"} & adapter.config.keys()


def restore_names(adapter: Adapter, modules: Collection[str]) -> Adapter | None:
    """`adapter` with the module paths it must have had, given the `modules` of its base.

    None when nothing explains them.

    The name that was removed is the adapter's own or, where the folder has another name now, any beginning of
    a path's components (but not a whole one everywhere). It must explain every vector, and every head that
    lost its path, each by one targeted module only, and no other name may explain them differently. Raises
    `Refused` when the removal made two keys one.
    """
    if not may_be_damaged(adapter):
        return None
    vectors = adapter.modules - set(modules)
    heads = {
        name.rpartition(".")[0]
        for name in adapter.extras
        if "." not in name or "modules_to_save" in name.split(".")
    }
    if not (vectors or heads):
        return None
    whole = adapter.modules - vectors
    free = set(filter(adapter.rules.targets, modules)) - whole
    heads_of = {*modules, *adapter.rules.to_save, *_CLASSIFIERS}
    explanations: dict[str, dict[str, str]] = {}
    for name in _names(adapter, modules):
        if any(f".{name}" in f"{PEFT_PREFIX}{module}" for module in whole):
            continue  # it would have been removed there as well
        found = _explain(name, vectors, free, "")
        for wrapper in (f".modules_to_save.{name}", f".{name}"):
            found |= _explain(name, heads, heads_of, wrapper)
        if found.keys() != vectors | heads:
            continue
        if name == adapter.name:
            _refuse_collisions(adapter, name, modules)
            return _renamed(adapter, name, found)
        # a level of the path that is gone everywhere is rather another class of the model, or another model
        if name.isdigit() or not all(f".{name}." in f"{PEFT_PREFIX}{found[lost]}." for lost in vectors):
            explanations[name] = found
    if not explanations or any(found != next(iter(explanations.values())) for found in explanations.values()):
        return None
    name, found = next(iter(explanations.items()))
    _refuse_collisions(adapter, name, modules)
    return _renamed(adapter, name, found)


def _saved(name: str, module: str, wrapper: str = "") -> str:
    """The path in the key under which PEFT saved `module` of an adapter called `name`."""
    key = f"{PEFT_PREFIX}{module}{wrapper}.".replace(f".{name}", "")
    return key.removeprefix(PEFT_PREFIX).removesuffix(".")


def _refuse_collisions(adapter: Adapter, name: str, modules: Collection[str]) -> None:
    """Raise `Refused` for two modules that have the same path after the removal.

    The file holds the vector of one of them, nobody knows of which.
    """
    first: dict[str, str] = {}
    for module in sorted(filter(adapter.rules.targets, modules)):
        other = first.setdefault(_saved(name, module), module)
        if other != module:
            raise Refused(
                f"the vectors of {other} and {module} were saved under one key, because the adapter was "
                f"called {name!r}: one of them is lost",
                hint="save the adapter again from the training run, with PEFT 0.18 or later or under "
                "another name",
            )


def _explain(name: str, lost: Collection[str], modules: Collection[str], wrapper: str) -> dict[str, str]:
    """The only module that each of `lost` can have been, if it is one: saved as `wrapper` inside it says."""
    found: dict[str, list[str]] = {}
    for module in modules if lost else ():
        saved = _saved(name, module, wrapper)
        if saved in lost and f".{name}" in f"{PEFT_PREFIX}{module}":
            found.setdefault(saved, []).append(module)
    return {saved: originals[0] for saved, originals in found.items() if len(originals) == 1}


def _names(adapter: Adapter, modules: Collection[str]) -> Iterator[str]:
    yield adapter.name
    components = {part for module in modules for part in module.split(".")}
    beginnings = {part[:end] for part in components for end in range(1, len(part) + 1)}
    yield from sorted(beginnings - {adapter.name}, key=lambda text: (-len(text), text))


def _renamed(adapter: Adapter, name: str, paths: Mapping[str, str]) -> Adapter:
    moved = [replace(site, module=paths.get(site.module, site.module)) for site in adapter.sites.values()]
    extras = {}
    for stored, tensor in adapter.extras.items():
        module, _, leaf = stored.rpartition(".")
        extras[f"{paths.get(module, module)}.{leaf}"] = tensor
    warning = (
        f"{adapter.name}: PEFT removed {'.' + name!r} from its keys when it saved the adapter (versions "
        f"below 0.18 do, wherever the adapter's name occurs); {len(paths)} module paths were restored by "
        f"the base's, such as {min(paths.values())}"
    )
    sites = {site.module: site for site in moved}
    return replace(adapter, sites=sites, extras=extras, warnings=(*adapter.warnings, warning))
