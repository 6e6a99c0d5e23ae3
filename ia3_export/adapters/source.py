"""The files of an adapter, before anybody knows what format they have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.adapters.model import Site, second_key
from ia3_export.checkpoint.folder import ADAPTER_CONFIG, read_config
from ia3_export.checkpoint.header import Shard, StoredTensor, read_header, read_values
from ia3_export.checkpoint.hub import Location, locate
from ia3_export.checkpoint.wrapped import PEFT_PREFIX, WRAPPERS
from ia3_export.errors import DamagedFile, NotFound, ShapeMismatch, Unsupported
from ia3_export.fold import FLOAT_DTYPES, Direction

#: What training leaves in an adapter's repository besides the adapter.
_DOWNLOAD_IGNORE = (
    "*.onnx*", "*.gguf", "*.h5", "*.msgpack", "*optimizer*", "*scheduler*", "*rng_state*", "*training_args*",
    "*checkpoint-*/*", "*global_step*/*", "*runs/*", "tf_model*", "model.safetensors", "model-*.safetensors",
    "pytorch_model.bin*", "pytorch_model-*",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: Weight files by name, in the order in which their libraries look for them (PEFT, then
#: AdapterHub's adapters).
_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "adapter.safetensors", "pytorch_adapter.bin")


#: MaTS and AdapterHub's T5AdapterModel hold T5 as ``transformer``, MTTL as ``model``.
_WRAPPED_T5 = re.compile(
    r"^(transformer|model)\.(?=shared\.|lm_head\.|(en|de)coder\.(block|final_layer_norm|embed_tokens)\.)"
)

#: What torch.compile, FSDP and activation checkpoints put before the names of a module that they wrap, with
#: DataParallel's.
_WRAPPER = re.compile(rf"(?<![^.])(module\.)*({WRAPPERS})\.(module\.)*")
_PARALLEL = re.compile(rf"^({re.escape(PEFT_PREFIX)})?(module\.)+")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """An adapter's files.

    `config` is its ``adapter_config.json``, empty where there is none (`config_file` is None then).

    ``location.path`` is the folder, or a file that stands for itself; `name` the folder's name, the
    repository's, or the file's without suffix.
    """

    location: Location
    name: str
    config: Mapping[str, Any]
    config_file: Path | None
    weights: Shard

    @property
    def folder(self) -> Path:
        """The folder that holds the files."""
        return self.weights.path.parent

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that were read."""
        names = (self.config_file, self.weights.path)
        return tuple(path.name for path in names if path is not None)


def open_source(given: str | Path) -> Source:
    """Find an adapter's configuration and weights.

    They lie in its folder, in the one subfolder that holds an adapter, beside or in the weight file given.
    Raises `NotFound`, `DamagedFile`, `Unsupported`.
    """
    location = locate(given, ignore=_DOWNLOAD_IGNORE)
    path = location.path
    folder = _folder(path) if path.is_dir() else path.parent
    config_file = folder / ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else None
    lone = path.is_file() and path.name != ADAPTER_CONFIG
    if lone:
        weights = read_weights(path)
        if path.name not in _NAMES and not _is_part_of(config_file, weights):
            config_file = None  # a checkpoint that happens to lie beside another adapter's configuration
    else:
        weights = read_weights(_weights(folder, config_file))
    config = read_config(config_file) if config_file is not None else {}
    if location.hub_id and folder == path:
        name = location.hub_id.rpartition("/")[2]
    else:
        name = folder.resolve().name if config_file is not None or not lone else path.stem
    return Source(
        Location(
            location.given, folder if config_file or not lone else path, location.hub_id, location.revision
        ),
        name,
        config,
        config_file,
        weights,
    )


def unwrapped(name: str) -> str:
    """A name of T5 without the prefix of a class around the whole model, which transformers' own has not."""
    return _WRAPPED_T5.sub("", name)


def unwrapped_key(key: str) -> str:
    """A key without the names of wrappers of training, which the module has not."""
    plain = _WRAPPER.sub("", key)
    while (found := _PARALLEL.match(plain)) is not None:
        plain = (found[1] or "") + plain[found.end() :]
    return plain


def read_weights(file: Path) -> Shard:
    """Headers of a safetensors file, or of a torch file.

    The latter needs torch, but executes none of its pickled code.
    """
    if file.suffix in _PICKLES:
        from ia3_export.checkpoint.pickled import read_bin

        return read_bin(file)
    return read_header(file)


