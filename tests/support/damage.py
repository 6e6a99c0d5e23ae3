"""Kinds of damage to a merged folder, each with the word by which `verify` must name it.

The sites are found anew from the adapter's keys and from the tensors of base and merge, with torch alone:
nothing here asks the code under test what a merge changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.tensors import read_folder

Tensors = dict[str, torch.Tensor]
#: By stored name: the tensor after the damage (None: taken away) and the word for it.
Broken = dict[str, tuple[torch.Tensor | None, str]]

_KEYS = ("k", "key", "k_proj", "k_lin")


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One vector: its module, the stored names that it scales, and the weight's axis that it lies along."""

    module: str
    weight: str
    bias: str | None
    vector: torch.Tensor
    output: bool
    axis: int

    @property
    def biased(self) -> bool:
        """Whether a bias is scaled, and the model would miss it.

        A key's bias shifts all scores of a query alike, which the softmax takes out again.
        """
        return self.output and self.bias is not None and self.module.rpartition(".")[2] not in _KEYS


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """A good merge: folders ``base``, ``adapter`` and ``merged`` in `folder`, what is in them, and `other`.

    What a merge of another adapter holds.
    """

    folder: Path
    base: Tensors
    merged: Tensors
    other: Tensors
    sites: tuple[Site, ...]
    heads: tuple[str, ...]

    def pick(self, wanted: Callable[[Site], bool] = lambda site: True, *, last: bool = False) -> Site:
        """The first (or last) site of the kind that is no key projection, if there is one."""
        found = [site for site in self.sites if wanted(site)]
        found.sort(key=lambda site: (site.module.rpartition(".")[2] in _KEYS, site.module))
        if last:
            found.sort(key=lambda site: site.module.rpartition(".")[2] in _KEYS, reverse=True)
        return found[-1 if last else 0]

    def fold(self, site: Site, vector: torch.Tensor, names: Mapping[str, torch.Tensor]) -> Tensors:
        """Weight and bias of `site`, as they are in `names`, with `vector` folded into them."""
        done = {site.weight: times(names[site.weight], vector, site.axis)}
        if site.output and site.bias is not None:
            done[site.bias] = times(names[site.bias], vector, 0)
        return done


def read_merge(folder: Path) -> Merge:
    """Find sites and heads in the folders ``base``, ``adapter``, ``merged`` and ``other`` of `folder`."""
    base, merged, other = (read_folder(folder / name) for name in ("base", "merged", "other"))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    feedforward = tuple(config["feedforward_modules"])
    sites, heads = [], []
    for key, values in sorted(load_file(folder / "adapter" / "adapter_model.safetensors").items()):
        name = key.removeprefix("base_model.model.")
        if not name.endswith(".ia3_l"):
            heads.append(name)
            continue
        module, vector = name.removesuffix(".ia3_l"), values.float().reshape(-1)
        output = not any(module == name or module.endswith(f".{name}") for name in feedforward)
        weight, axis = _folded(module, vector, output, base, merged)
        bias = weight.removesuffix("weight") + "bias"
        sites.append(Site(module, weight, bias if bias in base else None, vector, output, axis))
    assert sites
    return Merge(folder, base, merged, other, tuple(sites), tuple(heads))


def _folded(
    module: str, vector: torch.Tensor, output: bool, base: Tensors, merged: Tensors
) -> tuple[str, int]:
    """Stored name and axis of the weight into which `vector` went.

    By name, or (names are converted) by content.
    """
    names = [f"{module}.weight"] if f"{module}.weight" in base else sorted(base)
    for name in names:
        weight = base[name]
        for axis in (0, 1) if output else (1, 0):
            fits = weight.dim() >= 2 and weight.shape[axis] == len(vector)
            if fits and torch.equal(times(weight, vector, axis), merged[name]):
                return name, axis
    raise AssertionError(f"{module} is folded into no tensor")


def times(tensor: torch.Tensor, vector: torch.Tensor, axis: int) -> torch.Tensor:
    """`tensor` with `vector` along `axis` folded in: multiplied in float32, rounded once."""
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return (tensor.float() * vector.reshape(shape)).to(tensor.dtype)


