"""``--precision keep``: the dense model that a quantized base stands for, and the base's own codes in its
graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ia3_export.adapters.model import Adapter
from ia3_export.errors import Refused
from ia3_export.onnx.blocks import Codes
from ia3_export.onnx.export import TracedGraph
from ia3_export.onnx.kept import lay_out
from ia3_export.planning.moved_inputs import move_inputs
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.planning.recipe import Recipe
from ia3_export.quantization.base import Base, read_base
from ia3_export.quantization.coded import NotCoded
from ia3_export.quantization.packed import CannotKeep, split_vectors
from ia3_export.writing.dense import write_dense

#: Why a weight that the base holds as codes is none in the graph, although nothing is said against it.
OTHER_FORM = "the graph reads it in another form"


@dataclass(frozen=True, slots=True, eq=False)
class KeptBase:
    """A `quantized` base, the `plan` of a merge into the float32 model that it stands for, and by name why
    vectors keep weights from staying codes (`reasons`)."""

    quantized: Base
    plan: Plan
    reasons: Mapping[str, str]


def plan_kept(quantized: Base, adapters: Sequence[Adapter], recipe: Recipe, folder: Path) -> KeptBase:
    """Plan a merge into the float32 model of `quantized`, which is written into `folder`.

    Every quantized weight is exactly what it stands for, vectors are folded in float32 (into biases of 16
    bits, too), and those on the inputs of codes are moved to outputs where that is exact. Raises `Refused`
    for a base that is not quantized or has no codes that are evenly spaced, and the plan's problems.
    """
    if not quantized.is_quantized:
        raise Refused(
            f"{quantized.stored.location.given} is not quantized, so there are no codes to keep",
            hint="--precision int8 or int4 quantizes; keep takes a base in a format of docs/formats.md",
        )
    quantized.raise_problems()
    packed = quantized.quantization.packed
    coded = {name: one for name, one in packed.items() if not isinstance(one.coded, str)}
    if not coded:
        raise without_codes(
            quantized, next(one.coded for one in packed.values() if isinstance(one.coded, str))
        )
    dense = read_base(write_dense(quantized, folder))
    plan = make_plan(dense, adapters, replace(recipe, dtype="float32"))
    plan.raise_problems()
    plan, reasons = move_inputs(plan, coded)
    return KeptBase(quantized, plan, reasons)


def find_codes(kept: KeptBase, graph: TracedGraph) -> tuple[dict[str, Codes], dict[str, str]]:
    """The base's codes with the vectors folded into their scales, by initializer of `graph`; and why the
    other initializers have none. Raises `DamagedFile`."""
    codes: dict[str, Codes] = {}
    reasons: dict[str, str] = {}
    for name, origin in graph.origins.items():
        try:
            codes[name] = _codes_of(kept, origin.tensor)
        except (NotCoded, CannotKeep) as why:
            reasons[name] = str(why)
    return codes, reasons


def without_codes(quantized: Base, reason: str) -> Refused:
    """The error where no weight of `quantized` has codes that a graph can hold."""
    formats = ", ".join(quantized.quantization.formats)
    return Refused(
        f"no weight of {quantized.stored.location.given} ({formats}) has codes that ONNX Runtime computes "
        f"with: {reason}",
        hint="leave out --precision keep; fp32 is exact, int8 and int4 quantize again",
    )


def _codes_of(kept: KeptBase, tensor: str | None) -> Codes:
    if tensor is None:
        raise NotCoded("it is made of several stored tensors")
    change = kept.plan.changes.get(tensor)
    if change is not None and change.taken is not None and change.taken.adapter is not None:
        raise NotCoded("the adapter brings it")
    # what leaves a tie has a copy of its partner's codes
    name = tensor if change is None else change.source.name
    packed = kept.quantized.quantization.packed.get(name)
    if packed is None:
        stored = kept.quantized.stored.tensors.get(name)
        raise NotCoded(f"the base holds it as {stored.dtype}" if stored is not None else OTHER_FORM)
    if isinstance(packed.coded, str):
        raise NotCoded(packed.coded)
    outputs = None
    if change is not None:
        outputs, inputs = split_vectors(change.shape, change.scales, conv1d=packed.conv1d)
        if inputs is not None:
            raise NotCoded(kept.reasons.get(name, "a vector lies on its input"))
    return lay_out(packed.read_codes(), outputs)