def make_site(module: str, direction: Direction, tensor: StoredTensor, factor: float = 1.0) -> Site:
    """The vector in `tensor`, of any shape with one extent above 1, times `factor`.

    A shape of four or five dimensions says that the module is a convolution, one of two that it is Linear or
    Conv1D. Raises `Unsupported` and `ShapeMismatch`.
    """
    where = f"{tensor.file}: {tensor.name}"
    if tensor.dtype not in FLOAT_DTYPES:
        raise Unsupported(
            f"{where} has dtype {tensor.dtype}", hint="IA3 vectors are float64, float32, float16 or bfloat16"
        )
    if sum(extent != 1 for extent in tensor.shape) > 1 or not tensor.size:
        raise ShapeMismatch(
            f"{where} has shape {list(tensor.shape)}, which is no vector",
            hint="(IA)3 learns one number a channel; this is another method, or the wrong tensor",
        )
    values = read_values(tensor).reshape(-1)
    dtype = tensor.dtype
    if factor != 1.0:
        values, dtype = (values * values.dtype.type(factor)), "F64" if values.dtype == np.float64 else "F32"
    shape = tensor.shape
    if len(shape) == 2:
        shape = (len(values), 1) if direction == "out" else (1, len(values))
    elif len(shape) in (4, 5):
        shape = (1, len(values), *(1,) * (len(shape) - 2))
    else:
        shape = (len(values),)
    return Site(module, direction, values, shape, dtype)


def add_site(sites: dict[str, Site], site: Site, tensor: StoredTensor) -> None:
    """Put `site`, read from `tensor`, among `sites`.

    Raises `DamagedFile` for a second vector on one side of a module.
    """
    before = sites.get(site.module)
    key = site.module if before is None else second_key(site.module, site.direction)
    if not site.module or key in sites or (before is not None and before.direction == site.direction):
        raise DamagedFile(
            f"{tensor.file}: {tensor.name} and another key are both the {site.direction}put vector of "
            f"{site.module or 'no module at all'}",
            hint="a file holds one adapter; with --map, put the part of the key that is the module path "
            "into a group",
        )
    sites[key] = site


def over_fused(site: Site, parts: Sequence[str], factor: float = 1.0) -> Site:
    """The vector of some `parts` (of q, k and v, in this order) over the projection that computes all three.

    The parts without a vector are multiplied by `factor`. Raises `DamagedFile` when the vector does not
    divide into its parts.
    """
    if not parts or len(site.vector) % len(parts):
        raise DamagedFile(
            f"the vector of {site.module} has {len(site.vector)} elements for {len(parts)} of queries, "
            "keys and values",
            hint="the configuration is not the one of these weights, or the file is incomplete",
        )
    own = dict(zip(parts, np.split(site.vector, len(parts)), strict=True))
    untouched = np.full(len(site.vector) // len(parts), factor, site.vector.dtype)
    vector = np.concatenate([own.get(part, untouched) for part in "qkv"])
    return replace(site, vector=vector, shape=(len(vector), 1))


def _folder(path: Path) -> Path:
    path = path.resolve() if path.name in ("", ".", "..") else path
    if (path / ADAPTER_CONFIG).is_file():
        return path
    named = sorted(file.parent for file in path.glob(f"*/{ADAPTER_CONFIG}"))
    if len(named) > 1:
        raise NotFound(
            f"{path} holds several adapters: {', '.join(folder.name for folder in named)}",
            hint=f"name one of them, for example --adapter {named[0]}",
        )
    return named[0] if named else path


def _is_part_of(config_file: Path | None, weights: Shard) -> bool:
    """Whether `weights`, of an unusual name, are those that `config_file` is about.

    No usual ones are there, and the keys fit.
    """
    if config_file is None or any((config_file.parent / name).is_file() for name in _NAMES):
        return False
    return any("ia3_l" in tensor.name or ".loras." in tensor.name for tensor in weights.tensors)


def _weights(folder: Path, config_file: Path | None) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    if config_file is not None:
        raise NotFound(
            f"{folder} holds none of {', '.join(_NAMES)}",
            hint="the adapter was saved incompletely; save it again with save_pretrained()",
        )
    found = [f for f in sorted(folder.iterdir()) if f.suffix in (*_PICKLES, ".safetensors") and f.is_file()]
    if len(found) == 1:
        return found[0]
    raise NotFound(
        f"{folder} holds no {ADAPTER_CONFIG}, and "
        + (f"several weight files: {', '.join(f.name for f in found)}" if found else "no weight file"),
        hint="give the folder that PeftModel.save_pretrained() wrote, or the weight file itself",
    )
