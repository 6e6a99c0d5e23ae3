"""Bases that were saved inside a wrapper, read under the model's own names.

``q_proj.base_layer.weight`` of PEFT, with vectors and copied heads in the same file, and the names of
torch.compile, FSDP and activation checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ia3_export.checkpoint.header import Shard

#: What PEFT puts before the names of the model that it wraps.
PEFT_PREFIX = "base_model.model."
#: What torch.compile, FSDP and activation checkpoints put before the names of a module that they wrap, as a
#: part of an expression.
WRAPPERS = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
#: What data parallelism puts around the whole, beside one of the others.
_PARALLEL = "module."
#: What PEFT puts around a Linear and around a module of which it trains a copy, and what the others put
#: around any module.
_WRAPPED = re.compile(
    r"\.base_layer(?=\.[^.]+$)|\.original_module(?=\.)|"
    rf"(?:(?<=^)|(?<=\.))(?:{WRAPPERS})\."
)
_OF_ADAPTER = re.compile(r"\.ia3_l(\.|$)|\.modules_to_save\.")


def without_wrappers(shards: Sequence[Shard]) -> tuple[tuple[Shard, ...], tuple[str, ...] | None]:
    """`shards` under the names of the model itself, and the names of the adapter's tensors, left out.

    None for a base that is not wrapped (by ``tuners_utils.BaseTunerLayer`` or
    ``utils.ModulesToSaveWrapper``).
    """
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    if not any(_WRAPPED.search(name) for name in names):
        return tuple(shards), None
    begin = next(
        (b for b in (PEFT_PREFIX, _PARALLEL) if all(_WRAPPED.sub("", n).startswith(b) for n in names)), ""
    )
    plain = [
        replace(
            shard,
            prefix=b"",  # the header has the other names
            tensors=tuple(
                replace(tensor, name=_WRAPPED.sub("", tensor.name).removeprefix(begin))
                for tensor in shard.tensors
                if not _OF_ADAPTER.search(tensor.name)
            ),
        )
        for shard in shards
    ]
    return tuple(plain), tuple(name for name in names if _OF_ADAPTER.search(name))
