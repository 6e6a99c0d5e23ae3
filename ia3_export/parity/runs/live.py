"""The unmerged model: base plus live adapters, as they were trained.

PEFT's own forward where PEFT applies every vector; hooks of ours that multiply activations where it does not,
or where the combination is one that PEFT does not know (``delta``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint, adapterless, first_class
from ia3_export.checkpoint.header import StoredTensor, read_values, same_bytes
from ia3_export.checkpoint.wrapped import PEFT_PREFIX
from ia3_export.errors import Unsupported, kind_and_line
from ia3_export.models.conversions import renamed
from ia3_export.models.model_class import load_runtime_model, make_config
from ia3_export.parity.runs.hooks import fill_entry, multiply_live, named_as_in
from ia3_export.parity.runs.quantized import load_dense, widen
from ia3_export.planning.config_edits import adopt_heads
from ia3_export.planning.recipe import DEFAULT_RECIPE, Recipe
from ia3_export.quantization.base import Base
from ia3_export.words import AppliedBy


@dataclass(frozen=True, slots=True)
class RunDevice:
    """Where a model lives: on `device`, or, with an `offload` folder, layer by layer.

    At most `max_memory` bytes in memory (on the GPU: what it has free), the rest on disk (accelerate).
    `precision` is the reference's.
    """

    device: str
    offload: Path | None = None
    max_memory: int = 0
    precision: str = "float64"


@dataclass(frozen=True, slots=True, eq=False)
class FineTune:
    """What was trained: a base, its adapters in order, and by which recipe several count together."""

    base: Base
    adapters: tuple[Adapter, ...] = ()
    recipe: Recipe = DEFAULT_RECIPE


@dataclass(frozen=True, slots=True, eq=False)
class FittedClass:
    """The class in which all adapters live.

    `config` replaces the checkpoint's own where it has their labels and vocabulary; `brought` are the tensors
    that they bring, by the class's names.
    """

    name: str
    config: Mapping[str, Any] | None = None
    brought: Mapping[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LiveModel:
    """A model with its adapters live.

    `by` is ``peft`` or ``hooks``, or ``none`` without adapters; `vectors` are the
    tensors that the model multiplies with, by module path; `refused` is what PEFT said where it could not
    load the adapters.
    """

    model: Any
    class_name: str
    by: AppliedBy
    vectors: tuple[tuple[str, Any], ...] = ()
    refused: str = ""

    @property
    def inner(self) -> Any:
        """The transformers model itself."""
        return self.model.get_base_model() if self.by == "peft" else self.model

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """In this context the vectors (and with PEFT the adapter's heads) are off."""
        import torch

        off = (
            self.model.disable_adapter()
            if self.by == "peft"
            else self.with_vectors(lambda _, v: torch.ones_like(v))
        )
        with off:
            yield

    @contextmanager
    def with_vectors(self, change: Callable[[str, Any], Any]) -> Iterator[None]:
        """In this context every vector is what `change` makes of it: module path, vector → vector."""
        import torch

        before = [vector.detach().clone() for _, vector in self.vectors]
        with torch.no_grad():
            for module, vector in self.vectors:
                vector.copy_(change(module, vector))
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, vector), kept in zip(self.vectors, before, strict=True):
                    vector.copy_(kept)


def load_live(trained: FineTune, dtype: str, where: RunDevice) -> LiveModel:
    """Load the base in `dtype` with every adapter live. Raises `Unsupported` without a transformers class."""
    base, adapters, recipe = trained.base, trained.adapters, trained.recipe
    config = base.stored.config
    if config is None:
        raise Unsupported(
            f"{base.stored.location.given} has no config.json, so no model can be built from it",
            hint="give the model folder that save_pretrained() wrote",
        )
    if not adapters:
        name = first_class(config) or "AutoModel"
        return LiveModel(model=load_plain(base, FittedClass(name), dtype, where), class_name=name, by="none")
    fitted = fit_class(base.stored, adapters)
    refused = ""
    if recipe.combine == "product" and where.offload is None:
        try:
            live, vectors = _with_peft(load_plain(base, fitted, dtype, where), adapters)
            return LiveModel(model=live.eval(), class_name=fitted.name, by="peft", vectors=vectors)
        except _NotByPeft as reason:
            refused = str(reason)
    model = load_plain(base, fitted, dtype, where)
    vectors = multiply_live(model, adapters, recipe)
    return LiveModel(model=model, class_name=fitted.name, by="hooks", vectors=vectors, refused=refused)


