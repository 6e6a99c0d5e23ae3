"""ia3-export: from an IA3 fine-tune to files that run anywhere.

    >>> from ia3_export import inspect, merge
    >>> inspect("my-adapter", base="my-base").plan.problems       # doctest: +SKIP
    ()
    >>> merge("my-base", ["my-adapter"], "merged")                # doctest: +SKIP

Every command of the ``ia3-export`` command line is a function of the same name. They are resolved on first use, so
that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ia3_export import errors

if TYPE_CHECKING:
    from ia3_export.adapters import read_adapter
    from ia3_export.benching.measuring import bench
    from ia3_export.checkpoint.folder import read_checkpoint
    from ia3_export.comparison import compare
    from ia3_export.converting import combine, convert
    from ia3_export.exporting import export_onnx
    from ia3_export.inspection import inspect
    from ia3_export.merging import merge, merge_each, plan_merge
    from ia3_export.parity.verification import verify
    from ia3_export.plotting import plot_vectors
    from ia3_export.unmerging import unmerge

__all__ = [
    "bench",
    "combine",
    "compare",
    "convert",
    "errors",
    "export_onnx",
    "inspect",
    "merge",
    "merge_each",
    "plan_merge",
    "plot_vectors",
    "read_adapter",
    "read_checkpoint",
    "unmerge",
    "verify",
]

_HOME = {
    "bench": "ia3_export.benching.measuring",
    "combine": "ia3_export.converting",
    "compare": "ia3_export.comparison",
    "convert": "ia3_export.converting",
    "export_onnx": "ia3_export.exporting",
    "inspect": "ia3_export.inspection",
    "merge": "ia3_export.merging",
    "merge_each": "ia3_export.merging",
    "plan_merge": "ia3_export.merging",
    "plot_vectors": "ia3_export.plotting",
    "read_adapter": "ia3_export.adapters",
    "read_checkpoint": "ia3_export.checkpoint.folder",
    "unmerge": "ia3_export.unmerging",
    "verify": "ia3_export.parity.verification",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
