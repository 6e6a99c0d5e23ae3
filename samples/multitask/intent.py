"""The programs of the sample ``minilm_intent``, which this one shares: training, the base in its package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
TASKS = ("topic", "emotion", "request")


def load(program: str) -> ModuleType:
    """``minilm_intent/PROGRAM.py`` as a module; ``import`` would find our own file of that name."""
    file = HERE.parent / "minilm_intent" / f"{program}.py"
    spec = importlib.util.spec_from_file_location(f"minilm_intent_{program}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
