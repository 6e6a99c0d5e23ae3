"""What a plan's records are called where people read them."""

from __future__ import annotations

from ia3_export.adapters.model import Fold
from ia3_export.planning.changes import Change, Taken


def describe_fold(fold: Fold) -> str:
    """``adapter: module (output)``."""
    if fold.direction is None:
        return f"{fold.adapter}: experts of {fold.module}"
    return f"{fold.adapter}: {fold.module} ({fold.direction}put)"


def describe_taken(taken: Taken) -> str:
    """``adapter: tensor``, or ``copy of tensor``."""
    return f"copy of {taken.what}" if taken.adapter is None else f"{taken.adapter}: {taken.what}"


def describe_change(change: Change) -> list[str]:
    """Where the bytes of a changed tensor come from, and the vectors that are folded into them."""
    taken = [describe_taken(change.taken)] if change.taken is not None else []
    return [*taken, *map(describe_fold, change.folds)]
