"""GGUF bases, written by gguf and by llama.cpp itself (tools/fixtures/quantized/write_gguf.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.checkpoint.gguf import read_gguf, write_prefix
from ia3_export.checkpoint.gguf_models import ARCHITECTURES, hugging_face_name
from ia3_export.checkpoint.header import StoredTensor, read_bytes
from ia3_export.errors import NotFinite
from ia3_export.fold import Array
from ia3_export.quantization.detection import dense_view, find_quantization
from ia3_export.quantization.gguf import SCALES, find, reload_weights
from ia3_export.quantization.packed import BlockScales, NoScale, Packed
from tests.e2e.command import merge, only_complaint, run, run_process
from tests.support.quantized import (
    FIXTURES,
    GGUF_CASES,
    dense_model,
    expected_weights,
    logits,
    unmerged_logits,
    write_adapter,
)

pytestmark = pytest.mark.filterwarnings("ignore")

#: Files whose scales have both an offset and a factor, or are subnormal float16 numbers.
_COARSE = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k", "q6_k")
LLAMA_CPP = os.environ.get("IA3_EXPORT_LLAMA_CPP_PYTHON", "")
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """An adapter that PEFT writes for the model of a file; one for all models of the same shape."""
    folder = tmp_path_factory.mktemp("adapters")

    def made(base: Path) -> Path:
        config = dict(read_checkpoint(base).config or {})
        target = folder / f"{config['model_type']}-{config['hidden_size']}"
        return target if target.exists() else write_adapter(target, config)

    return made


def gguf_file(case: str) -> Path:
    return FIXTURES / case / "model.gguf"


def _relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _permuted(rows: Array, head: int) -> Array:
    """llama.cpp's own formula (``LlamaModel.permute``)."""
    return rows.reshape(len(rows) // head, 2, head // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _dense(base: Path) -> dict[str, Array]:
    """The dense view of a file as float32 arrays, in Hugging Face's row order."""
    checkpoint = read_checkpoint(base)
    quantization = find_quantization(checkpoint)
    assert quantization.problems == ()
    found = {}
    for name, tensor in dense_view(checkpoint, quantization).tensors.items():
        if tensor.computed is not None:
            found[name] = tensor.computed.read(0, tensor.size).reshape(tensor.shape)
        else:
            assert tensor.dtype == "F32"
            found[name] = np.frombuffer(read_bytes(tensor), "<f4").reshape(tensor.shape)
    return found


def _rewritten(
    base: Path, target: Path, dtype: str, edit: Callable[[str, Array], Array] | None = None
) -> Path:
    """`base` with every matrix as `dtype`, rows as in the file; `edit` may change them before."""
    shard, _ = read_gguf(base)
    read = {tensor.data_offset: tensor for tensor in gguf.GGUFReader(base).tensors}
    values = {}
    for tensor in shard.tensors:
        stored = read[tensor.offset]
        array = gguf.quants.dequantize(stored.data, stored.tensor_type)
        values[tensor.name] = array if edit is None else edit(tensor.name, array)
    kinds = {name: (dtype if array.ndim == 2 else "F32", array.shape) for name, array in values.items()}
    prefix, offsets, size = write_prefix(shard.prefix, kinds)
    written = bytearray(size)
    written[: len(prefix)] = prefix
    for name, array in values.items():
        if kinds[name][0] == "BF16":
            raw = gguf.quants.quantize(array, gguf.GGMLQuantizationType.BF16).tobytes()
        else:
            raw = array.astype({"F32": "<f4", "F16": "<f2"}[kinds[name][0]]).tobytes()
        written[offsets[name] : offsets[name] + len(raw)] = raw
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(written)
    return target


# The reader


@pytest.mark.parametrize("case", GGUF_CASES)
def test_header_is_what_gguf_s_own_reader_finds(case: str) -> None:
    shard, config = read_gguf(gguf_file(case))
    theirs = gguf.GGUFReader(gguf_file(case))
    assert len(shard.prefix) == theirs.data_offset
    assert shard.prefix == gguf_file(case).read_bytes()[: theirs.data_offset]
    wanted = {
        (hugging_face_name(t.name, ARCHITECTURES["llama"]), t.data_offset, t.n_bytes, t.tensor_type.name)
        for t in theirs.tensors
    }
    types = config["quantization_config"]["types"]
    assert {(t.name, t.offset, t.nbytes, types.get(t.name, t.dtype)) for t in shard.tensors} == wanted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_gguf_s_name_map(architecture: str) -> None:
    known = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, 2)
    for kind in gguf.MODEL_TENSORS[known]:
        name = gguf.TENSOR_NAMES[kind].format(bid=1) + ".weight"
        mapped = hugging_face_name(name, ARCHITECTURES[architecture])
        if mapped is not None:
            assert names.get_name(mapped.removesuffix(".weight")) == name.removesuffix(".weight"), mapped


