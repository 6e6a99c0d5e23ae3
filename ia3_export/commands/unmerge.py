"""``unmerge``: divide the vectors out of a merged model again, and measure how far from exact that is.

A fold rounds, so several weights may have given the same product and no division can tell which one it was.
For every element the quotient is therefore folded again, and so are its neighbours in the dtype: where only
one of them gives back the merged value, it is the weight that was there before (the quotient itself may not
be it, next to a power of two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter, Fold
from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.folder import Checkpoint, read_checkpoint
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.checkpoint.manifest import MANIFEST, read_manifest
from ia3_export.checkpoint.side_files import mapping
from ia3_export.errors import Refused, ShapeMismatch, Unsupported
from ia3_export.fold import Array, Scale, fold_block, storage_dtype
from ia3_export.parity.bits.expected import Expected, Reader, expected_blocks
from ia3_export.planning.base_match import is_of
from ia3_export.planning.changes import Change
from ia3_export.planning.merged_recipe import find_recipe
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.planning.recipe import Recipe
from ia3_export.quantization.base import read_base
from ia3_export.writing.card import BASE_CARD
from ia3_export.writing.execute import Progress, write_outputs
from ia3_export.writing.layout import INDEX, OutputFile, lay_out, make_index
from ia3_export.writing.manifest import Manifest, list_files, tool
from ia3_export.writing.stage import check_target, copy_file, staged
from ia3_export.writing.wording import describe_fold

SCHEMA = "ia3-export/unmerge/1"
#: Share of a tensor's elements that may not fold back, since several adapters round several times.
_EXPLAINED = 0.02
#: Places from the quotient that are tried, in this order. What folds back lies side by side, since a fold
#: keeps the order of values: so one whose two neighbours do not is the only one.
_STEPS = (0, 1, -1, 2, -2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """How surely the elements of a tensor are what they were before the merge.

    `certain`: no other value of the dtype folds to the merged one. `ambiguous`: several in a row do, and the
    original is one of them. `unfolded`: nothing near the quotient gives the merged value. With a base that
    has the tensor, `equal` elements have its bits, and `distance` is the largest difference in units of the
    last place.
    """

    tensor: str
    dtype: str
    elements: int
    certain: int
    ambiguous: int
    unfolded: int
    equal: int | None
    distance: int | None


@dataclass(frozen=True, slots=True)
class UnmergedModel:
    """What `unmerge` wrote. `content` lies in the folder as ``ia3_export.json``."""

    folder: Path
    tensors: tuple[Exactness, ...]
    content: Mapping[str, Any]
    warnings: tuple[str, ...]


def unmerge(
    model: str | Path,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    base: str | Path | None = None,
    recipe: Recipe | None = None,
    allow_missing: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> UnmergedModel:
    """Divide the vectors of `adapters` out of a merged `model`.

    Every element becomes ``round_to_dtype(W / l)``, the quotient in float64, the last adapter first, or the
    neighbour of that which gives the merged value when it is folded. Streaming, as `merge`.

    Args:
        model: folder, weight file or hub id of a dense merged model.
        adapters: what was folded into it, in the same order.
        output: folder to create.
        base: the original, if it is at hand: the result is then compared with it.
        recipe: how several adapters were merged (``combine`` and ``weights``); by default what the model's
            manifest says.
        allow_missing: accept targeted modules without a vector.
        overwrite: replace an output folder that a command of ours wrote, and in which nothing else lies.
        on_progress: called with bytes done and in total.

    Tensors that the adapters brought (heads, embeddings) stay, as does ``config.json``: what was there before
    is not in the merged model.

    More than seven parameters: each but the last is an input, or what the command line asks of it.

    Raises `Refused` for a zero in a vector (what it multiplied is lost), `Unsupported` for a quantized model,
    and what `merge` raises.
    """
    check_arguments(unmerge, locals())
    whole = read_base(model)
    checkpoint = whole.stored
    read = [read_adapter(source) for source in adapters]
    how, warnings = find_recipe(whole, whole, len(read), recipe, "the model's manifest")
    how = replace(how, allow_missing=how.allow_missing or allow_missing)
    if whole.is_quantized:
        raise Unsupported(
            f"{checkpoint.location.given} is quantized, and vectors are not divided out of scales",
            hint="merge adapters of your choice into the original base instead",
        )
    warnings += _compare_record(checkpoint, read)
    warnings += _staying(read)
    alone = replace(checkpoint, folded=())
    plan = make_plan(
        replace(whole, stored=alone, dense=alone),
        [replace(a, extras={}, vectors_only=True) for a in read],
        replace(how, dtype="auto", quantized="dequantize", tokenizer="base"),
    )
    plan.raise_problems()
    # an adapter may have lost a vector on its way into the model
    divided = (*read, *plan.adapters)
    left = [folded for folded in checkpoint.folded if not any(is_of(folded, a) for a in divided)]
    original = read_checkpoint(base) if base is not None else None
    if how.dtype != "auto":
        warnings.append(
            f"the merge also wrote {how.dtype}: what was there before in another dtype is not known any more"
        )
    inverse = replace(
        plan, changes={name: _invert(change) for name, change in plan.changes.items()}, config=None
    )
    target = Path(output)
    inputs = [*checkpoint.location.inputs, *(path for a in read for path in a.location.inputs)]
    inputs += original.location.inputs if original is not None else []
    check_target(target, inputs, overwrite=overwrite)
    with staged(target, overwrite=overwrite) as stage:
        files = lay_out(inverse)
        write_outputs([(stage, files)], link=False, digests=False, on_progress=on_progress)
        _copy_side_files(checkpoint, stage, make_index(inverse, files))
        tensors = tuple(_settle(plan, inverse, original, _places(stage, files), how.dtype == "auto"))
        warnings += [said for adapter in plan.adapters for said in adapter.warnings]
        warnings += _found(tensors) if how.dtype == "auto" else []
        content = {
            "schema": SCHEMA,
            "tool": tool(),
            "model": checkpoint.location.name,
            "adapters": [adapter.name for adapter in read],
            "folded": [folded.to_json() for folded in left],
            "options": {"combine": how.combine, "weights": list(how.weights), "cast": how.cast},
            "exactness": [asdict(row) for row in tensors],
            "warnings": warnings,
            "files": list_files(stage, known={}, hashed=True),
        }
        (stage / MANIFEST).write_text(Manifest(target, content).to_json(), encoding="utf-8")
    return UnmergedModel(target, tensors, content, tuple(warnings))


def _staying(adapters: Sequence[Adapter]) -> Iterator[str]:
    for adapter in adapters:
        if adapter.extras:
            names = ", ".join(sorted(adapter.extras)[:3]) + (" ..." if len(adapter.extras) > 3 else "")
            yield (
                f"{adapter.name} brought {names}: they stay, since the model does not hold what they replaced"
            )


def _places(stage: Path, files: Sequence[OutputFile]) -> dict[str, tuple[Path, int]]:
    """File and byte of every changed tensor that was written."""
    pieces = ((file, piece) for file in files for piece in file.pieces)
    return {p.change.name: (stage / file.name, p.position) for file, p in pieces if p.change is not None}


def _compare_record(model: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[str]:
    """What the manifest of the merged model says that does not go with the adapters given."""
    manifest = read_manifest(model.folder)
    try:
        folded = [(str(row["name"]), int(row["parameters"])) for row in manifest["adapters"]]
    except (ValueError, KeyError, TypeError, OverflowError):
        yield (
            "the model has no manifest that says what was folded into it: a wrong adapter would be divided "
            "out all the same"
        )
        return
    taken = mapping(manifest.get("taken_from_adapters"))
    if taken:
        yield f"{', '.join(sorted(taken))} came from the adapters, and stay"
    given = [(adapter.name, adapter.parameters) for adapter in adapters]
    if folded != given:
        yield (
            f"the model's manifest says that {', '.join(name for name, _ in folded)} were folded into it, "
            f"given are {', '.join(name for name, _ in given)}"
        )


def _invert(change: Change) -> Change:
    if change.how != "fold":
        raise Refused(
            f"{change.name} would be {change.how} by a merge, so the model holds no merge of these adapters",
            hint="give the folder that merge wrote, and the adapters that it folded",
        )
    pairs = list(zip(change.scales, change.folds, strict=True))[::-1]
    return replace(
        change,
        scales=tuple(_reciprocal(scale, fold) for scale, fold in pairs),
        folds=tuple(fold for _, fold in pairs),
    )


def _reciprocal(scale: Scale, fold: Fold) -> Scale:
    zeros = np.flatnonzero(scale.factors == 0)
    if len(zeros):
        raise Refused(
            f"the vector of {describe_fold(fold)} is zero at element {zeros[0]} ({len(zeros)} such "
            "elements): what it multiplied is lost",
            hint="merging cannot be undone for these channels; keep the original base",
        )
    with np.errstate(over="ignore"):
        return Scale(1.0 / scale.factors.astype("<f8"), scale.inner)


def _copy_side_files(model: Checkpoint, stage: Path, index: bytes | None) -> None:
    """The model's files; the base's own card, which `merge` had put aside, gets its name back."""
    for relative in model.side_files:
        merge_card = relative == "README.md" and MANIFEST in model.side_files
        if relative in (MANIFEST, BASE_CARD) or merge_card:
            continue
        copy_file(model.folder / relative, stage / relative)
    if BASE_CARD in model.side_files:
        copy_file(model.folder / BASE_CARD, stage / "README.md")
    if index is not None:
        (stage / INDEX).write_bytes(index)


def _settle(
    plan: Plan,
    inverse: Plan,
    original: Checkpoint | None,
    places: Mapping[str, tuple[Path, int]],
    same_dtype: bool,
) -> Iterator[Exactness]:
    """Look at every quotient written (`places`: file and byte), and correct those whose neighbour it must be.

    Nothing is certain of a merge that did not keep the `same_dtype`.
    """
    if original is not None and not original.tensors.keys() & plan.base.stored.tensors.keys():
        raise ShapeMismatch(
            f"{original.location.given} has none of the model's tensors, such as {min(plan.changes)}",
            hint="--base is not the merge's base",
        )
    reader = Reader()
    with reader.stack:
        for name in sorted(plan.changes):
            # a head that the merge untied has no tensor of its own in the base
            before = original.tensors.get(name) if original is not None else None
            path, position = places[name]
            with path.open("r+b") as file:
                yield _settle_tensor(
                    plan.changes[name], inverse.changes[name], before, reader, file, position, same_dtype
                )


def _settle_tensor(
    forward: Change,
    backward: Change,
    original: StoredTensor | None,
    reader: Reader,
    file: BinaryIO,
    position: int,
    same_dtype: bool,
) -> Exactness:
    tensor, dtype = forward.source, forward.dtype
    stored = storage_dtype(dtype)
    if original is not None and (original.dtype, original.shape) != (dtype, tensor.shape):
        raise ShapeMismatch(
            f"{tensor.name} is {original.dtype} {list(original.shape)} in the base, {dtype} "
            f"{list(tensor.shape)} in the model",
            hint="--base is not the merge's base, or the merge changed the dtype",
        )
    row = Expected(
        name=tensor.name, dtype=dtype, source=tensor, scales=backward.scales, how="fold", base=None
    )
    certain = ambiguous = unfolded = equal = distance = 0
    for block, first in expected_blocks(row, reader):
        quotient = block.copy()
        span = first * stored.itemsize, len(quotient) * stored.itemsize
        merged = _bits(reader.read(tensor, *span, "merged"), dtype)
        candidates = [_step(quotient, dtype, steps) for steps in _STEPS]
        folds = np.stack(
            [
                _bits(fold_block(values, first, dtype, dtype, forward.scales, reader.work), dtype) == merged
                for values in candidates
            ]
        )
        count = folds.sum(axis=0)
        certain += int(np.sum(count == 1)) if same_dtype else 0
        ambiguous += int(np.sum(count > (1 if same_dtype else 0)))
        unfolded += int(np.sum(count == 0))
        nearest = folds.argmax(axis=0)  # the first that folds back; where none does, the quotient
        if nearest.any():
            quotient = np.choose(nearest, candidates)
            file.seek(position + span[0])
            file.write(quotient.tobytes())
        if original is not None:
            before = _ordinal(reader.read(original, *span, "original"), dtype)
            apart = np.abs(_ordinal(quotient, dtype) - before)
            equal += int(np.sum(apart == 0))
            distance = max(distance, int(apart.max(initial=0)))
    return Exactness(
        tensor=tensor.name,
        dtype=dtype,
        elements=tensor.size,
        certain=certain,
        ambiguous=ambiguous,
        unfolded=unfolded,
        equal=equal if original is not None else None,
        distance=distance if original is not None else None,
    )


def _bits(values: Array, dtype: str) -> Array:
    return values.view(f"<u{storage_dtype(dtype).itemsize}")


def _ordinal(values: Array, dtype: str) -> Array:
    """Stored bits as integers in the order of the values, so that neighbours differ by one; both zeros are 0.

    float64 ordinals do not fit the difference of opposite signs, whose distance is then
    meaningless and large.
    """
    bits = _bits(values, dtype)
    sign = bits.dtype.type(2 ** (8 * bits.itemsize - 1))
    magnitude = (bits & (sign - bits.dtype.type(1))).astype("<i8")
    return np.asarray(np.where(bits & sign, -magnitude, magnitude))


def _step(values: Array, dtype: str, steps: int) -> Array:
    """Stored bits of the values `steps` places up (or, negative, down) in the order of `dtype`."""
    if steps == 0:
        return values
    ordinal = _ordinal(values, dtype) + steps
    sign = 2 ** (8 * storage_dtype(dtype).itemsize - 1)
    magnitude = np.abs(ordinal).astype("<u8")
    bits = np.where(ordinal < 0, magnitude | np.uint64(sign), magnitude)
    return np.asarray(bits, f"<u{storage_dtype(dtype).itemsize}").view(storage_dtype(dtype))


def _found(tensors: Sequence[Exactness]) -> Iterator[str]:
    wrong = [row for row in tensors if row.unfolded > _EXPLAINED * row.elements]
    if wrong:
        yield (
            f"{sum(row.unfolded for row in wrong):,} elements in {len(wrong)} tensors, first "
            f"{wrong[0].tensor}, do not fold back to the model's values: these adapters were not folded "
            "into it, or in another way"
        )
