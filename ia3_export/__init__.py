"""ia3-export: from an IA3 fine-tune to files that run anywhere.

    >>> from ia3_export import Recipe, inspect, merge
    >>> inspect("my-adapter", base="my-base").plan.problems       # doctest: +SKIP
    ()
    >>> merge("my-base", ["my-adapter"], "merged")                # doctest: +SKIP
    >>> bfloat16 = Recipe(dtype="bfloat16")
    >>> merge("my-base", ["a", "b"], "both", bfloat16)            # doctest: +SKIP

Every command of the ``ia3-export`` command line is a function of the same name, and its options are fields
of records: `Recipe` (how adapters are folded), `OutputOptions` (how a merge is written), `RunSettings` (how
forwards are run), `GraphOptions` and `BenchSettings`. All are resolved on first use, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ia3_export import errors

if TYPE_CHECKING:
    from ia3_export.adapters import read_adapter
    from ia3_export.benching.bench import bench
    from ia3_export.benching.settings import BenchSettings
    from ia3_export.checkpoint.folder import read_checkpoint
    from ia3_export.commands.apply import apply, revert
    from ia3_export.commands.compare import compare
    from ia3_export.commands.convert import combine, convert
    from ia3_export.commands.export_onnx import export_onnx
    from ia3_export.commands.inspect import inspect
    from ia3_export.commands.merge import merge, merge_each, plan_merge
    from ia3_export.commands.patch import patch
    from ia3_export.commands.plot import plot_vectors
    from ia3_export.commands.refolding import refold
    from ia3_export.commands.unmerge import unmerge
    from ia3_export.commands.verify import verify
    from ia3_export.onnx.options import GraphOptions
    from ia3_export.parity.settings import RunSettings
    from ia3_export.planning.recipe import Recipe
    from ia3_export.writing.options import OutputOptions

__all__ = [
    "BenchSettings",
    "GraphOptions",
    "OutputOptions",
    "Recipe",
    "RunSettings",
    "apply",
    "bench",
    "combine",
    "compare",
    "convert",
    "errors",
    "export_onnx",
    "inspect",
    "merge",
    "merge_each",
    "patch",
    "plan_merge",
    "plot_vectors",
    "read_adapter",
    "read_checkpoint",
    "refold",
    "revert",
    "unmerge",
    "verify",
]

_HOME = {
    "BenchSettings": "ia3_export.benching.settings",
    "GraphOptions": "ia3_export.onnx.options",
    "OutputOptions": "ia3_export.writing.options",
    "Recipe": "ia3_export.planning.recipe",
    "RunSettings": "ia3_export.parity.settings",
    "apply": "ia3_export.commands.apply",
    "bench": "ia3_export.benching.bench",
    "combine": "ia3_export.commands.convert",
    "compare": "ia3_export.commands.compare",
    "convert": "ia3_export.commands.convert",
    "export_onnx": "ia3_export.commands.export_onnx",
    "inspect": "ia3_export.commands.inspect",
    "merge": "ia3_export.commands.merge",
    "merge_each": "ia3_export.commands.merge",
    "patch": "ia3_export.commands.patch",
    "plan_merge": "ia3_export.commands.merge",
    "plot_vectors": "ia3_export.commands.plot",
    "read_adapter": "ia3_export.adapters",
    "read_checkpoint": "ia3_export.checkpoint.folder",
    "refold": "ia3_export.commands.refolding",
    "revert": "ia3_export.commands.apply",
    "unmerge": "ia3_export.commands.unmerge",
    "verify": "ia3_export.commands.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
