"""Reader of AdapterHub's (IA)³ adapters (library ``adapters``, 1.x and its forerunner).

``adapter_config.json`` has no ``peft_type`` but a ``config`` of ``architecture: lora`` and
``composition_mode: scale``. Keys are ``<module path>.loras.<name>.lora_B``, (out, 1); every vector scales an
output, times ``alpha``: ``(W x + b) * (l * alpha)`` (``adapters/methods/lora.py``, class ``IA3``). Vectors
therefore lie before the non-linearity, where PEFT's lie behind it. The library's own merge forgets the bias;
the fold here equals its unmerged forward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ia3_export.adapters.adapterhub_heads import Head, read_head
from ia3_export.adapters.model import Adapter, Site, TargetRules, same_in_every_layer
from ia3_export.adapters.sites import add_site, make_site, over_fused, unwrapped
from ia3_export.adapters.source import Source
from ia3_export.errors import DamagedFile, Refused, Unsupported

_VECTOR = re.compile(r"(?P<module>.+)\.loras\.(?P<name>[^.]+)\.lora_B")
#: Model types whose forward is another one with AdapterHub's library, and why no fold can equal it.
_OTHERS = {
    "deberta": "the library gives its fused projection a random bias, which is saved nowhere",
    "modernbert": "the library gives its fused projection a random bias, which is saved nowhere",
    "xmod": "the library replaces its language adapters by its own",
}
#: Layers in which one Linear computes queries, keys and values, in this order.
_FUSED = ("c_attn", "in_proj", "Wqkv")


def is_adapterhub(source: Source) -> bool:
    """Whether the configuration is one of AdapterHub's library."""
    return isinstance(source.config.get("config"), dict) and "model_type" in source.config


def read_adapterhub(source: Source) -> Adapter:
    """The adapter in files that ``save_adapter`` wrote, with its head where there is one.

    Raises `Unsupported` for every method but (IA)³, for gating and for models whose forward the library
    changes, `Refused`, `DamagedFile`, `ShapeMismatch`.
    """
    settings: Mapping[str, Any] = source.config["config"]
    _check_method(source, settings)
    factor = _factor(source, settings)
    enabled = _enabled(source, settings)
    head = read_head(source)
    sites: dict[str, Site] = {}
    for tensor in source.weights.tensors:
        match = _VECTOR.fullmatch(tensor.name)
        if match is None or match["name"] != (source.config.get("name") or match["name"]):
            raise Unsupported(
                f"{source.weights.path} holds {tensor.name}, which is no (IA)³ vector of "
                f"{source.config.get('name')}",
                hint="save the adapter alone, with save_adapter()",
            )
        module = match["module"] if head.keeps_wrapper else unwrapped(match["module"])
        site = make_site(module, "out", tensor, factor)
        if module.rpartition(".")[2] in _FUSED:
            site = over_fused(site, enabled, factor)
        add_site(sites, site, tensor)
    if not sites:
        raise Refused(f"{source.weights.path} holds no vector", hint="was the adapter saved before training?")
    # layers that were left out are missing on purpose, and the decoder's are counted on from the encoder's
    target = tuple(sorted(sites)) if settings.get("leave_out") else same_in_every_layer(sites)
    return Adapter(
        name=source.name,
        format="adapterhub",
        location=source.location,
        files=(*source.files, *head.files),
        sites=sites,
        extras=head.tensors,
        rules=TargetRules(target=target, feedforward=()),
        config=_as_config(source, head),
        labels=head.labels,
        unplaced=head.unplaced,
        unplaced_reason=head.unplaced_reason,
        warnings=head.warnings,
    )


def _check_method(source: Source, settings: Mapping[str, Any]) -> None:
    file, architecture = source.config_file, settings.get("architecture")
    if architecture != "lora" or settings.get("composition_mode") != "scale":
        mode = (
            f", composition_mode {settings['composition_mode']!r}" if "composition_mode" in settings else ""
        )
        raise Unsupported(
            f"{file} is an AdapterHub adapter of architecture {architecture!r}{mode}; ia3-export folds "
            "(IA)³ only (architecture 'lora', composition_mode 'scale')",
            hint="the library's own merge_adapter() merges LoRA",
        )
    if settings.get("use_gating") or any(".gate." in tensor.name for tensor in source.weights.tensors):
        raise Unsupported(
            f"{file} uses gating: its vectors depend on the input, so no weight can hold them",
            hint="train it with use_gating=False",
        )
    model_type = str(source.config.get("model_type"))
    if model_type in _OTHERS:
        raise Unsupported(
            f"{file} was trained on {model_type}: {_OTHERS[model_type]}, so no merge equals "
            "the trained forward",
            hint="train the adapter with PEFT",
        )


def _factor(source: Source, settings: Mapping[str, Any]) -> float:
    """The number by which every vector is multiplied, ``alpha``.

    Versions 1.0.x divided ``alpha`` by ``r`` here (1.1 reads their files as alpha = r).
    """
    alpha, rank = settings.get("alpha", 1), settings.get("r", 1)
    version = str(source.config.get("version") or "")
    if (
        version.startswith("adapters.")
        and _release(version.removeprefix("adapters.")) < (1, 1)
        and rank != alpha
    ):
        alpha = rank
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 1e-30 < abs(alpha) < 1e30:
        raise DamagedFile(
            f"{source.config_file} has the alpha {str(alpha)[:40]!r}, by which every vector is multiplied",
            hint="a usable alpha is a number other than zero, usually 1; fetch the file again",
        )
    return float(alpha)


def _enabled(source: Source, settings: Mapping[str, Any]) -> list[str]:
    """Those of q, k and v that have a vector, in this order."""
    named = settings.get("attn_matrices") or []
    if not isinstance(named, list) or not all(part in ("q", "k", "v") for part in named):
        raise DamagedFile(
            f"{source.config_file} has attn_matrices that are no list of q, k and v: {str(named)[:60]}",
            hint="fetch the file again",
        )
    return [part for part in "qkv" if part in named]


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,6}", version)[:2])


def _as_config(source: Source, head: Head) -> dict[str, Any]:
    """What PEFT's configuration would say of task, class and base."""
    name = source.config.get("model_name")
    config: dict[str, Any] = {
        "task_type": head.task_type,
        "base_model_name_or_path": name if isinstance(name, str) else None,
    }
    if head.class_name is not None:
        config["auto_mapping"] = {"base_model_class": head.class_name}
    if head.problem_type is not None:
        config["problem_type"] = head.problem_type
    return config
