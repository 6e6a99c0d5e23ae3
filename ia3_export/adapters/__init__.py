"""Readers of adapter formats, each files → the same frozen :class:`~ia3_export.adapters.model.Adapter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ia3_export.adapters.adapterhub import is_adapterhub, read_adapterhub
from ia3_export.adapters.mapped import read_mapped
from ia3_export.adapters.model import Adapter
from ia3_export.adapters.peft import is_peft, read_peft
from ia3_export.adapters.research import is_mats, is_tango, is_tfew, read_mats, read_tango, read_tfew
from ia3_export.adapters.source import Source, open_source
from ia3_export.arguments import check_arguments
from ia3_export.errors import Unsupported, UsageError
from ia3_export.ordering import natural


@dataclass(frozen=True, slots=True)
class Format:
    """How files are recognised as a format, and read."""

    recognises: Callable[[Source], bool]
    read: Callable[[Source], Adapter]


#: All formats at one look; the order is the order of detection.
READERS: Mapping[str, Format] = {
    "peft": Format(is_peft, read_peft),
    "adapterhub": Format(is_adapterhub, read_adapterhub),
    "tfew": Format(is_tfew, read_tfew),
    "mats": Format(is_mats, read_mats),
    "tango": Format(is_tango, read_tango),
}


def read_adapters(sources: Sequence[str | Path | Adapter], rules: Sequence[str] = ()) -> list[Adapter]:
    """Read several adapters, each as `read_adapter` does.

    Raises `UsageError` when `rules` are given and every adapter is in a known format.
    """
    read = [read_adapter(source, rules=rules) for source in sources]
    if rules and all(adapter.format != "mapped" for adapter in read):
        kinds = ", ".join(dict.fromkeys(adapter.format for adapter in read))
        raise UsageError(
            f"--map is for files whose configuration names no format, and this is {kinds}",
            hint="leave --map out",
        )
    return read


def read_adapter(source: str | Path | Adapter, *, rules: Sequence[str] = ()) -> Adapter:
    """Read an adapter: a folder, a file or a hub id, in whatever format of `READERS` it is.

    `rules` (``REGEX=output`` or ``REGEX=input``, see `read_mapped`) say what the vectors are in a file
    without a configuration that names its format. An `Adapter` that was read before is returned as it is.
    Raises `IA3ExportError`.
    """
    check_arguments(read_adapter, locals())
    if isinstance(source, Adapter):
        return source
    files = open_source(source)
    found = next((known for known in READERS.values() if known.recognises(files)), None)
    # keys alone are a guess, which the user knows better
    if rules and (found is None or files.config_file is None):
        return _in_order(read_mapped(files, rules))
    if found is not None:
        return _in_order(found.read(files))
    keys = [tensor.name for tensor in files.weights.tensors[:3]]
    raise Unsupported(
        f"{files.weights.path} is in no adapter format that is known ({', '.join(READERS)}); its keys are "
        f"{', '.join(keys) or 'none'}{', ...' if keys else ''}",
        hint="tell what the vectors are with --map, for example --map '(.+)\\.ia3_l=output'"
        if files.config_file is None
        else f"{files.config_file} has no peft_type: it is no PEFT adapter; --map tells what the vectors are",
    )


def _in_order(adapter: Adapter) -> Adapter:
    """`adapter` with its vectors by layer, whatever the order in the file."""
    return replace(adapter, sites=dict(sorted(adapter.sites.items(), key=lambda item: natural(item[0]))))
