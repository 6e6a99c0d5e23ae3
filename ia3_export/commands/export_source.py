"""What ``onnx`` exports: a base with adapters, or a model, as a dense checkpoint that can be traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import ADAPTER_CONFIG, Checkpoint, read_checkpoint
from ia3_export.checkpoint.hub import Location
from ia3_export.commands.keeping import KeptBase, plan_kept
from ia3_export.commands.merge import write_merges
from ia3_export.errors import Refused, Unsupported, UsageError
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.planning.recipe import DEFAULT_RECIPE
from ia3_export.quantization.base import Base, read_base
from ia3_export.writing.dense import dense_base, write_dense
from ia3_export.writing.options import OutputOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """What is exported.

    `plan` made the `checkpoint` (of no adapter where it was there); the user `named` a folder that may be
    neither the base nor the checkpoint. `kept` has the codes of a quantized one, if they are asked for.
    `moves`: vectors on inputs may move to rows where codes are made. `swapped` are the adapters that stay
    apart from the graphs.
    """

    checkpoint: Checkpoint
    plan: Plan
    named: Location
    kept: KeptBase | None = None
    moves: bool = False
    swapped: tuple[Adapter, ...] = ()


def fold(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    scratch: Path,
    say: Callable[[str], None],
    *,
    keep: bool,
) -> ExportSource:
    """Base and adapters, merged into `scratch`; `keep`: for the codes of the base to stay.

    Raises what reading, planning and writing raise.
    """
    whole = read_base(base)
    named, read = whole.stored.location, [read_adapter(adapter) for adapter in adapters]
    options = OutputOptions(digests="none", reload_check="none")
    if keep:
        say("dequantizing")
        kept = plan_kept(whole, read, DEFAULT_RECIPE, scratch / "dense")
        say("merging")
        write_merges([(kept.plan, scratch / "merged")], options)
        return ExportSource(
            checkpoint=read_checkpoint(scratch / "merged"), plan=kept.plan, named=named, kept=kept
        )
    moves = not whole.stored.is_gguf  # to which `verify` could not compare them: its plan has GGUF's codes
    if not moves:
        say("dequantizing")
        whole = read_base(write_dense(whole, scratch / "dense"))
    say("merging")
    plan = make_plan(whole, read, DEFAULT_RECIPE)
    plan.raise_problems()
    write_merges([(plan, scratch / "merged")], options)
    return ExportSource(checkpoint=read_checkpoint(scratch / "merged"), plan=plan, named=named, moves=moves)


def read_apart(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    scratch: Path,
    say: Callable[[str], None],
) -> ExportSource:
    """A base whose adapters stay apart; with the head of the first where they bring heads that it has not.

    Raises what reading and planning raise, `UsageError` for adapters of one name and `Unsupported` for heads
    that are not of one shape.
    """
    whole = read_base(base)
    named, read = whole.stored.location, [read_adapter(adapter) for adapter in adapters]
    _check_names(read)
    whole = _dense(whole, scratch, say)
    resolved = []
    for adapter in read:
        plan = make_plan(whole, [adapter], DEFAULT_RECIPE)
        plan.raise_problems()
        resolved.append(plan.adapters[0])
    stored = {name: tensor.shape for name, tensor in whole.dense.tensors.items()}
    if any(stored.get(name) != shape for name, shape in _head_of_all(resolved).items()):
        say("merging the head")
        plan = make_plan(whole, [_without_effect(resolved[0])], DEFAULT_RECIPE)
        write_merges([(plan, scratch / "base")], OutputOptions(digests="none", reload_check="none"))
        whole = read_base(scratch / "base")
    plan = make_plan(whole, (), DEFAULT_RECIPE)
    plan.raise_problems()
    return ExportSource(checkpoint=whole.stored, plan=plan, named=named, swapped=tuple(resolved))


def _check_names(adapters: Sequence[Adapter]) -> None:
    """Raise `UsageError` for two adapters of one name, or with the same vectors."""
    names, digests = ([a.name for a in adapters], [a.digest for a in adapters])
    for keys, said, hint in (
        (names, "have one name", "rename one: they are told apart by it"),
        (digests, "have the same vectors", "give each adapter once"),
    ):
        again = next((key for key, count in Counter(keys).items() if count > 1), None)
        if again is not None:
            given = [a.location.given for a, key in zip(adapters, keys, strict=True) if key == again]
            raise UsageError(f"two adapters {said}: {', '.join(given)}", hint=hint)


def _head_of_all(adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the adapters bring besides their vectors, which must be the same ones.

    Raises `Unsupported` where one brings others: a graph has one place for each.
    """
    first = {name: tensor.shape for name, tensor in adapters[0].extras.items()}
    for adapter in adapters[1:]:
        own = {name: tensor.shape for name, tensor in adapter.extras.items()}
        if own != first:
            name = min(own.items() ^ first.items())[0]
            raise Unsupported(
                f"{adapters[0].name} and {adapter.name} do not bring {name} in one shape, so that one graph "
                "cannot hold both",
                hint="heads with other labels need a graph of their own: export them apart",
            )
    return first


def _without_effect(adapter: Adapter) -> Adapter:
    """`adapter` with vectors of ones: what it brings besides, alone."""
    sites = {key: replace(site, vector=np.ones_like(site.vector)) for key, site in adapter.sites.items()}
    return replace(adapter, sites=sites)


def read_model(model: str | Path, scratch: Path, say: Callable[[str], None], *, keep: bool) -> ExportSource:
    """A merged model; dense, in `scratch`, where it stays quantized; `keep`: for its codes to stay.

    Raises what reading raises, and `Refused` for a model beside an adapter.
    """
    base = read_base(model)
    named = base.stored.location
    if base.stored.holds_adapter:
        raise Refused(
            f"{model} holds a model and an adapter ({ADAPTER_CONFIG}): transformers would apply it "
            "to these weights",
            hint=f"to fold it, --base {model} --adapter {model}; for the model alone, move "
            f"{ADAPTER_CONFIG} away",
        )
    if keep:
        say("dequantizing")
        kept = plan_kept(base, (), DEFAULT_RECIPE, scratch / "dense")
        return ExportSource(checkpoint=kept.plan.base.stored, plan=kept.plan, named=named, kept=kept)
    base = _dense(base, scratch, say)
    plan = make_plan(base, (), DEFAULT_RECIPE)
    plan.raise_problems()
    return ExportSource(checkpoint=base.stored, plan=plan, named=named)


def _dense(base: Base, scratch: Path, say: Callable[[str], None]) -> Base:
    if base.is_quantized or base.stored.is_gguf:
        say("dequantizing")
    return dense_base(base, scratch / "dense")
