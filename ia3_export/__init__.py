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
    from ia3_export.exporting import export_onnx
    from ia3_export.inspection import inspect
    from ia3_export.merging import merge, merge_each, plan_merge
    from ia3_export.parity.verification import verify

__all__ = [
    "bench",
    "errors",
    "export_onnx",
    "inspect",
    "merge",
    "merge_each",
    "plan_merge",
    "read_adapter",
    "read_checkpoint",
    "verify",
]

_HOME = {
    "bench": "ia3_export.benching.measuring",
    "export_onnx": "ia3_export.exporting",
    "inspect": "ia3_export.inspection",
    "merge": "ia3_export.merging",
    "merge_each": "ia3_export.merging",
    "plan_merge": "ia3_export.merging",
    "read_adapter": "ia3_export.adapters",
    "read_checkpoint": "ia3_export.checkpoint.folder",
    "verify": "ia3_export.parity.verification",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
