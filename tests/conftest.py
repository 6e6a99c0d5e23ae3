"""What tests of several folders share."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from copy import copy
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.exported import Exports

_LIBRARIES = (
    "torch", "transformers", "peft", "safetensors", "huggingface_hub", "onnx", "onnx-ir", "onnxscript",
    "onnxruntime", "onnxruntime-genai", "optimum", "bitsandbytes", "compressed-tensors", "gguf", "numpy",
    "click", "rich",
)  # fmt: skip


#: Modules that take a minute or more, longest first: with ``--dist loadfile`` what is left for
#: the end is short.
_LONG = (
    "runtimes/test_optimum.py", "e2e/test_onnx.py", "e2e/test_sample.py", "e2e/test_releases.py",
    "e2e/test_onnx_quantized.py", "onnx/test_trace.py", "parity/test_codes.py", "runtimes/test_genai.py",
    "e2e/test_verify.py", "e2e/test_mutations.py", "e2e/test_bench.py", "runtimes/test_transformers_js.py",
    "models/test_sentence.py", "ci/test_pipeline.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers and commands inherit it
        folder = TemporaryDirectory(prefix="ia3-export-cache-")
        os.environ["IA3_EXPORT_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)
    # torch and transformers hold a million objects that never go; tracing a model makes the collector look at
    # them often
    gc.set_threshold(50_000, 20, 20)
    # torch writes thousands of records of every trace, with whole graphs in them, to whoever listens, and
    # pytest listens to all
    logging.getLogger("torch.__trace").addHandler = lambda handler: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long modules come first, all others as they were."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The releases that the tests ran with; a header would be hidden by ``-q``."""
    found = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    releases = (f"{name} {found.get(name.replace('_', '-'), 'absent')}" for name in _LIBRARIES)
    terminalreporter.write_line(f"releases: {', '.join(releases)}")


@pytest.fixture(scope="session", autouse=True)
def libraries_set_aside(request: pytest.FixtureRequest) -> None:
    """In a worker of pytest-xdist: what the large libraries have made by now is never garbage.

    Every proof collects garbage after each model; where all of transformers is searched for it, that takes
    longer than a tiny model.
    """
    if not hasattr(request.config, "workerinput"):
        return
    import onnxscript  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def operators_read_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """In a worker: torch reads the sources of its five hundred ONNX functions for every graph, a third of a
    second."""
    if not hasattr(request.config, "workerinput"):
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(**options: Any) -> ONNXRegistry:
        registry = copy(read(**options))
        registry.functions = {target: list(known) for target, known in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(scope="session")
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exported folders that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "exports"
    folder.mkdir(exist_ok=True)
    return Exports(folder)
