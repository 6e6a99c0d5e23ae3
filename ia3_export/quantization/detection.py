"""Which weights of a checkpoint are quantized, and how: decided by its tensors, checked against its
configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile, IA3ExportError, Unsupported, kind_and_line
from ia3_export.fold import FLOAT_DTYPES, Array
from ia3_export.models.modules import CONV1D_MODEL_TYPES, model_types
from ia3_export.quantization import (
    bitsandbytes,
    compressed_tensors,
    eight_bits,
    gguf,
    gptq_awq,
    hqq,
    mxfp4,
    quanto,
)
from ia3_export.quantization.activations import cache_tensors
from ia3_export.quantization.config import check_expressions, read_settings
from ia3_export.quantization.packed import READER_ERRORS, Packed
from ia3_export.words import STORED_NAMES, torch_name

Finder = Callable[[Mapping[str, StoredTensor], Mapping[str, Any]], Iterator[Packed]]

#: All formats at one look.
FORMATS: Mapping[str, Finder] = {
    "bitsandbytes": bitsandbytes.find,
    "GPTQ, AWQ": gptq_awq.find,
    "packed integers, NVFP4, MXFP4": compressed_tensors.find,
    "int8, FP8, MXFP8": eight_bits.find,
    "torchao": eight_bits.find_torchao,
    "quanto": quanto.find,
    "HQQ": hqq.find,
    "MXFP4 experts": mxfp4.find,
    "GGUF": gguf.find,
}

#: Methods that are known and not read, with what to do.
_UNREADABLE = {
    "aqlm": "AQLM keeps codebooks", "vptq": "VPTQ keeps codebooks", "spqr": "SpQR keeps outliers apart",
    "eetq": "EETQ interleaves its codes for one kind of GPU",
    "higgs": "HIGGS mixes its inputs by a Hadamard transform", "bitnet": "BitNet keeps ternary codes",
    "fp_quant": "FP-Quant mixes its inputs by a Hadamard transform", "quark": "Quark has formats of its own",
    "vq": "its codes are vectors", "sinq": "SINQ has two scales", "exl2": "EXL2 mixes widths by column",
    "exl3": "EXL3 keeps trellis codes", "qqq": "QQQ permutes its codes",
}  # fmt: skip

#: Names that only quantizers give; one of them left over means a format that is not understood.
_COMPANIONS = (
    ".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".quant_map", ".weight_packed", ".weight_scale",
    ".weight_scale_inv", ".weight_zero_point", ".weight_global_scale", ".codebooks", ".codes", ".W_q",
    "_blocks", ".weight_scales", ".pre_quant_scale", "._weight_qdata", ".weight._data", ".weight._scale",
    ".trellis",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Quantization:
    """The quantized weights of a checkpoint by dense name; ``{}`` of a dense one.

    `settings` is what the configuration says, `compute_dtype` the dtype that the checkpoint computes in.
    """

    packed: Mapping[str, Packed]
    settings: Mapping[str, Any]
    compute_dtype: str
    problems: tuple[IA3ExportError, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def formats(self) -> dict[str, int]:
        """How many weights there are of each format."""
        counted: dict[str, int] = {}
        for packed in self.packed.values():
            counted[packed.format] = counted.get(packed.format, 0) + 1
        return counted

    @property
    def owners(self) -> dict[str, str]:
        """Every stored tensor that belongs to a quantized weight → that weight's dense name."""
        return {part: name for name, packed in self.packed.items() for part in packed.parts}


