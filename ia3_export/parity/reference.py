"""The unmerged model: base plus live adapters, as they were trained.

PEFT's own forward where PEFT applies every vector; hooks of ours that multiply activations where it does not, or
where the combination is one that PEFT does not know (``delta``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ia3_export.adapters.combine import Combine, combine_vectors
from ia3_export.adapters.model import Adapter, Site
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import read_values
from ia3_export.conversions import in_class_names, loading_rules
from ia3_export.errors import Unsupported
from ia3_export.model_class import load_runtime_model, make_config
from ia3_export.parity.quantized import as_dense, load_dense, widen


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model lives: on `device`, or, with an `offload` folder, layer by layer: at most `max_memory` bytes in
    memory (on the GPU: what it has free), the rest on disk (accelerate). `precision` is the reference's."""

    device: str
    offload: Path | None = None
    max_memory: int = 0
    precision: str = "float64"


@dataclass(frozen=True, slots=True, eq=False)
class LiveModel:
    """A model with its adapters live. `by` is ``peft`` or ``hooks`` (whose handles `hooks` are), or ``none`` without adapters."""

    model: Any
    class_name: str
    by: Literal["peft", "hooks", "none"]
    hooks: tuple[Any, ...]

    @property
    def inner(self) -> Any:
        """The transformers model itself."""
        return self.model.get_base_model() if self.by == "peft" else self.model

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """In this context the vectors (and with PEFT the adapter's heads) are off; hooks are off for good."""
        for handle in self.hooks:
            handle.remove()
        with self.model.disable_adapter() if self.by == "peft" else nullcontext():
            yield


def load_live(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    combine: Combine,
    weights: Sequence[float],
    dtype: str,
    where: Placement,
) -> LiveModel:
    """Load the base in `dtype` with every adapter live. Raises `Unsupported` without a transformers class."""
    if base.config is None:
        raise Unsupported(
            f"{base.location.given} has no config.json, so no model can be built from it",
            hint="give the model folder that save_pretrained() wrote",
        )
    if not adapters:
        name = str((base.config.get("architectures") or ["AutoModel"])[0])
        return LiveModel(load_plain(base, name, None, dtype, where), name, "none", ())
    runtime = load_runtime_model(base.config, adapters[0], base.tensors)
    if combine == "product" and where.offload is None:
        live = _with_peft(load_plain(base, runtime.class_name, runtime.config, dtype, where), adapters)
        if live is not None:
            return LiveModel(live.eval(), runtime.class_name, "peft", ())
    model = load_plain(base, runtime.class_name, runtime.config, dtype, where)
    handles = tuple(_with_hooks(model, adapters, combine, weights))
    return LiveModel(model, runtime.class_name, "hooks", handles)