class _NotByPeft(Exception):
    """PEFT cannot apply the adapters, for what it says; it says nothing where it leaves out a vector or knows
    not the format.
    """


def fit_class(base: Checkpoint, adapters: Sequence[Adapter]) -> FittedClass:
    """The class in which all `adapters` live. A head decides on it."""
    assert base.config is not None
    class_name, config, brought = "", dict(base.config), dict[str, StoredTensor]()
    for given in adapters:
        runtime = load_runtime_model(base.config, given, base.tensors)
        adapter = renamed(given, runtime.renaming)
        adopt_heads(config, runtime, base.config)
        if not class_name or any(name not in runtime.stored for name in adapter.extras):
            class_name = runtime.class_name
        for entry, shared in runtime.ties.items():
            for name, partner in ((entry, shared), (shared, entry)):
                if partner in adapter.extras:
                    brought.setdefault(name, adapter.extras[partner])
        brought |= adapter.extras
    return FittedClass(class_name, config, brought)


def load_plain(
    base: Base, fitted: FittedClass, dtype: str, where: RunDevice, *, quantized: bool = False
) -> Any:
    """Load the checkpoint as a transformers model of the `fitted` class, in eval mode. A head that is made
    anew is seeded.

    Where its configuration makes a tensor another size (more labels, a resized vocabulary), that tensor must
    be one of those brought, and is it. A quantized checkpoint is dequantized (exactly in float32 and wider)
    or, of bitsandbytes and with `quantized`, stays as that library runs it, with products in float32. Experts
    run one after the other, in plain matrix products: the grouped kernel knows no float64.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    if not quantized:
        base.raise_problems()
    stored, class_name = base.stored, fitted.name
    dense = stored if quantized else base.dense
    if where.offload is None:
        dense = _stored_once(dense, fitted.brought)
    made = None if fitted.config is None or quantized else make_config(fitted.config)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    offload: dict[str, Any] = {}
    if where.offload is not None:
        limits: dict[Any, int] = {"cpu": where.max_memory}
        if where.device != "cpu":
            index = torch.device(where.device).index or 0
            limits[index] = int(0.8 * torch.cuda.mem_get_info(index)[0])
        offload = {"device_map": "auto", "max_memory": limits, "offload_folder": str(where.offload)}
    try:
        if dense is not stored or stored.of_adapter is not None:
            made = made or make_config(stored.config or {})
            model, report = load_dense(dense, class_name, made, kind, other_sizes=bool(fitted.brought))
        else:
            with TemporaryDirectory(prefix="ia3-export-") as scratch:  # what is offloaded is read again later
                model, report = getattr(transformers, class_name).from_pretrained(
                    adapterless(stored, where.offload or Path(scratch)),
                    config=made,
                    dtype=kind,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=bool(fitted.brought),
                    output_loading_info=True,
                    **offload,
                )
    except Exception as error:  # whatever a damaged or half-known checkpoint makes transformers raise
        raise Unsupported(
            f"transformers cannot load {stored.location.given} as {class_name}: {kind_and_line(error)}",
            hint="load it with from_pretrained() yourself to see the whole message",
        ) from error
    for name, found, wanted in report["mismatched_keys"]:
        _bring(model, name, tuple(found), tuple(wanted), fitted.brought, stored)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    if quantized:
        widen(model)
        return model.eval()
    return model.eval() if offload and dense is stored else model.eval().to(where.device)


def _stored_once(base: Checkpoint, brought: Mapping[str, StoredTensor]) -> Checkpoint:
    """`base` without further names of a tensor whose size the adapter changes.

    Where two names of a tie are stored in another size than the model's, transformers fails to compare them.
    """
    misfits = {n: t for n, t in base.tensors.items() if n in brought and brought[n].shape != t.shape}
    first: dict[str, StoredTensor] = {}
    for name, tensor in misfits.items():
        if not any(same_bytes(tensor, other) for other in first.values()):
            first[name] = tensor
    again = misfits.keys() - first.keys()
    if not again:
        return base
    return replace(base, tensors={n: t for n, t in base.tensors.items() if n not in again})


def _bring(
    model: Any,
    name: str,
    stored: tuple[int, ...],
    wanted: tuple[int, ...],
    brought: Mapping[str, StoredTensor],
    base: Checkpoint,
) -> None:
    """Fill the entry `name`, which the base has in another size, with what the adapter brings.

    Constants of the vocabulary's size (BART's ``final_logits_bias``) are nobody's to bring: transformers
    appends zeros.
    """
    import torch

    tensor, kept = brought.get(name), base.tensors.get(name)
    if name not in dict(model.named_parameters()) and kept is not None and stored[:-1] == wanted[:-1]:
        width = min(stored[-1], wanted[-1])
        constant = model.state_dict()[name].zero_()
        constant[..., :width] = torch.from_numpy(read_values(kept)[..., :width])
        return
    if tensor is None or tensor.shape != wanted:
        raise Unsupported(
            f"{base.location.given} holds {name} as {list(stored)}, {type(model).__name__} needs "
            f"{list(wanted)} for the adapter's labels or vocabulary, and the adapter does not bring it",
            hint="train the adapter on this base, or save it with save_embedding_layers=True",
        )
    fill_entry(model.state_dict(), name, tensor)


def load_as_library_runs_it(trained: FineTune, class_name: str, where: RunDevice) -> Any | None:
    """A quantized base with PEFT's live adapters on its own library's layers; None where PEFT leaves out a
    vector or the head has another size.
    """
    model = load_plain(trained.base, FittedClass(class_name), "float32", where, quantized=True)
    try:
        return _with_peft(model, trained.adapters)[0].eval()
    except _NotByPeft:
        return None


def _with_peft(model: Any, adapters: Sequence[Adapter]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """The PEFT model, and its vectors by module path. Raises `_NotByPeft`.

    What a file lacks was refused before, in the plan; PEFT may still not find what is there under other names
    (of damaged keys, of experts that are fused now), and hooks then apply all that the adapter holds.
    """
    import warnings

    from peft import PeftModel

    if any(adapter.format != "peft" for adapter in adapters):
        raise _NotByPeft
    adapters = named_as_in(model, adapters)
    for adapter in adapters:  # PEFT would wait for an expression that never ends
        adapter.rules.look_at(dict(model.named_modules()))
    names = [f"adapter_{i}" for i in range(len(adapters))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            live = PeftModel.from_pretrained(model, adapters[0].location.path, adapter_name=names[0])
            for name, adapter in zip(names[1:], adapters[1:], strict=True):
                live.load_adapter(adapter.location.path, adapter_name=name)
            live.base_model.set_adapter(names)
        except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
            raise _NotByPeft(kind_and_line(error)) from error
    loaded = dict(live.named_parameters())
    vectors = []
    for name, adapter in zip(names, adapters, strict=True):
        for site in adapter.sites.values():
            vector = loaded.get(f"{PEFT_PREFIX}{site.module}.ia3_l.{name}")
            if vector is None:
                raise _NotByPeft
            held = vector.detach().double().cpu().numpy().reshape(-1)
            if not np.array_equal(held, site.vector):
                raise _NotByPeft
            vectors.append((site.module, vector))
    return live, tuple(vectors)
