"""What readers build an `Adapter` with: sites of stored vectors, and names without those of wrappers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ia3_export.adapters.model import Site, second_key
from ia3_export.checkpoint.header import StoredTensor, read_values
from ia3_export.checkpoint.wrapped import PEFT_PREFIX, WRAPPERS
from ia3_export.errors import DamagedFile, ShapeMismatch, Unsupported
from ia3_export.fold import FLOAT_DTYPES, Direction

#: MaTS and AdapterHub's T5AdapterModel hold T5 as ``transformer``, MTTL as ``model``.
_WRAPPED_T5 = re.compile(
    r"^(transformer|model)\.(?=shared\.|lm_head\.|(en|de)coder\.(block|final_layer_norm|embed_tokens)\.)"
)

#: What torch.compile, FSDP and activation checkpoints put before the names of a module that they wrap, with
#: DataParallel's.
_WRAPPER = re.compile(rf"(?<![^.])(module\.)*({WRAPPERS})\.(module\.)*")
_PARALLEL = re.compile(rf"^({re.escape(PEFT_PREFIX)})?(module\.)+")


def unwrapped(name: str) -> str:
    """A name of T5 without the prefix of a class around the whole model, which transformers' own has not."""
    return _WRAPPED_T5.sub("", name)


def unwrapped_key(key: str) -> str:
    """A key without the names of wrappers of training, which the module has not."""
    plain = _WRAPPER.sub("", key)
    while (found := _PARALLEL.match(plain)) is not None:
        plain = (found[1] or "") + plain[found.end() :]
    return plain


def make_site(module: str, direction: Direction, tensor: StoredTensor, factor: float = 1.0) -> Site:
    """The vector in `tensor`, of any shape with one extent above 1, times `factor`.

    A shape of four or five dimensions says that the module is a convolution, one of two that it is Linear or
    Conv1D. Raises `Unsupported` and `ShapeMismatch`.
    """
    where = f"{tensor.file}: {tensor.name}"
    if tensor.dtype not in FLOAT_DTYPES:
        raise Unsupported(
            f"{where} has dtype {tensor.dtype}", hint="IA3 vectors are float64, float32, float16 or bfloat16"
        )
    if sum(extent != 1 for extent in tensor.shape) > 1 or not tensor.size:
        raise ShapeMismatch(
            f"{where} has shape {list(tensor.shape)}, which is no vector",
            hint="(IA)3 learns one number a channel; this is another method, or the wrong tensor",
        )
    values = read_values(tensor).reshape(-1)
    dtype = tensor.dtype
    if factor != 1.0:
        values, dtype = (values * values.dtype.type(factor)), "F64" if values.dtype == np.float64 else "F32"
    shape = tensor.shape
    if len(shape) == 2:
        shape = (len(values), 1) if direction == "out" else (1, len(values))
    elif len(shape) in (4, 5):
        shape = (1, len(values), *(1,) * (len(shape) - 2))
    else:
        shape = (len(values),)
    return Site(module, direction, values, shape, dtype)


def add_site(sites: dict[str, Site], site: Site, tensor: StoredTensor) -> None:
    """Put `site`, read from `tensor`, among `sites`.

    Raises `DamagedFile` for a second vector on one side of a module.
    """
    before = sites.get(site.module)
    key = site.module if before is None else second_key(site.module, site.direction)
    if not site.module or key in sites or (before is not None and before.direction == site.direction):
        raise DamagedFile(
            f"{tensor.file}: {tensor.name} and another key are both the {site.direction}put vector of "
            f"{site.module or 'no module at all'}",
            hint="a file holds one adapter; with --map, put the part of the key that is the module path "
            "into a group",
        )
    sites[key] = site


def over_fused(site: Site, parts: Sequence[str], factor: float = 1.0) -> Site:
    """The vector of some `parts` (of q, k and v, in this order) over the projection that computes all three.

    The parts without a vector are multiplied by `factor`. Raises `DamagedFile` when the vector does not
    divide into its parts.
    """
    if not parts or len(site.vector) % len(parts):
        raise DamagedFile(
            f"the vector of {site.module} has {len(site.vector)} elements for {len(parts)} of queries, "
            "keys and values",
            hint="the configuration is not the one of these weights, or the file is incomplete",
        )
    own = dict(zip(parts, np.split(site.vector, len(parts)), strict=True))
    untouched = np.full(len(site.vector) // len(parts), factor, site.vector.dtype)
    vector = np.concatenate([own.get(part, untouched) for part in "qkv"])
    return replace(site, vector=vector, shape=(len(vector), 1))