def load_plain(
    base: Checkpoint,
    class_name: str,
    config: Mapping[str, Any] | None,
    dtype: str,
    where: Placement,
    *,
    quantized: bool = False,
) -> Any:
    """The checkpoint as a transformers model of `class_name`, in eval mode; seeded where a head is made anew.

    `config` replaces the checkpoint's own configuration. A quantized checkpoint is dequantized (exactly in float32 and wider), or,
    of bitsandbytes and with `quantized`, stays as that library runs it, with products in float32. Experts run one after the other, in plain matrix products:
    the grouped kernel knows no float64.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    dense = base if quantized else as_dense(base)
    made = None if config is None or quantized else make_config(config)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    offload: dict[str, Any] = {}
    if where.offload is not None:
        limits: dict[Any, int] = {"cpu": where.max_memory}
        if where.device != "cpu":
            index = torch.device(where.device).index or 0
            limits[index] = int(0.8 * torch.cuda.mem_get_info(index)[0])
        offload = {"device_map": "auto", "max_memory": limits, "offload_folder": str(where.offload)}
    try:
        if dense is not base:
            model = load_dense(dense, class_name, made or make_config(base.config or {}), kind)
        else:
            model = getattr(transformers, class_name).from_pretrained(
                base.folder, config=made, dtype=kind, **offload
            )
    except Exception as error:  # whatever a damaged or half-known checkpoint makes transformers raise
        raise Unsupported(
            f"transformers cannot load {base.location.given} as {class_name}: {type(error).__name__}: "
            f"{(str(error).strip().splitlines() or [''])[0]}",
            hint="load it with from_pretrained() yourself to see the whole message",
        ) from error
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    if quantized:
        widen(model)
        return model.eval()
    return model.eval() if offload and dense is base else model.eval().to(where.device)


def load_as_library_runs_it(
    base: Checkpoint, adapters: Sequence[Adapter], class_name: str, where: Placement
) -> Any | None:
    """A quantized base with PEFT's live adapters on its own library's layers; None where PEFT leaves out a vector."""
    live = _with_peft(load_plain(base, class_name, None, "float32", where, quantized=True), adapters)
    return None if live is None else live.eval()


def _with_peft(model: Any, adapters: Sequence[Adapter]) -> Any | None:
    """The PEFT model, or None when PEFT leaves out a vector or a tensor of an adapter."""
    import warnings

    from peft import PeftModel

    if any(adapter.format != "peft" for adapter in adapters):
        return None
    adapters = _named_as_in(model, adapters)
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
        except (ValueError, RuntimeError, KeyError, AttributeError, TypeError):
            return None
    loaded = dict(live.named_parameters())
    for name, adapter in zip(names, adapters, strict=True):
        for site in adapter.sites.values():
            vector = loaded.get(f"base_model.model.{site.module}.ia3_l.{name}")
            if vector is None:
                return None
            held = vector.detach().double().cpu().numpy().reshape(-1)
            if not np.array_equal(held, site.vector):
                return None
    return live


def _named_as_in(model: Any, adapters: Sequence[Adapter]) -> list[Adapter]:
    rules = loading_rules(model)
    return [in_class_names(adapter, rules) for adapter in adapters]


def _with_hooks(
    model: Any, adapters: Sequence[Adapter], combine: Combine, weights: Sequence[float]
) -> list[Any]:
    import torch

    adapters = _named_as_in(model, adapters)
    modules = dict(model.named_modules())
    state = model.state_dict()
    for adapter in adapters:
        for name, tensor in adapter.extras.items():
            if name in state:
                if state[name].device.type == "meta":
                    raise Unsupported(
                        f"{name} comes from the adapter, and the model is too large for memory",
                        hint="use --weights-only, a larger --max-memory, or a machine with more memory",
                    )
                with torch.no_grad():
                    state[name].copy_(torch.from_numpy(read_values(tensor)))
    handles = []
    for module, site, vector in _combined(adapters, combine, weights):
        target = modules.get(module)
        if target is None:
            raise Unsupported(
                f"module {module} does not exist in {type(model).__name__}, so its vector cannot be applied live",
                hint="its weight is fused at run time (experts of a mixture); --weights-only proves such a merge",
            )
        handles.append(_hook(target, site, vector))
    return handles


def _combined(
    adapters: Sequence[Adapter], combine: Combine, weights: Sequence[float]
) -> list[tuple[str, Site, Any]]:
    if combine == "product":
        return [(site.module, site, site.vector) for a in adapters for site in a.sites.values()]
    union: Mapping[str, Site] = {key: s for a in reversed(adapters) for key, s in a.sites.items()}
    rows = []
    for key, site in union.items():
        vectors = [a.sites[key].vector if key in a.sites else None for a in adapters]
        rows.append((site.module, site, combine_vectors(vectors, weights, combine, "F64")))
    return rows


def _hook(target: Any, site: Site, vector: Any) -> Any:
    import torch

    dimensions = target.weight.dim()  # a bare vector does not say that it is a convolution's
    shape = (1, -1, *(1,) * (dimensions - 2)) if dimensions > 2 else (-1,)
    factors = torch.from_numpy(np.array(vector)).reshape(shape)

    def scaled(values: Any) -> Any:
        return values * factors.to(device=values.device, dtype=values.dtype)

    if site.direction == "out":
        return target.register_forward_hook(lambda _m, _i, output: scaled(output))
    return target.register_forward_pre_hook(lambda _m, inputs: (scaled(inputs[0]), *inputs[1:]))
