"""How outputs are written, whatever is in them."""

from __future__ import annotations

from dataclasses import dataclass

from ia3_export.arguments import check_fields
from ia3_export.errors import UsageError
from ia3_export.words import Digests, ReloadCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How a merge is written. None of it changes a tensor.

    Attributes:
        shard_size: largest shard in bytes; None keeps the base's shards and names.
        link: hard-link shards that no vector touches instead of copying them.
        overwrite: replace an output folder that a command of ours wrote, and in which nothing else lies.
        digests: SHA-256 of all input and output files (``full``), of outputs (``output``), or ``none``.
        flush: sync everything to disk before the final rename.
        reload_check: of a quantized base, compare every weight with what the library that its users use
            makes of the output, where it is installed: weight by weight with the library's own
            dequantizer (``streamed``; bitsandbytes, compressed-tensors, gguf, others as ``whole``), from
            the model that transformers loads, where memory allows it (``whole``), or not (``none``).

    Raises `UsageError` for values that are not offered.
    """

    shard_size: int | None = None
    link: bool = False
    overwrite: bool = False
    digests: Digests = "output"
    flush: bool = False
    reload_check: ReloadCheck = "streamed"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shard_size is not None and self.shard_size <= 0:
            raise UsageError(
                f"a shard of {self.shard_size} bytes holds nothing",
                hint="for example shard_size=5_000_000_000",
            )


#: How a merge is written that is told nothing.
DEFAULT_OPTIONS = OutputOptions()
