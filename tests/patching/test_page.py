"""A second applier, written from docs/patch.md alone: Python's whole numbers and floats, nothing of ours."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

import ia3_export
from tests.e2e.command import contents, merge
from tests.support import zoo
from tests.support.patches import write_patch
from tests.support.quantized import adapter_for, source_of

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def unpacked(raw: bytes, dtype: str) -> float:
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], raw)[0])


def packed(number: float, dtype: str) -> bytes:
    """To nearest, ties to even; what is no number the quiet one."""
    if math.isnan(number):
        quiet = {"F64": 0x7FF8 << 48, "F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}[dtype]
        return quiet.to_bytes(WIDTH[dtype], "little")
    if dtype == "BF16":
        bits = int.from_bytes(packed(number, "F32"), "little")
        return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).to_bytes(2, "little")
    try:
        return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], number)
    except OverflowError:
        return packed(math.copysign(math.inf, number), dtype)


def product(number: bytes, factor: float, piece: dict[str, Any]) -> bytes:
    exact = unpacked(number, piece["dtype"]) * factor  # of two float32 numbers: exact in a float
    once = exact if piece["dtype"] == "F64" else unpacked(packed(exact, "F32"), "F32")
    return packed(unpacked(packed(once, piece["round"]), piece["round"]), piece["to"])


def fold(old: bytes, piece: dict[str, Any], vector: tuple[float, ...]) -> bytes:
    width, stride = WIDTH[piece["dtype"]], piece["stride"]
    made = stride if WIDTH[piece["to"]] == width else WIDTH[piece["to"]]
    records = piece["length"] // made
    out = []
    for i in range(records):
        record = old[piece["offset"] + i * stride :][:stride]
        for at in piece["at"]:
            factor = vector[i // piece["inner"] % len(vector)]
            record = record[:at] + product(record[at : at + width], factor, piece) + record[at + width :]
        out.append(record)
    return b"".join(out)


def apply_by_the_page(patch: Path, folder: Path, target: Path) -> None:
    raw = patch.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    text = header.pop("__metadata__")
    assert hashlib.sha256(text["ia3-export"].encode()).hexdigest() == text["ia3-export-sha256"]
    document = json.loads(text["ia3-export"])
    data = {name: raw[8 + size :][slice(*row["data_offsets"])] for name, row in header.items()}
    for state in [*document["kept"], *document["removed"]]:
        assert hashlib.sha256((folder / state["path"]).read_bytes()).hexdigest() == state["sha256"]
    for row in document["files"]:
        old = (folder / row["from"]["path"]).read_bytes() if row["from"] else b""
        new = b""
        for piece in row["pieces"]:
            if piece["kind"] == "copy":
                new += old[piece["offset"] :][: piece["length"]]
            elif piece["kind"] == "fold":
                vector = data[piece["vector"]]
                new += fold(old, piece, struct.unpack(f"<{len(vector) // 4}f", vector))
            else:
                new += (
                    zlib.decompress(data[piece["tensor"]])
                    if piece["kind"] == "zlib"
                    else data[piece["tensor"]]
                )
        assert hashlib.sha256(new).hexdigest() == row["to"]["sha256"] and len(new) == row["to"]["size"]
        (target / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        (target / row["path"]).write_bytes(new)
    for state in document["kept"]:
        (target / state["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / state["path"], target / state["path"])


def test_a_float32_folder(tmp_path: Path) -> None:
    base, merged, patch = write_patch(tmp_path)
    apply_by_the_page(patch, base, tmp_path / "new")
    assert contents(tmp_path / "new") == contents(merged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("bert-seq-cls", "float16")])
def test_a_merge_of_16_bits(tmp_path: Path, name: str, dtype: str) -> None:
    kind = zoo.by_name(name)
    zoo.build(kind, dtype=dtype).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", "--quiet")
    made = ia3_export.patch(tmp_path / "base", tmp_path / "merged", tmp_path / "p")
    apply_by_the_page(made.path, tmp_path / "base", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(tmp_path / "merged")


@pytest.mark.filterwarnings("ignore")
def test_blocks_with_two_scales(tmp_path: Path) -> None:
    adapter = adapter_for("gguf-q4_k", tmp_path / "adapter")
    merge(source_of("gguf-q4_k"), adapter, tmp_path / "merged", "--quantized", "keep", "--quiet")
    (tmp_path / "base").mkdir()
    shutil.copy(source_of("gguf-q4_k"), tmp_path / "base")
    made = ia3_export.patch(tmp_path / "base", tmp_path / "merged", tmp_path / "p")
    apply_by_the_page(made.path, tmp_path / "base", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(tmp_path / "merged")
