"""The safetensors header against the safetensors library, and against any bytes at all."""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from ia3_export.checkpoint.header import (
    MAX_HEADER,
    Shard,
    read_bytes,
    read_header,
    tensor_bytes,
    write_header,
)
from ia3_export.errors import DamagedFile, IA3ExportError
from ia3_export.fold import DTYPE_BITS

#: The dtypes that numpy can express, as numpy and as safetensors spell them.
NUMPY_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
    "complex64": "C64",
}  # fmt: skip

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
metadata = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=3)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype, shape = draw(st.sampled_from(sorted(NUMPY_DTYPES))), draw(shapes)
    count = int(np.prod(shape))
    if dtype == "bool":
        return np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype).reshape(shape)
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)


tables = st.dictionaries(names, arrays(), max_size=5)
entries = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), shapes), max_size=6).map(
    lambda table: [
        (name, dtype, shape) for name, (dtype, shape) in table.items() if tensor_bytes(dtype, shape) >= 0
    ]
)


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write(file: Path, prefix: bytes, data: bytes = b"") -> Path:
    file.write_bytes(prefix + data)
    return file


# -------------------------------------------------------------------------------------------------
# round trips


@given(entries, metadata)
@quick
def test_what_is_written_is_read_back(folder: Path, table: list[Any], extra: dict[str, str]) -> None:
    prefix, offsets = write_header(table, extra)
    size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in table)
    shard = read_header(write(folder / "a.safetensors", prefix, bytes(size)))
    assert {(t.name, t.dtype, t.shape) for t in shard.tensors} == set(table)
    assert {t.name: t.offset for t in shard.tensors} == offsets
    assert shard.metadata == extra
    assert shard.prefix == prefix


@given(tables, metadata)
@quick
def test_the_library_reads_what_is_written(
    folder: Path, table: dict[str, Any], extra: dict[str, str]
) -> None:
    from safetensors import safe_open

    prefix, offsets = write_header(
        [(n, NUMPY_DTYPES[a.dtype.name], a.shape) for n, a in table.items()], extra
    )
    data = bytearray(sum(array.nbytes for array in table.values()))
    for name, array in table.items():
        start = offsets[name] - len(prefix)
        data[start : start + array.nbytes] = array.tobytes()
    file = write(folder / "b.safetensors", prefix, bytes(data))
    with safe_open(file, "np") as opened:
        assert (opened.metadata() or {}) == extra
        assert set(opened.keys()) == set(table)
        for name, array in table.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(tables, metadata)
@quick
def test_what_the_library_writes_is_read(folder: Path, table: dict[str, Any], extra: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    file = folder / "c.safetensors"
    save_file(table, file, metadata=extra or None)  # with {} and no tensor the library writes "{},..."
    shard = read_header(file)
    assert shard.metadata == extra
    assert {t.name: (t.dtype, t.shape, read_bytes(t)) for t in shard.tensors} == {
        name: (NUMPY_DTYPES[array.dtype.name], array.shape, array.tobytes()) for name, array in table.items()
    }


@given(entries, metadata, st.randoms(use_true_random=False))
@quick
def test_the_bytes_do_not_depend_on_the_order_of_anything(
    table: list[Any], extra: dict[str, str], random: Any
) -> None:
    shuffled, turned = list(table), list(extra.items())
    random.shuffle(shuffled)
    random.shuffle(turned)
    assert write_header(shuffled, dict(turned)) == write_header(table, extra)


@given(entries)
@quick
def test_every_tensor_is_aligned_to_its_elements(table: list[Any]) -> None:
    _, offsets = write_header(table, {})
    for name, dtype, _ in table:
        assert DTYPE_BITS[dtype] % 8 or offsets[name] % (DTYPE_BITS[dtype] // 8) == 0


def test_every_dtype_of_the_library_is_known() -> None:
    """The library lists its dtypes when it meets one that it does not know."""
    from safetensors import SafetensorError

    body = b'{"a":{"dtype":"?","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(SafetensorError) as error:
        by_the_library(struct.pack("<Q", len(body)) + body)
    listed = set(
        str(error.value).partition("expected one of")[2].partition(" at line")[0].replace("`", "").split(", ")
    )
    assert {name.strip() for name in listed} == set(DTYPE_BITS)


# -----------------------------------------------------------------------------------------------------
# any bytes


def by_the_library(raw: bytes) -> list[Any]:
    """Names and entries as the safetensors library parses them."""
    from safetensors import deserialize

    return list(deserialize(raw))  # type: ignore[no-untyped-call]


def accepted(file: Path) -> Shard | None:
    """The header, or None when it is refused; any error outside our family fails the test."""
    try:
        return read_header(file)
    except IA3ExportError as error:
        assert str(file) in str(error)
        str(error).encode()
        return None


def agrees_with_the_library(file: Path) -> None:
    """What is read must be what the library reads: a file that it refuses must be refused."""
    from safetensors import SafetensorError

    shard = accepted(file)
    if shard is None:
        return
    try:
        found = by_the_library(file.read_bytes())
    except SafetensorError as error:
        pytest.fail(f"read, though the library refuses it: {error}")
    assert {t.name: (t.dtype, list(t.shape), read_bytes(t)) for t in shard.tensors} == {
        name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in found
    }


@given(st.binary(max_size=200))
@example(b"")
@example(struct.pack("<Q", 2) + b"{}")
@quick
def test_random_bytes_are_read_or_refused(folder: Path, raw: bytes) -> None:
    agrees_with_the_library(write(folder / "d.safetensors", raw))


@given(st.binary(max_size=100), st.binary(max_size=20))
@quick
def test_random_header_bodies_are_read_or_refused(folder: Path, body: bytes, data: bytes) -> None:
    agrees_with_the_library(write(folder / "e.safetensors", struct.pack("<Q", len(body)) + body, data))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "BOOL", "F4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
header_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F4", "C64"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | json_values,
    },
)


