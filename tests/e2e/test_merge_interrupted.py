"""``ia3-export merge`` of large bases: interrupted, killed, and twice at once."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.command import command_line, merge, only_complaint, run
from tests.support.merged import PEFT_WARNINGS
from tests.support.tensors import same

pytestmark = PEFT_WARNINGS

# ------------------------------------------------------------------------------------------- interrupted and
# at once


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base of 480 MB in two files and its adapter, large enough to be caught in the middle of a merge."""
    import torch
    from peft import IA3Config, get_peft_model
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("large")
    (folder / "base").mkdir()
    with torch.device("meta"):
        model = torch.nn.ModuleDict({f"layer{i}": torch.nn.Linear(4096, 4096, bias=False) for i in range(8)})
    weight_map: dict[str, str] = {}
    for shard in (1, 2):
        name = f"model-0000{shard}-of-00002.safetensors"
        names = [f"layer{i}.weight" for i in range(8) if i % 2 == shard - 1]
        weights = {key: torch.zeros(4096, 4096, dtype=torch.float32) for key in names}
        save_file(weights, folder / "base" / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = IA3Config(target_modules=[f"layer{i}" for i in range(1, 8)], feedforward_modules=[])
    model.to_empty(device="cpu")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder for large outputs, emptied at once: pytest would keep it for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@contextmanager
def stopped_merge(large: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A merge that was stopped (SIGSTOP) after its first weights were written and before it was done."""
    args = ("merge", "--base", large / "base", "--adapter", large / "adapter", "--output", output)
    process = subprocess.Popen(command_line(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: any(written(path) for path in output.parent.rglob("*.safetensors")))
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None, "the merge was over before it could be stopped"
        assert not output.exists()
        yield process
    finally:
        process.kill()
        process.communicate()


def written(path: Path) -> bool:
    """Whether more than a header of the (sparse) file has reached it."""
    try:
        return path.stat().st_blocks * 512 > 1 << 20
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
def test_after_a_kill_the_target_is_absent_and_the_next_run_cleans_up(large: Path, place: Path) -> None:
    output = place / "merged"
    with stopped_merge(large, output) as process:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert list(place.iterdir()), "else the merge was not caught in the middle"
    merge(large / "base", large / "adapter", output, "--digests", "none")
    assert [path.name for path in place.iterdir()] == ["merged"]
    assert len(list(output.glob("*.safetensors"))) == 2


@pytest.mark.slow
def test_a_kill_while_replacing_keeps_the_old_output(large: Path, place: Path) -> None:
    output = place / "merged"
    output.mkdir()
    (output / "old.txt").write_text("old")
    manifest = {"schema": "ia3-export/manifest/1", "files": {"old.txt": {}}}
    (output / "ia3_export.json").write_text(json.dumps(manifest))
    args = (
        "merge",
        "--base",
        large / "base",
        "--adapter",
        large / "adapter",
        "--output",
        output,
        "--overwrite",
    )
    with subprocess.Popen(
        command_line(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: any(written(path) for path in place.rglob("*.safetensors")))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in output.iterdir()} == {"old.txt", "ia3_export.json"}


@pytest.mark.slow
def test_an_interrupt_exits_with_130_and_leaves_nothing(large: Path, place: Path) -> None:
    with stopped_merge(large, place / "merged") as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not stdout
    assert not list(place.iterdir())


@pytest.mark.slow
def test_a_second_run_to_the_same_target_is_refused_and_does_not_disturb_the_first(
    large: Path, place: Path
) -> None:
    output = place / "merged"
    with stopped_merge(large, output) as process:
        ran = run("merge", "--base", large / "base", "--adapter", large / "adapter", "--output", output)
        only_complaint(ran, 4, str(output))
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert [path.name for path in place.iterdir()] == ["merged"]


@pytest.mark.slow
def test_large_tensors_are_folded_in_blocks_with_the_right_factors(large: Path, place: Path) -> None:
    """64 MB a tensor, so that many blocks, runs and threads share the work."""
    import torch
    from safetensors.torch import load_file, save_file

    base, adapter = place / "base", place / "adapter"
    base.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        "layer0.weight": torch.randn(300, 4096, generator=generator),
        "layer1.weight": torch.randn(4096, 4096, generator=generator).to(torch.bfloat16),
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(large / "adapter", adapter)
    vector = 1 + torch.randn(4096, 1, generator=generator)
    save_file({"base_model.model.layer1.ia3_l": vector}, adapter / "adapter_model.safetensors")
    merge(base, adapter, place / "merged")
    merged = load_file(place / "merged" / "model.safetensors")
    assert same(
        merged["layer1.weight"], (weights["layer1.weight"].to(torch.float32) * vector).to(torch.bfloat16)
    )
    assert same(merged["layer0.weight"], weights["layer0.weight"])
