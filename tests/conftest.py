"""What tests of several folders share."""

from __future__ import annotations

from importlib import metadata

import pytest

from tests.support.exported import Exports

_LIBRARIES = (
    "torch", "transformers", "peft", "safetensors", "huggingface_hub", "onnx", "onnx-ir", "onnxscript",
    "onnxruntime", "onnxruntime-genai", "optimum", "bitsandbytes", "compressed-tensors", "gguf", "numpy",
    "click", "rich",
)  # fmt: skip


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The releases that the tests ran with; a header would be hidden by ``-q``."""
    found = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    releases = (f"{name} {found.get(name.replace('_', '-'), 'absent')}" for name in _LIBRARIES)
    terminalreporter.write_line(f"releases: {', '.join(releases)}")


@pytest.fixture(scope="session")
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exported folders that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "exports"
    folder.mkdir(exist_ok=True)
    return Exports(folder)
