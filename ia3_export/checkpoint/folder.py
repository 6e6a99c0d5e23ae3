"""A base model on disk: index, shards, configuration and side files. Never instantiated, headers only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ia3_export.arguments import check_arguments
from ia3_export.checkpoint.header import Shard, StoredTensor, read_header
from ia3_export.checkpoint.hub import Location, locate
from ia3_export.checkpoint.manifest import Folded, read_folded
from ia3_export.checkpoint.ranges import link_or_copy
from ia3_export.checkpoint.side_files import matches
from ia3_export.checkpoint.wrapped import without_wrappers
from ia3_export.errors import DamagedFile, NotFound, Refused, Unsupported
from ia3_export.fold import FLOAT_DTYPES

ADAPTER_CONFIG = "adapter_config.json"
#: Files that hold the base's weights once more, in another format: folding does not reach them.
_OTHER_WEIGHTS = (
    "model*.safetensors", "consolidated*", "pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack",
    "rust_model.ot", "*.gguf", "*.onnx", "*.onnx_data*", "*.tflite", "*.pth", "model*.safetensors.index.json",
    "pytorch_model*.bin.index.json", "tf_model*.h5.index.json", "flax_model*.msgpack.index.json", "*.ckpt",
    "*.ckpt.*", "model.pt", "pytorch_model*.pt",
)  # fmt: skip
#: PEFT's, AdapterHub's and LLaVA's files of a fine-tune: transformers would apply them to the merged weights
#: once more.
_ADAPTER_FILES = (
    ADAPTER_CONFIG, "adapter_model*", "adapter.safetensors", "pytorch_adapter.bin", "head_config.json",
    "adapter_fusion_config.json", "non_lora_trainables.bin",
)  # fmt: skip
#: What trainers (transformers, accelerate, DeepSpeed, FSDP) leave to go on from; most of it pickled, none of
#: it loaded with a model.
_TRAINING_STATE = (
    "training_args.bin", "trainer_state.json", "optimizer*.pt", "optimizer*.bin", "scheduler*.pt",
    "scheduler*.bin", "scaler*.pt", "scaler*.bin", "sampler*.bin", "dl_state_dict*.bin",
    "custom_checkpoint_*", "*.pkl", "*.pickle", "zero_to_fp32.py",
)  # fmt: skip
_TRAINING_FOLDERS = (
    "checkpoint-[0-9]*",
    "global_step[0-9]*",
    "pytorch_model_fsdp_[0-9]*",
    "optimizer_[0-9]*",
)
_OTHER_WEIGHT_FOLDERS = ("onnx", "openvino", "coreml", "original", "gguf")
_SKIPPED_FOLDERS = (".git", ".cache", "__pycache__")
_DOWNLOAD_IGNORE = ("*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.pth", "original/*")

_LAYOUTS = (  # the order in which transformers looks for weights
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A base model's files: shards, tensors by name, configuration, and what lies beside them.

    `tensors` maps stored names to where their bytes lie, `folded` is what its manifest says they hold.

    Of a base that was saved inside a wrapper `tensors` have the model's own names, and `of_adapter` are those
    left out.
    """

    location: Location
    shards: tuple[Shard, ...]
    tensors: Mapping[str, StoredTensor]
    index_name: str | None
    index: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    folded: tuple[Folded, ...] = ()
    of_adapter: tuple[str, ...] | None = None

    @property
    def folder(self) -> Path:
        """The folder that holds the weights."""
        return self.location.path if self.location.path.is_dir() else self.location.path.parent

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file: `config` then is what its metadata says, and no file of its own."""
        return any(shard.path.suffix == ".gguf" for shard in self.shards)

    @property
    def holds_adapter(self) -> bool:
        """Whether an adapter lies beside the weights.

        transformers would apply it to whatever it loads from there.
        """
        return ADAPTER_CONFIG in self.left_out

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def main_dtype(self) -> str:
        """The floating dtype that most bytes are stored in, ``F32`` when there is none."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in FLOAT_DTYPES:
                sizes[tensor.compute_dtype] += tensor.nbytes
        return sizes.most_common(1)[0][0] if sizes else "F32"


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read the headers of a base: a folder, a single weight file, or a hub id.

    A lone file stands for itself: no configuration or tokenizer is looked for beside it (a GGUF file holds
    both). Raises `NotFound`, `DamagedFile`, `Unsupported`, `Refused`.
    """
    check_arguments(read_checkpoint, locals())
    location = locate(source, ignore=_DOWNLOAD_IGNORE)
    if location.path.is_dir():
        return _read_folder(location)
    if location.path.suffix == ".gguf":
        return _read_gguf(location, location.path, (), ())
    shards, of_adapter = without_wrappers([_read_shard(location.path, location.path.name)])
    folded = read_folded(location.path.parent, location.path.name)
    return Checkpoint(
        location=location,
        shards=shards,
        tensors=_by_name(shards),
        index_name=None,
        index=None,
        config=None,
        side_files=(),
        left_out=(),
        folded=folded,
        of_adapter=of_adapter,
    )


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Names of model classes that a configuration states.

    Raises `DamagedFile` for anything but a list of names.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise DamagedFile(
            f"config.json has architectures that are no list of class names: {str(named)[:60]}",
            hint="fetch the file again; it is a list of one name, such as LlamaForCausalLM",
        )
    return named


def first_class(config: Mapping[str, Any]) -> str | None:
    """The class that a configuration states, the first of several; raises as `architectures`."""
    return next(iter(architectures(config)), None)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `NotFound` and `DamagedFile`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist", hint="the folder is incomplete; fetch it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not readable JSON: {error}", hint="fetch the file again") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} holds no JSON object", hint="fetch the file again")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DamagedFile(
            f"{path} holds text that is not valid Unicode", hint="fetch the file again"
        ) from None
    return value


def _read_folder(location: Location) -> Checkpoint:
    folder = location.path
    layout = next((name for name in _LAYOUTS if (folder / name).is_file()), None)
    if layout is None:
        found = list(folder.glob("*.gguf"))
        if len(found) == 1:
            return _read_gguf(location, found[0], *_side_files(folder, {found[0].name}))
        raise _no_weights(folder)
    index = read_config(folder / layout) if layout.endswith(".index.json") else None
    names = [layout] if index is None else _shard_names(folder / layout, index)
    shards = tuple(_read_shard(folder / name, name) for name in names)
    if index is not None:
        _check_index(folder / layout, index, shards)
    shards, of_adapter = without_wrappers(shards)
    tensors = _by_name(shards)
    config = read_config(folder / "config.json") if (folder / "config.json").exists() else None
    side_files, left_out = _side_files(folder, {layout, *names})
    index_name = layout if index is not None else None
    folded = read_folded(folder)
    return Checkpoint(
        location=location,
        shards=shards,
        tensors=tensors,
        index_name=index_name,
        index=index,
        config=config,
        side_files=side_files,
        left_out=left_out,
        folded=folded,
        of_adapter=of_adapter,
    )


def _read_gguf(
    location: Location, path: Path, side_files: tuple[str, ...], left_out: tuple[str, ...]
) -> Checkpoint:
    from ia3_export.checkpoint.gguf import read_gguf

    shard, config = read_gguf(path)
    folded = read_folded(path.parent, path.name)
    return Checkpoint(
        location=location,
        shards=(shard,),
        tensors=_by_name((shard,)),
        index_name=None,
        index=None,
        config=config,
        side_files=side_files,
        left_out=left_out,
        folded=folded,
    )


def _no_weights(folder: Path) -> NotFound | Unsupported:
    if (folder / ADAPTER_CONFIG).is_file():
        return Unsupported(
            f"{folder} is an adapter, not a base model",
            hint="--base takes the model that the adapter was trained on, --adapter takes this folder",
        )
    if (folder / "model_index.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        return Unsupported(
            f"{folder} is a diffusers pipeline of several models ({', '.join(parts)}), not one base model",
            hint=f"give the one that the adapter was trained on: --base {folder / (parts or ['unet'])[0]}",
        )
    diffusers = sorted(path.name for path in folder.glob("diffusion_pytorch_model*.safetensors"))
    if len(diffusers) == 1:
        return Unsupported(
            f"{folder} is a model of diffusers, whose folder holds none of {', '.join(_LAYOUTS)}",
            hint=f"give the weight file itself: --base {folder / diffusers[0]}",
        )
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return Unsupported(
            f"{folder} holds {len(gguf)} GGUF files, of which one has to be chosen",
            hint=f"give the file itself: --base {folder / gguf[0]}",
        )
    for pattern, kind in (("*.h5", "TensorFlow"), ("*.msgpack", "Flax")):
        if any(folder.glob(pattern)):
            return Unsupported(
                f"{folder} holds {kind} weights only, which this version does not fold",
                hint="give the safetensors or PyTorch checkpoint of the same model",
            )
    return NotFound(
        f"{folder} holds no model weights (looked for {', '.join(_LAYOUTS)})",
        hint="give the folder that save_pretrained() wrote, or the weight file itself",
    )


def _read_shard(path: Path, name: str) -> Shard:
    if path.suffix == ".safetensors":
        return read_header(path, name)
    if path.suffix in (".bin", ".pt", ".pth"):
        from ia3_export.checkpoint.pickled import read_bin

        return read_bin(path, name)
    raise Unsupported(
        f"{path} is neither a safetensors nor a PyTorch nor a GGUF file",
        hint="bases are read as .safetensors, .bin or .gguf",
    )


def _shard_names(index_file: Path, index: Mapping[str, Any]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFile(f"{index_file} has no weight_map", hint="fetch the file again")
    names = []
    for name in weight_map.values():
        if name in names:
            continue
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or ".." in parts or parts[0] == "/" or "\\" in name or ":" in name:
            raise Refused(
                f"{index_file} names the shard {name!r}, which lies outside its folder",
                hint="do not use this checkpoint; tell whoever published it",
            )
        if not (index_file.parent / name).is_file():
            raise NotFound(
                f"{index_file.parent / name} does not exist, but {index_file.name} names it",
                hint="a shard is missing; fetch the folder again",
            )
        names.append(name)
    return sorted(names)


def _by_name(shards: tuple[Shard, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in tensors:
                raise DamagedFile(
                    f"tensor {tensor.name} is both in {tensors[tensor.name].file.name} and in {shard.name}",
                    hint="files of two checkpoints lie in one folder; fetch it into an empty one",
                )
            tensors[tensor.name] = tensor
    return tensors


def _check_index(index_file: Path, index: Mapping[str, Any], shards: tuple[Shard, ...]) -> None:
    held = {shard.name: {tensor.name for tensor in shard.tensors} for shard in shards}
    for name, shard_name in index["weight_map"].items():
        if name not in held[shard_name]:
            raise DamagedFile(
                f"{index_file.name} places tensor {name} in {shard_name}, which does not hold it",
                hint="index and shards are of different checkpoints; fetch the folder again",
            )


def _side_files(folder: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every other file of the folder, as (to copy, left out: unmerged weights, adapters, training states)."""
    adapters = {
        path.parent.relative_to(folder) for path in folder.glob(f"*/{ADAPTER_CONFIG}") if _is_ia3(path)
    }
    copied, left_out = [], []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if relative.parts[0] in _SKIPPED_FOLDERS or not path.is_file() or relative.as_posix() in weights:
            continue
        check_contained(path, folder)
        if _is_left_out(relative) or not adapters.isdisjoint(relative.parents):
            left_out.append(relative.as_posix())
        else:
            copied.append(relative.as_posix())
    return tuple(copied), tuple(left_out)


