"""AdapterHub's library, in its own environment, still writes and computes what the fixtures hold."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RECIPE = Path("tools/fixtures/adapterhub/write_adapterhub.py")
FIXTURES = Path("tests/fixtures/adapterhub")
CASES = (
    "bert_classification", "bert_alpha", "roberta_classification", "gpt2_alpha", "gpt2_vq_output",
    "bart_seq2seq_lm", "t5_gated_static", "llama_output", "bert_bin",
)  # fmt: skip


def test_the_library_writes_and_computes_what_the_fixtures_hold(tmp_path: Path) -> None:
    """The recipe runs beside no installation of ours.

    It also folds weight and bias from the files by itself and compares.
    """
    from safetensors.torch import load_file

    python = Path(os.environ.get("IA3_EXPORT_OPTIMUM_PYTHON", ROOT / ".venv-optimum" / "bin" / "python"))
    known = python.exists() and subprocess.run(
        [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('adapters') is None)"],
        check=False,
    )
    if not known or known.returncode:
        pytest.skip(
            f"{python} has no adapters; set IA3_EXPORT_OPTIMUM_PYTHON to a python with adapters 1.3.0"
        )
    copy = tmp_path / RECIPE
    copy.parent.mkdir(parents=True)
    (tmp_path / FIXTURES).mkdir(parents=True)
    shutil.copyfile(ROOT / RECIPE, copy)
    done = subprocess.run([python, copy, *CASES], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in CASES:
        written, kept = tmp_path / FIXTURES / case, ROOT / FIXTURES / case
        names = sorted(file.name for file in (kept / "adapter").iterdir())
        assert sorted(file.name for file in (written / "adapter").iterdir()) == names
        for name in names:
            if not name.endswith(".bin"):  # torch's container may differ by version
                assert (written / "adapter" / name).read_bytes() == (kept / "adapter" / name).read_bytes()
        found, expected = (
            load_file(written / "expected.safetensors"),
            load_file(kept / "expected.safetensors"),
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name].double() - value.double()).abs().max() <= 1e-4, (case, name)
