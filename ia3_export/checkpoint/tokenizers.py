"""What files of tokenizers, generation and processors say, in whichever form transformers wrote it.

Only JSON and text are read; sentencepiece's own files are compared byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.ranges import hash_file
from ia3_export.checkpoint.side_files import mapping, matches

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*")
#: Files that hold a vocabulary: without one the others are no tokenizer.
VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "vocab.bpe", "*.model", "*.spm", "*.tiktoken", "tekken.json",
)  # fmt: skip
TOKENIZERS = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "normalizer.json", *TEMPLATES,
)  # fmt: skip
GENERATION = ("generation_config.json",)
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_LARGEST = 512 << 20
_SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens",
)  # fmt: skip
#: Keys that say who wrote the file, or name the class that reads it.
_BOOKKEEPING = (
    "transformers_version", "_from_model_config", "image_processor_type", "feature_extractor_type",
    "processor_class", "video_processor_type", "_processor_class", "auto_map", "return_unused_kwargs",
    "use_cache", "output_attentions", "output_hidden_states",  # of the training run
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer by all that tells two apart: tokens, merges, special tokens, chat templates.

    `ids` of the vocabulary (None where its form is not read), `added` tokens, `merges`, digests
    of `binary` vocabularies, `special` tokens by role, chat `templates` by name; `code`: whether
    it names code of its own.
    """

    ids: Mapping[str, int] | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    merges: tuple[tuple[str, ...], ...] | None = None
    binary: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    code: bool = False

    def differences(self, other: Tokenizer, *, template_only: bool = False) -> list[str]:
        """In what `other` is another tokenizer, in words."""
        found = ["chat template"] if self.templates != other.templates else []
        if template_only:
            return found
        if self.special != other.special:
            found.insert(0, "special tokens")
        if self.ids is None or other.ids is None:
            alike = self.binary.items() & other.binary.items()
            changed = (
                [] if alike and self.added == other.added else ["added tokens"] if alike else ["vocabulary"]
            )
        elif {**self.ids, **self.added} == {**other.ids, **other.added}:
            same = self.merges is None or other.merges is None or self.merges == other.merges
            changed = [] if same else ["merges"]
        else:
            changed = ["added tokens"] if self.ids == other.ids else ["vocabulary"]
        return [*changed, *found]

    def id_of(self, token: str) -> int | None:
        """The id of a token, where it is known."""
        return self.added.get(token, (self.ids or {}).get(token))

    def highest(self) -> tuple[str, int] | None:
        """The token with the highest id."""
        return max({**(self.ids or {}), **self.added}.items(), key=lambda row: row[1], default=None)


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings by name, nested ones under their last name, without what says who wrote them."""

    values: Mapping[str, Any]

    def differences(self, other: Settings) -> list[str]:
        """Names of settings that `other` has otherwise, or alone, or not."""
        names = self.values.keys() | other.values.keys()
        return sorted(name for name in names if self.values.get(name) != other.values.get(name))

    def only(self, names: Collection[str]) -> Settings:
        """These settings alone."""
        return Settings({name: value for name, value in self.values.items() if name in names})

    def token_ids(self) -> Iterator[tuple[str, int]]:
        """Ids of tokens that the settings name."""
        for key, value in self.values.items():
            if key.endswith(("_token_id", "_token_ids")):
                yield from (
                    (key, entry)
                    for entry in (value if isinstance(value, list) else [value])
                    if isinstance(entry, int)
                )


def read_tokenizer(folder: Path, names: Sequence[str]) -> Tokenizer:
    """The tokenizer in the files `names` of `folder`. Raises `OSError` and `ValueError`."""
    read = {
        name: _read_object(folder / name) for name in names if name.endswith(".json") and name != "vocab.json"
    }
    whole, config = read.get("tokenizer.json", {}), read.get("tokenizer_config.json", {})
    model = mapping(whole.get("model"))
    ids = _vocabulary(model.get("vocab"))
    if ids is None and "vocab.json" in names:
        ids = _vocabulary(_read_object(folder / "vocab.json"))
    if ids is None and "vocab.txt" in names:
        ids = {line: i for i, line in enumerate(_read_text(folder / "vocab.txt").splitlines())}
    added = {key: value for key, value in read.get("added_tokens.json", {}).items() if isinstance(value, int)}
    rows = whole.get("added_tokens")
    entries = [
        (row.get("content"), row.get("id")) for row in map(mapping, rows if isinstance(rows, list) else [])
    ]
    decoder = mapping(config.get("added_tokens_decoder"))
    entries += [(mapping(row).get("content"), int(key)) for key, row in decoder.items() if key.isdecimal()]
    added |= {text: number for text, number in entries if isinstance(text, str) and isinstance(number, int)}
    merges = model.get("merges")
    return Tokenizer(
        ids=ids,
        added=added,
        merges=tuple(map(_pair, merges)) if isinstance(merges, list) else None,
        binary={name: hash_file(folder / name) for name in names if _is_binary(name)},
        special=_special({**read.get("special_tokens_map.json", {}), **config}),
        templates=_templates(folder, names, config, read.get("chat_template.json", {})),
        code="auto_map" in config,
    )


def read_generation(folder: Path, names: Sequence[str]) -> Settings:
    """The settings in ``generation_config.json``. Raises `OSError` and `ValueError`."""
    return Settings({key: value for name in names for key, value in _flat(_read_object(folder / name))})


def read_processors(folder: Path, names: Sequence[str]) -> Settings:
    """The settings of image, video and audio processors, of all their files.

    Raises `OSError` and `ValueError`.
    """
    return Settings(
        {key: value for name in sorted(names) for key, value in _flat(_read_object(folder / name))}
    )


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key.endswith(("_processor", "feature_extractor")) and isinstance(value, dict):
            yield from _flat(value)
        elif key not in _BOOKKEEPING and value is not None:
            yield key, value


def _special(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {role: _content(config.get(role)) for role in _SPECIAL[:-1]}
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    listed = list(more.values()) if isinstance(more, dict) else more
    extra = frozenset(filter(None, map(_content, listed if isinstance(listed, list) else [])))
    return {role: token for role, token in found.items() if token} | ({_SPECIAL[-1]: extra} if extra else {})


def _templates(
    folder: Path, names: Sequence[str], config: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, str]:
    """Chat templates by name, wherever they are; a file of its own comes before the configuration's."""
    found: dict[str, str] = {}
    for stated in (config.get("chat_template"), other.get("chat_template")):
        if isinstance(stated, str):
            found["default"] = stated
        for row in map(mapping, stated if isinstance(stated, list) else []):
            found[str(row.get("name"))] = str(row.get("template"))
    for name in names:
        if name == TEMPLATES[0]:
            found["default"] = _read_text(folder / name)
        elif name.startswith("additional_chat_templates/"):
            found[Path(name).stem] = _read_text(folder / name)
    return found


def _vocabulary(value: object) -> dict[str, int] | None:
    if isinstance(value, list):  # unigram: pairs of token and score
        return {str(row[0]): i for i, row in enumerate(value) if isinstance(row, list) and row}
    if isinstance(value, dict):
        return {token: number for token, number in value.items() if isinstance(number, int)}
    return None


def _pair(merge: object) -> tuple[str, ...]:
    return tuple(map(str, merge)) if isinstance(merge, list) else tuple(str(merge).split(" ", 1))


def _content(token: object) -> str | None:
    text = mapping(token).get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_binary(name: str) -> bool:
    return matches(name, ("*.model", "*.spm", "*.tiktoken", "tekken.json"))


def _read_text(path: Path) -> str:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} is larger than any such file")
    return path.read_text(encoding="utf-8")


def _read_object(path: Path) -> Mapping[str, Any]:
    value = json.loads(_read_text(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