@pytest.mark.parametrize("case", GGUF_CASES)
def test_weights_are_those_of_gguf_s_own_dequantizer(case: str) -> None:
    found, expected = _dense(gguf_file(case)), expected_weights(case)
    assert expected
    for name, wanted in expected.items():
        array = found[str(hugging_face_name(name, ARCHITECTURES["llama"]))]
        np.testing.assert_array_equal(_permuted(array, 32) if "attn_k" in name else array, wanted)


@pytest.mark.parametrize("case", ["gguf-q8_0", "gguf-q4_k_m"])
def test_reading_in_pieces_gives_the_same(case: str) -> None:
    base = read_checkpoint(gguf_file(case))
    for packed in find_quantization(base).packed.values():
        tensor = packed.dense("F16")
        assert tensor.computed is not None
        whole, step = tensor.computed.read(0, tensor.size), tensor.computed.unit
        for start in range(0, tensor.size, step):
            np.testing.assert_array_equal(
                tensor.computed.read(start, step), whole[start : start + step], strict=True
            )


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf_s_own_reader_finds_the_same_weights(case: str) -> None:
    settings = find_quantization(read_checkpoint(gguf_file(case))).settings
    ours = _dense(gguf_file(case))
    theirs = dict(reload_weights(gguf_file(case), settings))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)


# The fold


