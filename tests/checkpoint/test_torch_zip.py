"""``torch.save`` files read without torch: what ``torch.load`` gives, or left to torch."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ia3_export.checkpoint.header import read_bytes
from ia3_export.checkpoint.torch_zip import read_plain
from tests.checkpoint.test_pickled import rewrite_zip, save, tensors


def loaded(file: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    import torch

    state = torch.load(file, weights_only=True)
    return {
        name: (tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in state.get("state_dict", state).items()
    }


def read(file: Path) -> dict[str, tuple[tuple[int, ...], bytes]] | None:
    plain = read_plain(file)
    return plain and {name: (tensor.shape, read_bytes(tensor)) for name, tensor in plain.items()}


def parameters() -> dict[str, Any]:
    import torch

    return {"weight": torch.nn.Parameter(tensors()["weight"]), "alias": tensors()["bias"][40:90]}


def a_module() -> dict[str, Any]:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()


def of_a_trainer() -> dict[str, Any]:
    return {"epoch": 3, "best": 0.5, "name": None, "state_dict": tensors()}


@pytest.mark.parametrize("make", [tensors, parameters, a_module, of_a_trainer])
def test_plain_tensors_are_read_as_torch_does(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    file = save(tmp_path / "a.pt", make())
    assert read(file) == loaded(file)


def strided() -> dict[str, Any]:
    return {"a": tensors()["weight"].t()}


def a_number() -> dict[str, Any]:
    return {"a": tensors()["weight"], "lr": 0.1}


def of_a_newer_dtype() -> dict[str, Any]:
    import torch

    return {"a": tensors()["weight"].to(torch.float8_e4m3fn)}


def with_code() -> dict[str, Any]:
    return {"a": tensors()["weight"], "b": Path("x")}


@pytest.mark.parametrize("make", [strided, a_number, of_a_newer_dtype, with_code])
def test_anything_else_is_left_to_torch(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    assert read_plain(save(tmp_path / "a.pt", make())) is None


def test_a_name_that_would_run_code_is_not_looked_up(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    file = rewrite_zip(
        save(tmp_path / "a.pt", tensors()), tmp_path / "b.pt", **{"data.pkl": pickle.dumps({"a": Touch()}, 2)}
    )
    assert read_plain(file) is None
    assert not (tmp_path / "ran").exists()


def test_an_index_that_would_fill_the_memory_costs_nothing(tmp_path: Path) -> None:
    """``LONG_BINPUT`` of the largest index: Python's unpickler in C makes room for all before it."""
    content = b"\x80\x02}r\xff\xff\xff\x7f."
    file = rewrite_zip(save(tmp_path / "a.pt", tensors()), tmp_path / "b.pt", **{"data.pkl": content})
    assert read_plain(file) == {}


@pytest.mark.parametrize("place", [26, 28])
def test_a_damaged_header_of_a_record_does_not_shift_its_bytes(tmp_path: Path, place: int) -> None:
    file = save(tmp_path / "a.pt", tensors())
    with zipfile.ZipFile(file) as archive:
        header = archive.getinfo("a/data/0").header_offset
    raw = bytearray(file.read_bytes())
    raw[header + place] += 4
    file.write_bytes(raw)
    assert read_plain(file) is None


def test_a_storage_smaller_than_the_pickle_says_is_not_read(tmp_path: Path) -> None:
    file = rewrite_zip(save(tmp_path / "a.pt", tensors()), tmp_path / "b.pt", **{"0": b"\0" * 40})
    assert read_plain(file) is None


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_pickle_gives_what_torch_gives_or_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = save(tmp_path / "a.pt", tensors())
    with zipfile.ZipFile(file) as archive:
        content = bytearray(archive.read("a/data.pkl"))
    content[chance.randrange(len(content))] = chance.randrange(256)
    damaged = rewrite_zip(file, tmp_path / "b.pt", **{"data.pkl": bytes(content)})
    found = read(damaged)
    try:
        expected = loaded(damaged)
    except Exception:  # torch looks at more than we need, such as the device's name
        return
    assert found is None or found == expected
