"""``.bin`` files as byte ranges.

Always what ``torch.load`` gives, or a refusal; never a crash, never other bytes.
"""

from __future__ import annotations

import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ia3_export.checkpoint.header import read_bytes
from ia3_export.checkpoint.pickled import read_bin
from ia3_export.errors import IA3ExportError

pytestmark = pytest.mark.filterwarnings(
    "ignore:TypedStorage is deprecated:UserWarning",
    "ignore:Detected pickle protocol:UserWarning",
    "ignore:Sparse .* tensor support is in beta state:UserWarning",
)


def tensors() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(4, 6, generator=generator),
        "half": torch.randn(70, generator=generator).to(torch.bfloat16),
        "bias": torch.randn(300, generator=generator),
        "ids": torch.arange(5),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }


def save(file: Path, state: Any, *, zipped: bool = True) -> Path:
    import torch

    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file


def read_or_refuse(file: Path) -> bool:
    """Whether the file is read; then every tensor must have the bytes that torch gives it."""
    import torch

    try:
        shard = read_bin(file)
    except IA3ExportError as error:
        assert str(file) in str(error)
        return False
    loaded = torch.load(file, weights_only=True)
    assert [tensor.name for tensor in shard.tensors] == list(loaded)
    for tensor in shard.tensors:
        value = loaded[tensor.name].detach().resolve_conj().contiguous()
        assert tensor.shape == tuple(value.shape)
        assert read_bytes(tensor) == value.reshape(-1).view(torch.uint8).numpy().tobytes(), tensor.name
    return True


def rewrite_zip(file: Path, target: Path, compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> Path:
    """The same records as another zip writer lays them out."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            content = replaced.get(Path(record.filename).name, old.read(record.filename))
            new.writestr(record.filename, content)
    return target


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_tensor_is_read_as_torch_does(tmp_path: Path, zipped: bool) -> None:
    assert read_or_refuse(save(tmp_path / "a.bin", tensors(), zipped=zipped))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_views_and_shared_storages_are_read_as_torch_does(tmp_path: Path, zipped: bool) -> None:
    weight = tensors()["weight"]
    state = {
        "all": weight,
        "alias": weight,
        "row": weight[2],
        "column": weight[:, 1],
        "turned": weight.t(),
        "repeated": weight.expand(2, 4, 6),
        "step": weight.view(-1)[::3],
    }
    assert read_or_refuse(save(tmp_path / "a.bin", state, zipped=zipped))


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    import torch

    assert read_or_refuse(save(tmp_path / "a.bin", {"weight": torch.nn.Parameter(tensors()["weight"])}))


def test_a_table_under_state_dict_is_found(tmp_path: Path) -> None:
    shard = read_bin(save(tmp_path / "a.bin", {"state_dict": tensors()}))
    assert [tensor.name for tensor in shard.tensors] == list(tensors())


def test_another_alignment_of_the_storages_is_read_right(tmp_path: Path) -> None:
    from torch.utils.serialization import config

    with config.patch("save.storage_alignment", 4096):
        file = save(tmp_path / "a.bin", tensors())
    assert read_or_refuse(file)


def test_records_laid_out_by_another_zip_writer_are_read_right(tmp_path: Path) -> None:
    """torch reads such a file.

    But under FakeTensorMode it computes where its own writer would have put them.
    """
    file = rewrite_zip(save(tmp_path / "a.bin", tensors()), tmp_path / "b.bin")
    assert read_or_refuse(file)


def test_compressed_records_are_not_taken_for_tensors(tmp_path: Path) -> None:
    file = rewrite_zip(save(tmp_path / "a.bin", tensors()), tmp_path / "b.bin", zipfile.ZIP_DEFLATED)
    read_or_refuse(file)


def test_a_file_of_the_other_byte_order_does_not_end_the_process(tmp_path: Path) -> None:
    file = rewrite_zip(save(tmp_path / "a.bin", tensors()), tmp_path / "b.bin", byteorder=b"big")
    program = (
        "import sys\nfrom pathlib import Path\nfrom ia3_export.checkpoint.pickled import read_bin\n"
        "from ia3_export.errors import IA3ExportError\n"
        "try: read_bin(Path(sys.argv[1]))\nexcept IA3ExportError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def sparse() -> Any:
    return tensors()["weight"].to_sparse()


def on_the_meta_device() -> Any:
    return tensors()["weight"].to("meta")


def conjugated() -> Any:
    import torch

    return torch.complex(torch.ones(3), torch.ones(3)).conj()


def quantized() -> Any:
    import torch

    return torch.quantize_per_tensor(tensors()["weight"], 0.1, 0, torch.qint8)


def float8() -> Any:
    import torch

    return tensors()["weight"].to(torch.float8_e4m3fn)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "make", [sparse, on_the_meta_device, conjugated, quantized, float8], ids=lambda f: f.__name__
)
def test_an_unusual_tensor_is_read_right_or_refused(
    tmp_path: Path, make: Callable[[], Any], zipped: bool
) -> None:
    read_or_refuse(save(tmp_path / "a.bin", {"weight": make()}, zipped=zipped))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, zipped: bool) -> None:
    file = save(tmp_path / "a.bin", tensors(), zipped=zipped)
    raw = file.read_bytes()
    for length in range(0, len(raw) - 1, len(raw) // 40):
        file.write_bytes(raw[:length])
        assert not read_or_refuse(file), length


@pytest.mark.parametrize("seed", range(80))
def test_a_damaged_legacy_file_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    """Bytes changed, cut and inserted in its first 900, where the pickles are."""
    chance = random.Random(seed)
    file = save(tmp_path / "a.bin", tensors(), zipped=False)
    raw = bytearray(file.read_bytes())
    for _ in range(3):
        place = chance.randrange(900)
        how = chance.randrange(3)
        if how == 0:
            raw[place] = chance.randrange(256)
        elif how == 1:
            del raw[place : place + chance.randrange(1, 8)]
        else:
            raw[place:place] = chance.randbytes(3)
    file.write_bytes(raw)
    refused_in_our_words(file)


@pytest.mark.parametrize("seed", range(80))
def test_a_zip_with_a_damaged_pickle_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = save(tmp_path / "a.bin", tensors())
    with zipfile.ZipFile(file) as opened:
        pickled = bytearray(
            opened.read(next(name for name in opened.namelist() if name.endswith("data.pkl")))
        )
    raw = file.read_bytes()
    start = raw.index(pickled)
    for _ in range(3):
        pickled[chance.randrange(len(pickled))] = chance.randrange(256)
    file.write_bytes(raw[:start] + pickled + raw[start + len(pickled) :])
    refused_in_our_words(file)


def refused_in_our_words(file: Path) -> None:
    """Read the file; an error of another family than ours fails the test."""
    try:
        read_bin(file)
    except IA3ExportError as error:
        assert str(file) in str(error)
