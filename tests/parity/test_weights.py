"""The weights proof as a property.

One flipped bit anywhere is found, in the right tensor, and nothing else is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ia3_export import OutputOptions
from ia3_export.checkpoint.folder import Checkpoint, read_checkpoint
from ia3_export.commands.merge import merge, plan_merge
from ia3_export.parity.bits import folder as weights
from ia3_export.parity.bits.folder import prove_folder
from ia3_export.planning.plan import Plan
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["gpt2", "llama-biased", "resnet-basic"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A plan, and the folder that it gives, in one of three dtypes."""
    dtype = {"gpt2": "float32", "llama-biased": "bfloat16", "resnet-basic": "float16"}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    kind = zoo.by_name(request.param)
    model = zoo.build(kind, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    zoo.adapt(model, kind).save_pretrained(folder / "adapter")
    merge(folder / "base", [folder / "adapter"], folder / "merged")
    return plan_merge(folder / "base", [folder / "adapter"]), folder / "merged"


def _flip(checkpoint: Checkpoint, place: float, bit: int) -> str:
    """Flip one bit of the tensors' bytes, at the share `place` of them; returns the tensor's name."""
    tensors = sorted(checkpoint.tensors.values(), key=lambda tensor: tensor.name)
    position = int(place * (sum(tensor.nbytes for tensor in tensors) - 1))
    for tensor in tensors:
        if position < tensor.nbytes:
            with tensor.file.open("r+b") as file:
                file.seek(tensor.offset + position)
                byte = file.read(1)[0]
                file.seek(tensor.offset + position)
                file.write(bytes([byte ^ (1 << bit)]))
            return tensor.name
        position -= tensor.nbytes
    raise AssertionError


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1), bit=st.integers(0, 7), block=st.sampled_from([64, 1000, 1 << 19]))
def test_one_flipped_bit_is_found(merged: tuple[Plan, Path], place: float, bit: int, block: int) -> None:
    plan, folder = merged
    checkpoint = read_checkpoint(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "BLOCK", block // 8 * 8)
        patch.setattr("ia3_export.parity.bits.expected.BLOCK", block // 8 * 8)
        patch.setattr(weights, "_PIECE", 4096)
        name = _flip(checkpoint, place, bit)
        proof = prove_folder(plan, checkpoint)
        assert not proof.passed
        assert [finding.tensor for finding in proof.findings] == [name]
        assert _flip(checkpoint, place, bit) == name
        good = prove_folder(plan, checkpoint)
    assert good.passed and good.findings == ()
    assert good.changed == len(plan.changes)
    assert good.changed + good.unchanged == len(checkpoint.tensors)


def test_hard_links_are_not_read_again(merged: tuple[Plan, Path], tmp_path: Path) -> None:
    plan, _ = merged
    folder = tmp_path / "linked"
    merge(plan.base.stored.folder, [plan.adapters[0].location.path], folder, options=OutputOptions(link=True))
    assert prove_folder(plan, read_checkpoint(folder)).passed


def test_progress_ends_at_the_total(merged: tuple[Plan, Path]) -> None:
    plan, folder = merged
    seen = []
    prove_folder(plan, read_checkpoint(folder), on_progress=seen.append)
    assert seen and max(progress.done for progress in seen) == seen[0].total


def test_a_shard_that_shrinks_meanwhile_is_an_error(merged: tuple[Plan, Path], tmp_path: Path) -> None:
    from ia3_export.errors import DamagedFile

    plan, folder = merged
    shutil.copytree(folder, tmp_path / "copy")
    checkpoint = read_checkpoint(tmp_path / "copy")
    file = checkpoint.shards[-1].path
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    with pytest.raises(DamagedFile, match=file.name):
        prove_folder(plan, checkpoint)
