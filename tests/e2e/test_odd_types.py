"""Settings and values of types that nobody expects there: read or refused in words, never a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ia3_export.checkpoint.folder import read_checkpoint
from tests.e2e.command import Ran, run
from tests.e2e.conftest import Tiny
from tests.support.quantized import source_of, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
ODD: list[Any] = [None, True, -1, 1.5, float("nan"), "x", "", [], [1], [[]], {}, {"a": []}, 10**30]


def understood(ran: Ran) -> bool:
    """Read, or refused with a hint."""
    return ran.code == 0 or (ran.code == 3 and "hint: " in ran.stderr)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a JSON document, two entries of a list."""
    if path:
        yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value[:2] if isinstance(value, list) else [])
    )
    for key, entry in entries:
        yield from places(entry, (*path, key))


def changed(document: str, path: tuple[Any, ...], value: Any) -> str:
    whole = json.loads(document)
    part = whole
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return json.dumps(whole)


@pytest.mark.parametrize("name", ["adapter_config.json", "head_config.json"])
@pytest.mark.parametrize("case", ["bert_classification", "bert_static"])
def test_odd_settings_of_adapterhub_are_understood_or_refused(case: str, name: str, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(FIXTURES / "adapterhub" / case / "adapter", tmp_path / "adapter"))
    document = (adapter / name).read_text()
    odd = []
    for i, path in enumerate(places(json.loads(document))):
        for value in ODD[i % 2 :: 2]:
            (adapter / name).write_text(changed(document, path, value))
            ran = run("inspect", adapter)
            odd += [] if understood(ran) else [(path, value, ran.stderr)]
    assert odd == []


GGUF_ODD: list[tuple[Any, gguf.GGUFValueType]] = [
    ("x", gguf.GGUFValueType.STRING),
    (-1, gguf.GGUFValueType.INT32),
    (2**60, gguf.GGUFValueType.UINT64),
    (float("nan"), gguf.GGUFValueType.FLOAT32),
    (True, gguf.GGUFValueType.BOOL),
    (["x"], gguf.GGUFValueType.ARRAY),
    ([1.5], gguf.GGUFValueType.ARRAY),
]
GGUF_KEYS = (
    "general.type", "split.count", "llama.embedding_length", "llama.block_count",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.rope.freq_base",
    "llama.rope.scaling.type", "llama.expert_count", "llama.attention.layer_norm_rms_epsilon",
    "llama.context_length", "general.alignment", "general.name",
)  # fmt: skip


@pytest.mark.parametrize("key", GGUF_KEYS)
def test_odd_settings_in_gguf_are_understood_or_refused(key: str, tmp_path: Path) -> None:
    source = source_of("gguf-q4_0")
    adapter = write_adapter(tmp_path / "adapter", dict(read_checkpoint(source).config or {}))
    tensors = gguf.GGUFReader(source).tensors
    fields = gguf.GGUFReader(source).fields
    for i, (value, kind) in enumerate(GGUF_ODD):
        file = tmp_path / f"{i}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        for name, field in fields.items():
            if name.startswith("llama.") and name != key:
                writer.add_key_value(name, field.contents(), field.types[0])
        sub = None if kind != gguf.GGUFValueType.ARRAY else gguf.GGUFValueType.get_type(value[0])
        writer.add_key_value(key, value, kind, sub)
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        ran = run("inspect", adapter, "--base", file)
        assert understood(ran), (key, value, ran.stderr)


def values() -> Iterator[Any]:
    import torch

    ones = torch.ones(16, 1)
    yield from (
        None,
        True,
        0,
        1.5,
        "x",
        b"x",
        [],
        {},
        (1, 2),
        {"a": ones},
        [ones],
        torch.Size([1]),
        torch.float32,
    )
    yield from (
        torch.tensor(1.0),
        torch.zeros(0),
        torch.ones(4, dtype=torch.bool),
        torch.ones(4, dtype=torch.complex64),
    )
    yield from (
        torch.eye(4).to_sparse(),
        torch.ones(4, device="meta"),
        torch.nn.Parameter(ones),
        ones.expand(16, 10**9),
    )
    yield from (
        torch.nested.nested_tensor([ones[:2], ones]),
        torch.eye(4).to_sparse_csr(),
        ones.to(torch.float8_e4m3fn),
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("key", ["x.k_proj.ia3_l", "k.multi_lora_b", "state_dict", 1, None, b"k"])
def test_odd_values_in_torch_files_are_understood_or_refused(
    tiny: Tiny, key: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    for i, value in enumerate(values()):
        file = tmp_path / f"{i}.pt"
        torch.save({key: value, "v.multi_lora_b": torch.ones(16, 1)}, file)
        for args in (
            ("inspect", file),
            ("inspect", file, "--map", "(.+)=output"),
            ("inspect", tiny.adapter, "--base", file),
        ):
            ran = run(*args)
            assert understood(ran), (key, value, ran.stderr)
    assert "Traceback" not in capfd.readouterr().err
