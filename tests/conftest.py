"""What tests of several folders share."""

from __future__ import annotations

import pytest

from tests.support.exported import Exports


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Exports:
    """Exported folders that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "exports"
    folder.mkdir(exist_ok=True)
    return Exports(folder)