def find_quantization(checkpoint: Checkpoint) -> Quantization:
    """Find the quantized weights of `checkpoint`.

    Reads headers, and of the data what names and shapes leave open. What cannot be read is in the result's
    `problems`. Raises `DamagedFile` for unreadable configuration files.
    """
    settings = read_settings(checkpoint)
    packed: dict[str, Packed] = {}
    problems: list[IA3ExportError] = []
    conv1d = bool(model_types(checkpoint.config) & CONV1D_MODEL_TYPES)
    method = str(settings.get("quant_method", "")).lower()
    reason = _UNREADABLE.get(method) or _unreadable_settings(settings)
    if reason:
        problems.append(
            Unsupported(
                f"the base {checkpoint.location.given} is quantized by {method}: {reason}",
                hint="give the unquantized checkpoint, or one in a format of docs/formats.md",
            )
        )
        return Quantization({}, settings, _compute_dtype(checkpoint), tuple(problems))
    try:
        check_expressions(
            f"the quantization settings of {checkpoint.location.given}",
            settings,
            {name.rpartition(".")[0] for name in checkpoint.tensors},
        )
    except DamagedFile as error:
        return Quantization({}, settings, _compute_dtype(checkpoint), (error,))
    for find in FORMATS.values():
        try:
            for found in find(checkpoint.tensors, settings):
                if found.name in packed:
                    raise DamagedFile(
                        f"{found.name} is stored twice, as {packed[found.name].format} and as {found.format}",
                        hint="files of two checkpoints lie in one folder; fetch it into an empty one",
                    )
                packed[found.name] = _transposed(found) if conv1d and len(found.shape) == 2 else found
        except IA3ExportError as error:
            problems.append(error)
        except READER_ERRORS as error:
            problems.append(
                DamagedFile(
                    f"the quantized weights of {checkpoint.location.given} cannot be read: "
                    f"{kind_and_line(error)}",
                    hint="tensors or quantization_config are damaged; fetch the files again",
                )
            )
    packed = dict(gptq_awq.scale_activations(packed, checkpoint.tensors))
    result = Quantization(packed, settings, _compute_dtype(checkpoint))
    if not problems:
        problems += _left_over(checkpoint, result)
    if not problems and method and not packed:
        problems.append(
            Unsupported(
                f"the base {checkpoint.location.given} says that it is quantized by {method}, but every "
                "weight in it is dense",
                hint="config.json belongs to another checkpoint; if the weights are right, remove "
                "quantization_config from it",
            )
        )
    return replace(result, problems=tuple(problems), warnings=tuple(_compare(result)))


def dense_view(checkpoint: Checkpoint, quantization: Quantization) -> Checkpoint:
    """`checkpoint` with every quantized weight as the dense tensor that it stands for, by its dense name."""
    hidden = quantization.owners.keys() | (cache_tensors(checkpoint) if quantization.packed else set())
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in hidden}
    tensors |= {
        name: packed.dense(quantization.compute_dtype) for name, packed in quantization.packed.items()
    }
    return replace(checkpoint, tensors=tensors)


def _unreadable_settings(settings: Mapping[str, Any]) -> str:
    transforms = settings.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        return "its transform_config mixes weights and activations by rotations"
    if "sparse-24" in str(settings.get("sparsity_config")):
        return "its weights are also pruned in the sparse-24 format"
    return ""


def _compute_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that the checkpoint computes in: as configured, else that of most of its dense tensors."""
    config = checkpoint.config or {}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            name = torch_name(part.get(key, ""))
            if name in STORED_NAMES:
                return STORED_NAMES[name]
    return checkpoint.main_dtype


def _left_over(checkpoint: Checkpoint, result: Quantization) -> Iterator[IA3ExportError]:
    """Codes that nothing above understood are an error: never are they taken for dense weights."""
    owners = result.owners
    for name, tensor in checkpoint.tensors.items():
        if name in owners:
            continue
        coded = tensor.dtype not in FLOAT_DTYPES and (
            name.endswith(".weight") or tensor.dtype.startswith(("F8", "F4", "F6"))
        )
        if coded or name.endswith(_COMPANIONS):
            yield Unsupported(
                f"{name} in {tensor.file.name} is {tensor.dtype} {list(tensor.shape)}: quantized in a way "
                "that this version does not read",
                hint="give the unquantized checkpoint, or one in a format of docs/formats.md",
            )
            return


def _compare(result: Quantization) -> Iterator[str]:
    method = result.settings.get("quant_method")
    found = {packed.method for packed in result.packed.values()}
    if method is None and found:
        yield f"the tensors are quantized ({', '.join(sorted(result.formats))}), but no configuration says so"
    for what in result.settings.get("not_in_forward") or ():
        yield (
            f"{what} is not part of the forwards of verify and onnx, which have the rotary "
            "embedding without it"
        )
    mislabelled = [packed.format for packed in result.packed.values() if packed.mislabelled]
    if mislabelled:
        yield f"{len(mislabelled)} weights are {mislabelled[0]}: decided by their zero points"


def _transposed(packed: Packed) -> Packed:
    """A Conv1D: stored as (out, in) by its quantizer, while the dense file has (in, out)."""
    out, columns = packed.shape

    def rows(first: int, count: int) -> Array:
        del first, count  # always the whole weight, see `unit`
        return np.ascontiguousarray(packed.rows(0, out).T)

    return replace(packed, shape=(columns, out), rows=rows, unit=columns, conv1d=True)
