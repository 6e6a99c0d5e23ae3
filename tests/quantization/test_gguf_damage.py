"""Damaged GGUF files are refused: by what is wrong, without a traceback, before anything is allocated or
written."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.errors import IA3ExportError
from ia3_export.quantization.detection import dense_view, find_quantization
from tests.e2e.command import only_complaint, run
from tests.quantization.test_gguf import adapters, gguf_file

__all__ = ["adapters"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore")


def _edited(at: int, code: str, value: int) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        made = bytearray(raw)
        struct.pack_into(code, made, at, value)
        return bytes(made)

    return edit


def _of_record(name: str, field: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """Change a number behind a tensor's name: 0 dimensions, 4 and 12 extents, 20 type, 24 offset."""

    def edit(raw: bytes) -> bytes:
        at = raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + field
        return _edited(at, code, value)(raw)

    return edit


_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", ""),
    "magic": (lambda raw: b"GGML" + raw[4:], "magic"),
    "version": (_edited(4, "<I", 9), "version 9"),
    "big-endian": (_edited(4, ">I", 3), "big-endian"),
    "tensors": (_edited(8, "<Q", 1 << 60), "tensors"),
    "metadata": (_edited(16, "<Q", 1 << 60), "metadata"),
    "key": (_edited(24, "<Q", 1 << 62), "ends inside"),
    "one-more-entry": (_edited(16, "<Q", 24), ""),
    "header-cut": (lambda raw: raw[:1000], ""),
    "data-cut": (lambda raw: raw[:-5000], "short"),
    "dimensions": (_of_record("blk.0.attn_k.weight", 0, "<I", 1 << 30), "dimensions"),
    "extent": (_of_record("blk.0.attn_k.weight", 12, "<Q", 1 << 63), "shape"),
    "large": (_of_record("blk.0.attn_k.weight", 12, "<Q", 1 << 40), "short"),
    "blocks": (_of_record("blk.0.attn_k.weight", 4, "<Q", 127), "blocks of 32"),
    "type": (_of_record("blk.0.attn_k.weight", 20, "<I", 999), "type 999"),
    "unaligned": (_of_record("blk.0.attn_k.weight", 24, "<Q", 33), "aligned"),
    "beyond": (_of_record("blk.0.attn_k.weight", 24, "<Q", 1 << 40), "short"),
    "overlap": (_of_record("blk.0.attn_k.weight", 24, "<Q", 0), "overlaps"),
    "twice": (lambda raw: raw.replace(b"blk.0.attn_v.weight", b"blk.0.attn_q.weight"), "twice"),
    "unicode": (lambda raw: raw.replace(b"blk.0.attn_v.weight", b"blk.0.attn_\xff.weight"), "Unicode"),
    "no-architecture": (
        lambda raw: raw.replace(b"general.architecture", b"general.arkhitecture"),
        "architecture",
    ),
    "other-architecture": (
        lambda raw: raw.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0rwkv6", 1),
        "rwkv6",
    ),
    "heads": (
        lambda raw: raw.replace(b"head_count_kv", b"head_count_xx").replace(
            b"head_count\x04\0\0\0\x04", b"head_count\x04\0\0\0\x07"
        ),
        "heads",
    ),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_damaged_files_are_refused(damage: str, adapters: Callable[[Path], Path], tmp_path: Path) -> None:
    edit, mention = _DAMAGE[damage]
    raw = gguf_file("gguf-q8_0").read_bytes()
    assert edit(raw) != raw
    (tmp_path / "base.gguf").write_bytes(edit(raw))
    ran = run(
        "merge",
        "--base",
        tmp_path / "base.gguf",
        "--adapter",
        adapters(gguf_file("gguf-q8_0")),
        "--output",
        tmp_path / "out",
        "--quantized",
        "keep",
    )
    only_complaint(ran, 3, mention)
    assert not (tmp_path / "out").exists()


def test_no_changed_byte_of_the_header_gives_a_traceback(tmp_path: Path) -> None:
    raw = gguf_file("gguf-q8_0").read_bytes()
    end = gguf.GGUFReader(gguf_file("gguf-q8_0")).data_offset
    chosen = random.Random(0)
    path = tmp_path / "base.gguf"
    for _ in range(1500):
        made = bytearray(raw)
        at = chosen.randrange(end)
        made[at] = chosen.choice([0, 1, 0x7F, 0x80, 0xFF, made[at] ^ 1 << chosen.randrange(8)])
        path.write_bytes(made[: chosen.choice([len(made), len(made), at])])
        try:
            base = read_checkpoint(path)
            quantization = find_quantization(base)
            if not quantization.problems:
                dense_view(base, quantization)
        except IA3ExportError as error:
            assert error.hint