def _stretch(vector: torch.Tensor, length: int) -> torch.Tensor:
    return vector.repeat(-(-length // len(vector)))[:length]


def _all(tensors: Tensors, word: str) -> Broken:
    return {name: (tensor, word) for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------- the damages


def base_passed_off(good: Merge) -> Broken:
    """The base itself in the place of the merge."""
    done: Broken = {}
    for site in good.sites:
        done |= _from_base(good, site)
    return done | head_not_replaced(good)


def _from_base(good: Merge, site: Site) -> Broken:
    done: Broken = {site.weight: (good.base[site.weight], "left out")}
    if site.output and site.bias is not None:
        done[site.bias] = good.base[site.bias], "bias forgotten"
    return done


def site_left_out(good: Merge) -> Broken:
    """One site as it is in the base."""
    return _from_base(good, good.pick(last=True))


def bias_forgotten(good: Merge) -> Broken:
    """The weight is folded, the bias beside it is not."""
    bias = good.pick(lambda site: site.biased).bias
    assert bias is not None
    return {bias: (good.base[bias], "bias forgotten")}


def head_not_replaced(good: Merge) -> Broken:
    """The base's head."""
    return {
        name: (good.base.get(name), "head not replaced" if name in good.base else "missing")
        for name in good.heads
    }


def vector_twice(good: Merge) -> Broken:
    """One vector folded in twice."""
    site = good.pick()
    return _all(good.fold(site, site.vector, good.merged), "applied twice")


def adapter_twice(good: Merge) -> Broken:
    """The adapter merged into the merge."""
    done: Broken = {}
    for site in good.sites:
        done |= _all(good.fold(site, site.vector, good.merged), "applied twice")
    return done


def bias_twice(good: Merge) -> Broken:
    """The vector is in the bias twice, in the weight once."""
    site = good.pick(lambda site: site.biased, last=True)
    assert site.bias is not None
    return {site.bias: (times(good.merged[site.bias], site.vector, 0), "applied twice")}


def wrong_axis(good: Merge) -> Broken:
    """The vector along the other axis of the weight.

    Repeated and cut to fit where the weight is not square.
    """
    site = next((site for site in good.sites if _square(good, site)), good.pick())
    weight, axis = good.base[site.weight], 1 - site.axis
    word = "applied on the wrong axis" if _square(good, site) else "differs"
    return {site.weight: (times(weight, _stretch(site.vector, weight.shape[axis]), axis), word)}


def _square(good: Merge, site: Site) -> bool:
    shape = good.base[site.weight].shape
    return len(shape) > 1 and shape[0] == shape[1]


def input_vector_in_bias(good: Merge) -> Broken:
    """The vector scales the input, and the bias was scaled with it all the same."""
    bias = good.pick(lambda site: not site.output and site.bias is not None).bias
    assert bias is not None
    vector = next(site.vector for site in good.sites if site.bias == bias)
    return {bias: (times(good.base[bias], _stretch(vector, len(good.base[bias])), 0), "differs")}


def layers_swapped(good: Merge) -> Broken:
    """Two layers of equal shapes in each other's place."""
    one, other = next(_alike(good))
    done: Broken = {}
    for name, tensor in good.merged.items():
        twin = other + name.removeprefix(one)
        if not name.startswith(one) or twin not in good.merged:
            continue
        if tensor.shape == good.merged[twin].shape and not torch.equal(tensor, good.merged[twin]):
            done |= {name: (good.merged[twin], "swapped"), twin: (tensor, "swapped")}
    return done


def _alike(good: Merge) -> Iterator[tuple[str, str]]:
    """Prefixes of stored names that differ in one number."""
    for i, one in enumerate(good.sites):
        for other in good.sites[i + 1 :]:
            parts, others = one.weight.split("."), other.weight.split(".")
            if len(parts) != len(others) or one.output != other.output:
                continue
            at = [j for j, pair in enumerate(zip(parts, others, strict=True)) if pair[0] != pair[1]]
            alike = good.base[one.weight].shape == good.base[other.weight].shape
            if alike and len(at) == 1 and parts[at[0]].isdigit() and others[at[0]].isdigit():
                yield ".".join(parts[: at[0] + 1]) + ".", ".".join(others[: at[0] + 1]) + "."


def channel_off(good: Merge) -> Broken:
    """One channel in one layer off by 5 %."""
    site = good.pick(last=True)
    factors = torch.ones(len(site.vector))
    weight = good.merged[site.weight].transpose(0, site.axis).flatten(1)
    factors[weight.float().abs().sum(1).argsort()[len(factors) // 2]] = 1.05  # an ordinary one
    return {site.weight: (times(good.merged[site.weight], factors, site.axis), "differs")}


def sign_lost(good: Merge) -> Broken:
    """One element of one vector folded in without its minus sign."""
    site = good.pick(lambda site: bool((site.vector < 0).any()))
    factors = torch.ones(len(site.vector))
    factors[site.vector.argmin()] = -1
    return _all(good.fold(site, factors, good.merged), "differs")


def divided(good: Merge) -> Broken:
    """Divided by the vector instead of multiplied."""
    site = good.pick(last=True)
    return _all(good.fold(site, 1 / site.vector, good.base), "divided out")


def other_vector(good: Merge) -> Broken:
    """The vector of the same module in another layer."""
    one, other = next(_alike(good))
    site = next(site for site in good.sites if site.weight.startswith(one))
    twin = next(s for s in good.sites if s.weight == other + site.weight.removeprefix(one))
    return _all(good.fold(site, twin.vector, good.base), "wrong vector")


def rounded_to_bfloat16(good: Merge) -> Broken:
    """One weight through bfloat16 and back."""
    name = good.pick().weight
    return {name: (good.merged[name].bfloat16().float(), "differs")}


def vector_rounded(good: Merge) -> Broken:
    """A vector rounded to bfloat16 before it was folded: by default PEFT keeps it in float32."""
    site = good.pick(last=True)
    word = "differs" if good.base[site.weight].dtype == torch.float32 else "rounded to the base's dtype first"
    folded = good.fold(site, site.vector.bfloat16().float(), good.base)
    return {name: (t, word) for name, t in folded.items() if not torch.equal(t, good.merged[name])}


def tensor_missing(good: Merge) -> Broken:
    """A folded weight is not there."""
    return {good.pick().weight: (None, "missing")}


def tensor_extra(good: Merge) -> Broken:
    """A tensor too many."""
    return {"left.behind.ia3_l": (good.sites[0].vector, "extra")}


def last_place(good: Merge) -> Broken:
    """One element of an untouched tensor off by one unit in the last place."""
    touched = {name for site in good.sites for name in (site.weight, site.bias)} | {*good.heads}
    name = max(
        (n for n, t in good.merged.items() if n not in touched and t.is_floating_point() and t.dim() > 1),
        key=lambda n: (good.merged[n].numel(), n),
    )
    damaged = good.merged[name].clone()
    damaged.view(torch.int32 if damaged.dtype == torch.float32 else torch.int16).view(-1)[-1] += 1
    return {name: (damaged, "differs")}


def embedding_zeroed(good: Merge) -> Broken:
    """Some rows of the token embedding are zero.

    A download that stopped, or a vocabulary padded in the wrong place.
    """
    words = r"(^|\.)(embed_tokens|word_embeddings|wte|shared)\.weight$"
    name = min(n for n in good.merged if re.search(words, n))
    damaged = good.merged[name].clone()
    damaged[40:80] = 0
    return {name: (damaged, "differs")}


def other_adapter(good: Merge) -> Broken:
    """Another adapter of the same kind was merged."""
    return {
        name: (tensor, "differs")
        for name, tensor in good.other.items()
        if not torch.equal(tensor, good.merged[name])
    }


def stored_transposed(good: Merge) -> Broken:
    """A weight with its first two axes exchanged, as between Linear and GPT-2's Conv1D."""
    name = good.pick(lambda site: len({*good.base[site.weight].shape[:2]}) == 2).weight
    return {name: (good.merged[name].transpose(0, 1).contiguous(), "wrong type")}


def stored_as_float16(good: Merge) -> Broken:
    """One weight in another dtype."""
    name = good.pick(last=True).weight
    return {name: (good.merged[name].half(), "wrong type")}


@dataclass(frozen=True, slots=True)
class Damage:
    """One kind: `needs` are traits that an architecture must have.

    `seen` tells that the forward of a float32 model must fail by itself, `located` that it must
    name the module.
    """

    make: Callable[[Merge], Broken]
    needs: frozenset[str] = frozenset()
    seen: bool = True
    located: bool = True

    @property
    def name(self) -> str:
        """The test id."""
        return self.make.__name__


def _needs(*traits: str) -> frozenset[str]:
    return frozenset(traits)


DAMAGES: tuple[Damage, ...] = (
    Damage(base_passed_off),
    Damage(site_left_out),
    Damage(bias_forgotten, _needs("output bias")),
    Damage(head_not_replaced, _needs("head")),
    Damage(vector_twice),
    Damage(adapter_twice),
    Damage(bias_twice, _needs("output bias")),
    Damage(wrong_axis),
    Damage(input_vector_in_bias, _needs("input bias")),
    Damage(layers_swapped),
    Damage(channel_off),
    Damage(sign_lost),
    Damage(divided),
    Damage(other_vector),
    Damage(rounded_to_bfloat16, _needs("float32")),
    Damage(vector_rounded),
    Damage(tensor_missing),
    Damage(tensor_extra, seen=False, located=False),  # transformers ignores it
    Damage(last_place, seen=False, located=False),  # no forward can tell it from rounding
    Damage(embedding_zeroed, _needs("embedding")),
    Damage(other_adapter),
    Damage(stored_transposed, located=False),  # cannot be loaded, so there is no module to name
    Damage(stored_as_float16),
)


def traits_of(good: Merge) -> frozenset[str]:
    """What damages may need."""
    made: dict[str, Any] = {
        "float32": good.merged[good.sites[0].weight].dtype == torch.float32,
        "output bias": any(site.biased for site in good.sites),
        "input bias": any(not site.output and site.bias is not None for site in good.sites),
        "head": bool(good.heads),
        "embedding": any(tensor.shape[:1] == (128,) and tensor.dim() == 2 for tensor in good.merged.values()),
    }
    return frozenset(name for name, there in made.items() if there)