def _blocks(kind: str, rows: int, seed: int) -> StoredTensor:
    """Random codes of a ggml type with scales of an ordinary size."""
    rng = np.random.default_rng(seed)
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows, 512 // block, nbytes), "u1")
    for at in SCALES[kind]:
        scale = rng.uniform(0.001, 0.01, (rows, 512 // block, 1)).astype("<f2")
        raw[:, :, at : at + 2] = scale.view("u1")
    data = raw.reshape(-1)
    return StoredTensor(
        name="w",
        dtype="U8",
        shape=(rows, data.size // rows),
        file=Path("none"),
        offset=0,
        nbytes=data.size,
        data=data,
    )


def _packed(tensor: StoredTensor, kind: str, head: int = 0) -> Packed:
    settings = {"quant_method": "gguf", "types": {"w": kind}, "head_rows": {"w": head} if head else {}}
    return next(find({"w": tensor}, settings))


def _folded(packed: Packed, factors: Array) -> StoredTensor:
    assert isinstance(packed.on_output, BlockScales)
    made = packed.on_output.fold(factors)
    raw = np.frombuffer(read_bytes(made), "u1")
    return StoredTensor(
        name="w", dtype="U8", shape=made.shape, file=Path("none"), offset=0, nbytes=raw.size, data=raw
    )


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("head", [0, 4])
def test_folding_scales_is_scaling_weights(kind: str, head: int) -> None:
    tensor = _blocks(kind, 16, 1)
    packed = _packed(tensor, kind, head)
    before = packed.rows(0, 16)
    exact = np.resize(np.array([2.0, -1.0, 0.5, 1.0], "<f4"), 16)
    np.testing.assert_array_equal(
        _packed(_folded(packed, exact), kind, head).rows(0, 16), before * exact[:, None]
    )
    factors = (1 + 0.3 * np.random.default_rng(2).standard_normal(16)).astype("<f4")
    factors[::5] *= -1
    after = _packed(_folded(packed, factors), kind, head).rows(0, 16)
    assert _relative(after, before * factors[:, None]) <= (3e-4 if len(SCALES[kind]) == 1 else 6e-4)


@pytest.mark.parametrize("case", GGUF_CASES)
@pytest.mark.parametrize("size", [1.0, 0.4, 1e-3], ids=["as stored", "weights of 0.02", "small vectors"])
def test_the_rounding_of_a_fold_is_measured(case: str, size: float) -> None:
    base = read_checkpoint(gguf_file(case))
    for seed, packed in enumerate(find_quantization(base).packed.values()):
        rows = packed.shape[0]
        factors = (size * (1 + 0.3 * np.random.default_rng(seed).standard_normal(rows))).astype("<f4")
        assert isinstance(packed.on_output, BlockScales)
        made = packed.on_output.fold(factors)
        kind = packed.format.removeprefix("GGUF ")
        raw = np.frombuffer(read_bytes(made), "u1")
        stored = StoredTensor(
            name="w", dtype="U8", shape=made.shape, file=Path("none"), offset=0, nbytes=raw.size, data=raw
        )
        after = _packed(stored, kind, packed.unit if packed.unit > 1 else 0).rows(0, rows)
        wanted = packed.rows(0, rows) * factors[:, None]
        by_row = np.linalg.norm(after - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        measured = packed.on_output.rounding(factors)
        # rows whose scales lose the same may lose more or less themselves
        assert 0.5 * by_row.max() <= measured <= 1.001 * by_row.max(), packed.name


def test_small_vectors_are_warned_of(adapters: Callable[[Path], Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = shutil.copytree(adapters(gguf_file("gguf-q8_0")), tmp_path / "adapter")
    vectors = load_file(adapter / "adapter_model.safetensors")
    key = next(name for name in vectors if "v_proj" in name)
    vectors[key].reshape(-1)[::5] = 1e-3
    save_file(vectors, adapter / "adapter_model.safetensors", {"format": "pt"})
    ran = run("inspect", adapter, "--base", gguf_file("gguf-q8_0"), "--json")
    sites = {site["weight"]: site for site in json.loads(ran.stdout)["plan"]["quantization"]["sites"]}
    assert sites[f"{LAYER}.self_attn.v_proj.weight"]["rounding"] > 0.02
    assert sites[f"{LAYER}.self_attn.k_proj.weight"]["rounding"] < 5e-4
    assert "lose precision" in ran.stdout


def test_an_infinite_scale_is_refused_by_name_and_row() -> None:
    factors = np.ones(16, "<f4")
    factors[3] = 1e9
    with pytest.raises(NotFinite, match="w, row 3 "):
        _folded(_packed(_blocks("Q4_K", 16, 0), "Q4_K"), factors)


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4", "IQ1_M"])
def test_scales_that_are_no_float16_numbers_say_so(kind: str) -> None:
    nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    data = np.zeros(4 * nbytes, "u1")
    packed = _packed(
        StoredTensor(
            name="w", dtype="U8", shape=(4, nbytes), file=Path("none"), offset=0, nbytes=data.size, data=data
        ),
        kind,
    )
    assert isinstance(packed.on_output, NoScale)
    assert kind in packed.on_output.reason


# The command


def _fields(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {name: (field.types, field.contents()) for name, field in reader.fields.items()}


@pytest.mark.parametrize("case", GGUF_CASES)
def test_merged_file_is_what_was_trained(case: str, adapters: Callable[[Path], Path], tmp_path: Path) -> None:
    base, adapter, out = gguf_file(case), adapters(gguf_file(case)), tmp_path / "out"
    merge(base, adapter, out, "--quantized", "keep")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "ia3_export.json", "model.gguf"]
    assert _fields(out / "model.gguf") == _fields(base)
    before, after = base.read_bytes(), (out / "model.gguf").read_bytes()
    assert len(before) == len(after)
    start = gguf.GGUFReader(base).data_offset
    assert before[:start] == after[:start]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    for tensor in gguf.GGUFReader(out / "model.gguf").tensors:
        same = tensor.data.tobytes() == stored[tensor.name].data.tobytes()
        assert same == (not tensor.name.endswith(("attn_k.weight", "attn_v.weight", "ffn_up.weight"))), (
            tensor.name
        )
    wanted = unmerged_logits(base, adapter)
    error = _relative(logits(dense_model(out / "model.gguf")), wanted)
    assert error <= (1.3e-3 if any(name in case for name in _COARSE) else 3.5e-4)
    assert _relative(logits(dense_model(base)), wanted) > 0.02, "the adapter does nothing"


def test_a_gguf_base_gives_a_gguf_output_by_default(adapters: Callable[[Path], Path], tmp_path: Path) -> None:
    base = gguf_file("gguf-q4_k_m")
    merge(base, adapters(base), tmp_path / "default")
    merge(base, adapters(base), tmp_path / "keep", "--quantized", "keep")
    assert (tmp_path / "default" / "model.gguf").read_bytes() == (
        tmp_path / "keep" / "model.gguf"
    ).read_bytes()
    manifest = json.loads((tmp_path / "default" / "ia3_export.json").read_text())
    assert manifest["quantization"]["how"] == "keep"
    assert {site["outcome"] for site in manifest["quantization"]["sites"]} == {"moved", "rounded"}
    assert manifest["reload"]["library"] == f"gguf {metadata.version('gguf')}"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_file_without_codes_is_merged_too(
    dtype: str, adapters: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = _rewritten(gguf_file("gguf-q8_0"), tmp_path / "base" / "model.gguf", dtype)
    adapter = adapters(base)
    merge(base, adapter, tmp_path / "out", "--quantized", "keep")
    error = _relative(logits(dense_model(tmp_path / "out" / "model.gguf")), unmerged_logits(base, adapter))
    assert error <= {"F32": 1e-6, "F16": 5e-4, "BF16": 4e-3}[dtype]
    assert _fields(tmp_path / "out" / "model.gguf") == _fields(base)


def _with_mxfp4(base: Path, target: Path, *names: str) -> Path:
    """`base` with some matrices in MXFP4, by gguf's writer."""
    source = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in source.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in source.tensors:
        if tensor.name.endswith(names):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            kind = gguf.GGMLQuantizationType.MXFP4
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_what_cannot_be_kept_becomes_dense_in_the_same_file(
    adapters: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = _with_mxfp4(gguf_file("gguf-q8_0"), tmp_path / "mixed.gguf", "attn_v.weight", "ffn_up.weight")
    adapter = adapters(base)
    ran = run(
        "merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "no", "--quantized", "keep"
    )
    only_complaint(ran, 3, "MXFP4")
    merge(base, adapter, tmp_path / "out", "--quantized", "keep-or-dense")
    out = tmp_path / "out" / "mixed.gguf"
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert types["blk.0.attn_v.weight"] == types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "MXFP4"
    assert types["blk.0.attn_k.weight"] == "Q8_0"
    assert _fields(out) == _fields(base)
    assert _relative(logits(dense_model(out)), unmerged_logits(base, adapter)) <= 1e-3


def test_permuted_rows_are_never_written_dense(adapters: Callable[[Path], Path], tmp_path: Path) -> None:
    base = _with_mxfp4(gguf_file("gguf-q8_0"), tmp_path / "mixed.gguf", "attn_k.weight")
    ran = run(
        "merge",
        "--base",
        base,
        "--adapter",
        adapters(base),
        "--output",
        tmp_path / "no",
        "--quantized",
        "keep-or-dense",
    )
    only_complaint(ran, 3, "k_proj", "permuted")
    assert not (tmp_path / "no").exists()


def test_an_architecture_with_biases_and_rows_in_place(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    writer = gguf.GGUFWriter(tmp_path / "qwen.gguf", "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        stored = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = write_adapter(tmp_path / "adapter", config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]})
    merge(tmp_path / "qwen.gguf", adapter, tmp_path / "out", "--quantized", "keep")
    found = logits(dense_model(tmp_path / "out" / "qwen.gguf"))
    assert _relative(found, unmerged_logits(tmp_path / "qwen.gguf", adapter)) <= 3e-4


def test_the_plan_imports_no_framework(adapters: Callable[[Path], Path], tmp_path: Path) -> None:
    base = gguf_file("gguf-q4_k_m")
    commands: list[list[str | Path]] = [
        ["inspect", adapters(base), "--base", base],
        [
            "merge",
            "--base",
            base,
            "--adapter",
            adapters(base),
            "--output",
            tmp_path / "out",
            "--quantized",
            "keep",
            "--dry-run",
        ],
    ]
    for command in commands:
        ran = run_process(*command, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert ran.code == 0, ran.stderr[-2000:]
        loaded = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
        assert "gguf" in loaded
        assert not loaded & {"torch", "transformers"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [("--quantized", "keep", "--shard-size", "1MB"), ("--dtype", "float32")], ids=" ".join
)
def test_options_that_gguf_cannot_take(
    option: tuple[str, ...], adapters: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = gguf_file("gguf-q8_0")
    ran = run("merge", "--base", base, "--adapter", adapters(base), "--output", tmp_path / "out", *option)
    only_complaint(ran, 2, option[-2], "GGUF")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_gguf_files_asks_for_one(adapters: Callable[[Path], Path], tmp_path: Path) -> None:
    shutil.copy(gguf_file("gguf-q8_0"), tmp_path / "a.gguf")
    adapter = adapters(gguf_file("gguf-q8_0"))
    assert run("inspect", adapter, "--base", tmp_path).code == 0
    shutil.copy(gguf_file("gguf-q8_0"), tmp_path / "b.gguf")
    ran = run("inspect", adapter, "--base", tmp_path)
    only_complaint(ran, 3, "2 GGUF files")
    assert str(tmp_path / "a.gguf") in ran.stderr


# llama.cpp itself


def _llama_cpp(path: Path) -> Array:
    script = Path(__file__).resolve().parents[2] / "tools" / "fixtures" / "quantized" / "llama_cpp_check.py"
    done = subprocess.run([LLAMA_CPP, str(script), str(path)], check=True, capture_output=True, text=True)
    found: Array = np.array(json.loads(done.stdout)["logits"])
    return found


@pytest.mark.skipif(
    not LLAMA_CPP, reason="IA3_EXPORT_LLAMA_CPP_PYTHON names no Python that has llama-cpp-python"
)
@pytest.mark.parametrize("case", GGUF_CASES)
def test_llama_cpp_computes_what_was_trained(
    case: str, adapters: Callable[[Path], Path], tmp_path: Path
) -> None:
    """The folded file, and its weights in float32, against a float32 file of the base that is merged by hand.

    llama.cpp rounds activations of coded layers to 8 bits, so the first comparison is as close as the
    unfolded file is to its own weights in float32.
    """
    from safetensors.numpy import load_file

    base, adapter = gguf_file(case), adapters(gguf_file(case))
    vectors = {
        key.removeprefix("base_model.model.").removesuffix(".ia3_l"): value.reshape(-1)
        for key, value in load_file(adapter / "adapter_model.safetensors").items()
    }

    def exact(name: str, weight: Array) -> Array:
        vector = vectors.get(name.removesuffix(".weight"))
        if vector is None:
            return weight
        if name.endswith("down_proj.weight"):
            return np.asarray(weight * vector)
        return np.asarray(weight * (_permuted(vector, 32) if "k_proj" in name else vector)[:, None])

    merge(base, adapter, tmp_path / "out", "--quantized", "keep")
    folded = tmp_path / "out" / "model.gguf"
    wanted = _llama_cpp(_rewritten(base, tmp_path / "exact.gguf", "F32", exact))
    noise = _relative(_llama_cpp(base), _llama_cpp(_rewritten(base, tmp_path / "base32.gguf", "F32")))
    live = _relative(_llama_cpp(folded), wanted)
    weights = _relative(_llama_cpp(_rewritten(folded, tmp_path / "folded32.gguf", "F32")), wanted)
    print(
        f"{case}: folded {live:.1e} (unfolded against itself {noise:.1e}), its weights in float32 "
        f"{weights:.1e}"
    )
    assert weights <= (2e-3 if any(name in case for name in _COARSE) else 5e-4)
    assert live <= 1.5 * noise + 1e-3
