"""What model classes answered before, kept in the user's cache directory.

Asking a class imports torch and transformers, which takes five seconds, for an answer that depends on
``config.json``, names and shapes alone. It is kept as JSON under ``$IA3_EXPORT_CACHE``, else
``$XDG_CACHE_HOME/ia3-export``, else ``~/.cache/ia3-export``, by the digest of the question, the releases of
the libraries and our own code. A cache that cannot be read or written is no error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import architectures
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.drawing.files import write_whole
from ia3_export.errors import OutputError
from ia3_export.models.conversions import Renaming
from ia3_export.models.model_class import (
    RuntimeModel,
    build_on_meta,
    load_runtime_model,
    make_config,
    quiet,
)

#: Answers that are kept, of some ten to a hundred kilobytes each; the oldest go first.
_KEPT = 100

#: What reading an answer may raise: there is no file, or one that is damaged.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)

Answer = TypeVar("Answer")

_SETS = ("needed", "parameters", "modules", "embeddings")


def runtime_model(
    config: Mapping[str, Any], adapter: Adapter, tensors: Mapping[str, StoredTensor]
) -> RuntimeModel:
    """`load_runtime_model`, of whose answer only the loading rules are built anew, when they are asked for.

    Raises what that raises.
    """
    facts = {
        "config": config,
        "adapter": [
            adapter.format,
            adapter.config,
            adapter.labels,
            adapter.copied,
            sorted(adapter.modules),
            {name: tensor.shape for name, tensor in adapter.extras.items()},
            dict(adapter.rules.earlier),
        ],
        "tensors": {name: [tensor.dtype, tensor.shape] for name, tensor in tensors.items()},
    }
    return remembered(
        "runtime model",
        facts,
        lambda: load_runtime_model(config, adapter, tensors),
        write=_as_json,
        read=_from_json,
    )


def same_but_untied(config: Mapping[str, Any], edited: Mapping[str, Any]) -> bool:
    """Whether transformers reads `edited` as `config` with nothing but ``tie_word_embeddings`` changed.

    T5 does not: there the flag also decides whether the decoder's output is scaled.
    """

    def ask() -> bool:
        with quiet():
            before, after = make_config(config).to_dict(), make_config(edited).to_dict()
        return bool(_without_ties(before) == _without_ties(after))

    return remembered("untied", [config, edited], ask)


def _without_ties(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_ties(v) for k, v in value.items() if k != "tie_word_embeddings"}
    return value


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the class that ``architectures`` names; ``{}`` where there is none."""
    return remembered("shapes", config, lambda: _shapes(config), read=_tuples)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    import transformers

    with quiet():
        for name in architectures(config):
            if isinstance(getattr(transformers, str(name), None), type):
                model = build_on_meta(name, config)
                return {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return {}


def _as_json(runtime: RuntimeModel) -> dict[str, Any]:
    fields = {name: getattr(runtime, name) for name in RuntimeModel.__dataclass_fields__ if name != "built"}
    sets = {name: sorted(fields[name]) for name in _SETS}
    return {**fields, **sets, "renaming": asdict(runtime.renaming)}


def _from_json(kept: Mapping[str, Any]) -> RuntimeModel:
    made = {
        **{name: frozenset(kept[name]) for name in _SETS},
        **{name: _tuples(kept[name]) for name in ("shapes", "converted")},
        "renaming": Renaming(**kept["renaming"]),
    }
    return RuntimeModel(**{**kept, **made})


def _tuples(kept: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(value) for name, value in kept.items()}


def remembered(
    question: str,
    facts: Any,
    ask: Callable[[], Answer],
    *,
    write: Callable[[Answer], Any] = lambda answer: answer,
    read: Callable[[Any], Answer] = lambda kept: kept,
) -> Answer:
    """The kept answer to `question` about `facts`, or that of `ask`, which is then kept.

    `write` makes JSON of an answer and `read` an answer of that. What `ask` raises is raised, and not kept.
    """
    file = _file(question, facts)
    if file is None:
        return ask()
    with suppress(*_UNREADABLE):
        kept = json.loads(file.read_bytes())
        answer = read(kept["answer"])
        with suppress(OSError):  # of a folder that may only be read
            os.utime(file)
        return answer
    answer = ask()
    with suppress(OSError, ValueError, OutputError):
        _keep(file, {"question": question, "answer": write(answer)})
    return answer


def _file(question: str, facts: Any) -> Path | None:
    """Where the answer is kept; None where it should not be: with libraries that change without a release."""
    releases = {name: _release(name) for name in ("ia3-export", "torch", "transformers")}
    if any(release is None or "dev" in release for release in releases.values()):
        return None
    folder = _folder()
    if folder is None:
        return None
    asked = json.dumps([question, releases, _own_code(), facts], sort_keys=True)
    return folder / "classes" / f"{sha256(asked.encode()).hexdigest()}.json"


def _folder() -> Path | None:
    """The cache; None for a user without a home."""
    named, home = os.environ.get("IA3_EXPORT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named or home:
        return Path(named) if named else Path(home or "") / "ia3-export"
    try:
        return Path.home() / ".cache" / "ia3-export"
    except RuntimeError:
        return None


@cache
def _own_code() -> str:
    """Digest of this package's modules: an answer is one of theirs."""
    files = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return sha256(b"".join(sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _release(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _keep(file: Path, kept: Any) -> None:
    write_whole(file, json.dumps(kept).encode())
    others = sorted(file.parent.glob("*.json"), key=lambda other: other.stat().st_mtime)
    for other in others[:-_KEPT]:
        other.unlink()
