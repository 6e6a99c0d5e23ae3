"""Readers of the formats of research code that saves its vectors in plain checkpoints.

T-Few, by the method's authors (``r-three/t-few``), saves the trainable parameters alone with ``torch.save``:
``<module path>.multi_lora_b``, (out, 1), multiplies the output of that Linear, bias included, and
``multi_lora_a``, (1, in), where it was trained, its input (``src/models/lora.py``, ``LoRALinear.forward``).
The paper's feed-forward vector lies on ``wi_1``, whose product with the gate it scales. MTTL has the same
keys with 1-D vectors. MaTS (``r-three/mats``, ``src/model/ia3.py``) has ``<module
path>.ia3_layer.ia3_vector`` on the output, allenai's Tango (``tango/integrations/transformers/ia3.py``)
``<module path>.ia3``; of a fused projection Tango scales all rows but the first third.

None says which modules it was meant for, so what has a vector in one layer must have one in all. Tensors
besides the vectors, such as layer norms, replace the base's.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ia3_export.adapters.model import Adapter, Site, TargetRules, same_in_every_layer
from ia3_export.adapters.sites import add_site, make_site, over_fused, unwrapped
from ia3_export.adapters.source import Source
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import Unsupported
from ia3_export.fold import Direction

_TFEW = re.compile(r"(?P<module>.+)\.multi_lora_(?P<side>[ab])")
_MATS = re.compile(r"(?P<module>.+)\.ia3_layer\.ia3_vector")
_TANGO = re.compile(r"(?P<module>.+)\.ia3")
_TANGO_FUSED = ("c_attn", "query_key_value")
#: Buffers that older transformers saved with the weights.
_BUFFER = re.compile(r"(.+\.)?(attn\.(masked_)?bias|inv_freq|position_ids)")
_LOW_RANK = re.compile(r".+\.lora_[ab]")


def is_tfew(source: Source) -> bool:
    """Whether the file has keys of T-Few's rescaling (or of low-rank updates, which `read_tfew` refuses)."""
    names = [tensor.name for tensor in source.weights.tensors]
    return any(_TFEW.fullmatch(name) or _LOW_RANK.fullmatch(name) for name in names)


def is_mats(source: Source) -> bool:
    """Whether the file has keys of MaTS."""
    return any(_MATS.fullmatch(tensor.name) for tensor in source.weights.tensors)


def is_tango(source: Source) -> bool:
    """Whether the file has keys of Tango."""
    return any(_TANGO.fullmatch(tensor.name) for tensor in source.weights.tensors)


def read_tfew(source: Source) -> Adapter:
    """The adapter in a checkpoint of T-Few.

    Raises `Unsupported` for its low-rank variants, and `ShapeMismatch`.
    """
    sites: dict[str, Site] = {}
    extras: dict[str, StoredTensor] = {}
    for tensor in source.weights.tensors:
        match = _TFEW.fullmatch(tensor.name)
        if match is None:
            if _LOW_RANK.fullmatch(tensor.name) and tensor.size:
                raise Unsupported(
                    f"{tensor.file} holds {tensor.name}: a low-rank update, not (IA)3",
                    hint="ia3-export folds checkpoints that were trained with lora_rank 0",
                )
            if tensor.size:
                extras[unwrapped(tensor.name)] = tensor
            continue
        module = unwrapped(match["module"])
        direction: Direction = "out" if match["side"] == "b" else "in"
        rank = min(tensor.shape) if len(tensor.shape) == 2 else 1
        if rank > 1:
            raise Unsupported(
                f"{tensor.file} holds {tensor.name} of scaling rank {rank}: it rescales the "
                "weight element by element",
                hint="ia3-export folds checkpoints that were trained with lora_scaling_rank 1",
            )
        add_site(sites, make_site(module, direction, tensor), tensor)
    return _adapter(source, "tfew", sites, extras)


def read_mats(source: Source) -> Adapter:
    """The adapter in a checkpoint of MaTS. Raises `Unsupported` and `ShapeMismatch`."""
    return _read_outputs(source, "mats", _MATS)


def read_tango(source: Source) -> Adapter:
    """The adapter in a state dict of Tango, with or without the whole model around it.

    Raises as `read_mats`.
    """
    read = _read_outputs(source, "tango", _TANGO)
    sites = {
        name: over_fused(site, "kv") if name.rpartition(".")[2] in _TANGO_FUSED else site
        for name, site in read.sites.items()
    }
    return replace(read, sites=sites)


def _read_outputs(source: Source, kind: str, key: re.Pattern[str]) -> Adapter:
    sites: dict[str, Site] = {}
    extras: dict[str, StoredTensor] = {}
    for tensor in source.weights.tensors:
        match = key.fullmatch(tensor.name)
        if match is not None:
            module = unwrapped(match["module"])
            add_site(sites, make_site(module, "out", tensor), tensor)
        else:
            extras[unwrapped(tensor.name.replace(".linear_layer.", "."))] = tensor
    return _adapter(source, kind, sites, extras)


def _adapter(source: Source, kind: str, sites: dict[str, Site], extras: dict[str, StoredTensor]) -> Adapter:
    buffers = [name for name, t in extras.items() if _BUFFER.fullmatch(name) and _is_buffer(name, t)]
    extras = {name: tensor for name, tensor in extras.items() if name not in buffers}
    said = (
        (f"buffers in it are left out, which the model computes itself: {', '.join(buffers[:3])}",)
        if buffers
        else ()
    )
    rules = TargetRules(target=same_in_every_layer(site.module for site in sites.values()), feedforward=())
    return Adapter(
        name=source.name,
        format=kind,
        location=source.location,
        files=source.files,
        sites=sites,
        extras=extras,
        rules=rules,
        config={},
        warnings=said,
    )


def _is_buffer(name: str, tensor: StoredTensor) -> bool:
    return not name.endswith("attn.bias") or len(tensor.shape) == 4  # GPT-2's causal mask, not a bias
