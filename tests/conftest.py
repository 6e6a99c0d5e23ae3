"""What tests of several folders share."""

from __future__ import annotations

import pytest

from tests.support.exported import Exports


@pytest.fixture(scope="session")
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exported folders that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "exports"
    folder.mkdir(exist_ok=True)
    return Exports(folder)
