"""Whether an adapter meets its own base: by name, by quantization, and without its vectors in it already."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import ADAPTER_CONFIG, Checkpoint
from ia3_export.checkpoint.manifest import MANIFEST, Folded
from ia3_export.errors import Refused
from ia3_export.quantization.detection import Quantization

#: What names of repositories say of a quantization.
_IN_NAMES = (
    (re.compile(r"bnb-?(4|8)bit|-4bit$|-8bit$|nf4|int8", re.I), "bitsandbytes"),
    (re.compile(r"gptq", re.I), "gptq"),
    (re.compile(r"awq", re.I), "awq"),
    (re.compile(r"fp8", re.I), "fp8"),
    (re.compile(r"gguf", re.I), "gguf"),
    (re.compile(r"hqq", re.I), "hqq"),
    (re.compile(r"w4a16|w8a8", re.I), "compressed-tensors"),
)


def base_warnings(adapter: Adapter, stored: Checkpoint, quantization: Quantization) -> Iterator[str]:
    """Why the vectors may not act in `stored` as they did in training.

    Nothing where the adapter names no base. A vector trained over rounded weights has learned to make up for
    their rounding, and meets other weights in the original (or the other way round): the merge is exact, what
    it computes is not what was evaluated.
    """
    if stored.of_adapter is not None:
        count = len(stored.of_adapter)
        left = f", and {count} tensors of its adapter are left out" if count else ""
        yield (
            f"{stored.location.given} was saved inside a wrapper (PEFT, torch.compile, FSDP): it is read "
            f"under the model's own names{left}; vectors that had been merged in place before it was saved "
            "would count twice"
        )
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return
    if not _same(named, stored):
        yield (
            f"{adapter.name} says that it was trained on {named}, the base given is {stored.location.given}: "
            "its vectors fit no other weights"
        )
    methods = sorted({packed.method for packed in quantization.packed.values()})
    trained = _method(named)
    if trained and trained not in methods:
        given = ", ".join(methods) or "not quantized"
        yield (
            f"{adapter.name} was trained on a base quantized by {trained} ({named}), this one is {given}: "
            "the rounding that its vectors have learned to live with is another here, so measure the "
            "merged model's quality again"
        )
    elif trained is None and methods and Path(named).is_dir():
        yield (
            f"{adapter.name} was trained on unquantized weights ({named}), this base is quantized by "
            f"{', '.join(methods)}: the merge is exact, the quantization error of the base comes on top"
        )


def folded_before(adapter: Adapter, stored: Checkpoint) -> Refused | None:
    """The refusal of an adapter that `stored` already holds, by its manifest: it would act twice."""
    found = next((folded for folded in stored.folded if is_of(folded, adapter)), None)
    if found is None:
        return None
    same = "" if found.vectors is not None else ", of the same name and size,"
    return Refused(
        f"{stored.location.given} already holds the vectors of {adapter.name}: its {MANIFEST} says that "
        f"{found.name}{same} was folded into it",
        hint="give the base without it (unmerge takes it out); to fold it twice on purpose, move "
        f"{MANIFEST} away",
    )


def is_of(folded: Folded, adapter: Adapter) -> bool:
    """Whether a record is of the vectors of `adapter`; by name and size where it has no digest."""
    if folded.vectors is not None:
        return folded.vectors == adapter.digest
    return (folded.name, folded.parameters) == (adapter.name, adapter.parameters)


def merge_warnings(stored: Checkpoint) -> Iterator[str]:
    """What should be known of a base that is itself the output of a merge."""
    if stored.folded:
        names = " and ".join(dict.fromkeys(folded.name for folded in stored.folded))
        yield f"{stored.location.given} already holds {names}: what is folded now acts on top of it"
    if stored.holds_adapter:
        yield (
            f"{stored.location.given} also holds an adapter ({ADAPTER_CONFIG}): it is left out, since "
            "transformers would apply it to the merged model; what was trained by loading that folder was "
            "trained on top of it"
        )


def _same(named: str, stored: Checkpoint) -> bool:
    given = [
        stored.location.given.partition("@")[0],
        stored.location.path.name,
        stored.location.path.resolve().name,
    ]
    given += [stored.location.hub_id or "", str((stored.config or {}).get("_name_or_path") or "")]
    ends = {name.rstrip("/").rpartition("/")[2].lower() for name in given if name}
    return named.rstrip("/").rpartition("/")[2].lower() in ends


def _method(named: str) -> str | None:
    """The quantization of the named base.

    That of its configuration where it lies on this disk, else what its name says.
    """
    try:
        config = json.loads((Path(named) / "config.json").read_text(encoding="utf-8"))
        settings = config.get("quantization_config") or {}
        return str(settings["quant_method"]) if "quant_method" in settings else None
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    name = named.rstrip("/").rpartition("/")[2]
    return next((method for pattern, method in _IN_NAMES if pattern.search(name)), None)
