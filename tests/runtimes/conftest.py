"""Models that the real command line exported, each made once a session, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.command import run
from tests.runtimes.models import PRECISIONS, RECIPES, Exported, read, write


@pytest.fixture(scope="session")
def runtimes_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "runtimes"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def exported(runtimes_folder: Path) -> Callable[[str], Exported]:
    """A row of `RECIPES`, written by PEFT and exported in every precision at its first use.

    ``exported("llama")``.
    """
    from filelock import FileLock

    def get(name: str) -> Exported:
        folder, recipe = runtimes_folder / name, RECIPES[name]
        with FileLock(f"{folder}.lock"):
            if not (folder / "exported").exists():
                write(recipe, folder)
                # no verification here: 4 bits turn too many near ties of random weights for its gate, and
                # what the files compute is what the tests of the runtimes look at
                ran = run(
                    "onnx",
                    "--base",
                    folder / "base",
                    "--adapter",
                    folder / "adapter",
                    "--task",
                    recipe.task,
                    "--output",
                    folder / "exported",
                    "--precision",
                    ",".join(PRECISIONS),
                    "--no-verify",
                )
                assert ran.code == 0, ran.stdout + ran.stderr
        return read(recipe, folder)

    return get
