"""MXFP4 expert parameters of gpt-oss: ``<name>_blocks`` and ``<name>_scales``.

Source: transformers ``integrations/mxfp4.py`` (``convert_moe_packed_tensors``). The dense parameter is the
transpose, (experts, in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile
from ia3_export.fold import Array
from ia3_export.quantization.codes import E2M1, E8M0, unpack
from ia3_export.quantization.packed import NoScale, Packed, expect, read_flat

METHOD = "mxfp4"
_NO_SCALE = NoScale("its scales are powers of two")


def find(tensors: Mapping[str, StoredTensor], _: Mapping[str, Any]) -> Iterator[Packed]:
    """The MXFP4 expert parameters among `tensors`. Raises `DamagedFile`."""
    for name, codes in tensors.items():
        if not name.endswith("_blocks") or codes.dtype != "U8":
            continue
        dense = name.removesuffix("_blocks")
        scales = tensors.get(f"{dense}_scales")
        if scales is None:
            raise DamagedFile(f"{codes.file.name} holds {name} without {dense}_scales", hint="fetch it again")
        expect(codes, ("U8",), (None, None, None, 16))
        expect(scales, ("U8",), codes.shape[:3])
        experts, out, groups, _bytes = codes.shape
        shape = (experts, groups * 32, out)
        parts = {name: codes, scales.name: scales}
        rows = partial(_decode, codes, scales, shape)
        yield Packed(
            name=dense,
            method=METHOD,
            format="MXFP4 experts",
            shape=shape,
            parts=parts,
            rows=rows,
            unit=shape[1],
            on_output=_NO_SCALE,
            on_input=_NO_SCALE,
            coded="the codes of MXFP4 are small floats",
        )


def _decode(
    codes: StoredTensor, scales: StoredTensor, shape: tuple[int, ...], first: int, count: int
) -> Array:
    """Whole experts: rows of the dense parameter run along the inputs, codes along them too."""
    _, columns, out = shape
    begin, experts = first // columns, count // columns
    each = out * columns
    raw = read_flat(codes, begin * each // 2, experts * each // 2).reshape(experts * out, -1)
    values = E2M1[unpack(raw, 4, columns)]
    exponents = read_flat(scales, begin * each // 32, experts * each // 32)
    values.reshape(-1, 32)[...] *= E8M0[exponents][:, None]
    return values.reshape(experts, out, columns).transpose(0, 2, 1).reshape(count, out)
