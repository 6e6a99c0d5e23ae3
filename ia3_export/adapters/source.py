"""The files of an adapter, before anybody knows what format they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.folder import ADAPTER_CONFIG, read_config
from ia3_export.checkpoint.header import Shard, read_header
from ia3_export.checkpoint.hub import Location, locate
from ia3_export.errors import NotFound

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


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """An adapter's files as found: its configuration, its weights, and what it is called.

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


def read_weights(file: Path) -> Shard:
    """Headers of a safetensors file, or of a torch file.

    The latter may need torch; none of its pickled code is executed.
    """
    if file.suffix in _PICKLES:
        from ia3_export.checkpoint.pickled import read_bin

        return read_bin(file)
    return read_header(file)


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