def check_contained(path: Path, folder: Path) -> None:
    """Raise `Refused` for a link that leads out of `folder`."""
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"  # a hub cache snapshot links into this
    if not target.is_relative_to(root) and not target.is_relative_to(blobs):
        raise Refused(
            f"{path} is a link to {target}, outside its folder", hint="replace the link by the file itself"
        )


def _is_left_out(relative: Path) -> bool:
    if len(relative.parts) == 1:
        patterns = (*_OTHER_WEIGHTS, *_ADAPTER_FILES, *_TRAINING_STATE)
        return matches(relative.name, patterns)
    above = relative.parts[0]
    return above in _OTHER_WEIGHT_FOLDERS or matches(above, _TRAINING_FOLDERS)


def _is_ia3(config_file: Path) -> bool:
    """Whether an adapter in a folder of its own was trained like ours.

    A LoRA there belongs to the model (Phi-4-multimodal).
    """
    try:
        value = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("peft_type", "IA3") == "IA3"


def adapterless(checkpoint: Checkpoint, place: Path) -> Path:
    """The folder of `checkpoint` as transformers must see it: without an adapter.

    The folder itself, or, where an adapter lies in it, links to the rest in `place`.

    transformers looks for ``adapter_config.json`` in every folder that it loads, and has no
    argument against it.
    """
    if not checkpoint.holds_adapter:
        return checkpoint.folder
    links = place / "base"
    links.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.folder.iterdir():
        if path.name != ADAPTER_CONFIG and not (links / path.name).exists():
            _link(path.resolve(), links / path.name)
    return links


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path, target_is_directory=path.is_dir())
    except OSError:  # Windows lets not everyone make symbolic links
        if path.is_file():
            link_or_copy(path, link)