@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), header_entries | json_values, max_size=3)
    | json_values
)
@example({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}})
@example({"a": {"dtype": {}, "shape": [1], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 4 * 10**400]}})
@example({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}})
@example({"__metadata__": {"a": 1}})
@example({"__metadata__": []})
@settings(quick, max_examples=250)
def test_any_json_in_the_header_is_read_or_refused(folder: Path, header: Any) -> None:
    body = json.dumps(header).encode()
    agrees_with_the_library(write(folder / "f.safetensors", struct.pack("<Q", len(body)) + body, bytes(40)))


def valid_file() -> bytes:
    from safetensors.numpy import save

    table = {
        "w": np.arange(6, dtype="f4").reshape(2, 3),
        "b": np.arange(3, dtype="i8"),
        "z": np.zeros((0, 4), "f8"),
    }
    return bytes(save(table, metadata={"format": "pt"}))


@given(st.data())
@settings(quick, max_examples=250)
def test_mutations_of_a_valid_file_are_read_or_refused(folder: Path, data: st.DataObject) -> None:
    raw = bytearray(valid_file())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "swap digits", "truncate"]))
        if how == "set":
            raw[place] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[place : place + data.draw(st.integers(1, 8))]
        elif how == "insert":
            raw[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        elif how == "swap digits":
            digits = [i for i, byte in enumerate(raw[8:], 8) if chr(byte).isdigit()]
            if digits:
                raw[data.draw(st.sampled_from(digits))] = data.draw(st.sampled_from(b"0123456789"))
        else:
            del raw[place:]
        assume(raw)
    agrees_with_the_library(write(folder / "g.safetensors", bytes(raw)))


def test_half_a_surrogate_pair_is_no_name(folder: Path) -> None:
    body = b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    agrees_with_the_library(write(folder / "i.safetensors", struct.pack("<Q", len(body)) + body, bytes(4)))


# -----------------------------------------------------------------------------------------------
# how much memory


def peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(file: Path) -> None:
    with pytest.raises(DamagedFile):
        read_header(file)


@pytest.mark.parametrize("length", [200, MAX_HEADER, MAX_HEADER + 1, 2**40, 2**64 - 1])
def test_a_length_beyond_the_file_allocates_nothing(folder: Path, length: int) -> None:
    file = write(folder / "j.safetensors", struct.pack("<Q", length) + b"{}", bytes(100))
    refused(file)  # imports and caches
    assert peak_of(lambda: refused(file)) < 100_000


@pytest.mark.parametrize("shape", [[2**62], [2**31, 2**31, 2**31], [10] * 300])
def test_a_shape_beyond_the_file_allocates_nothing(folder: Path, shape: list[int]) -> None:
    nbytes = 4
    for extent in shape:
        nbytes *= extent
    body = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    file = write(folder / "k.safetensors", struct.pack("<Q", len(body)) + body, bytes(100))
    refused(file)
    assert peak_of(lambda: refused(file)) < 200_000


def test_data_is_not_read_with_the_header(folder: Path) -> None:
    prefix, _ = write_header([("a", "U8", (50_000_000,))], {})
    file = write(folder / "l.safetensors", prefix)
    with file.open("r+b") as opened:
        opened.truncate(len(prefix) + 50_000_000)
    read_header(file)
    assert peak_of(lambda: read_header(file)) < 100_000


def test_deeply_nested_json_is_refused(folder: Path) -> None:
    body = b"[" * 200_000
    refused(write(folder / "m.safetensors", struct.pack("<Q", len(body)) + body))


def test_a_number_of_many_digits_is_refused(folder: Path) -> None:
    body = b'{"a":{"dtype":"U8","shape":[' + b"9" * 50_000 + b'],"data_offsets":[0,1]}}'
    refused(write(folder / "n.safetensors", struct.pack("<Q", len(body)) + body, b"\0"))
