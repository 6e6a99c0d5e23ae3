"""Tokenizer, generation and processor settings of a merge: the base's, or those that lie beside an adapter.

A fine-tune may bring tokens, another chat template or another end of text, and saves them beside its vectors;
training scripts also put plain copies of the base's files there. What differs in meaning (transformers writes
the same thing in several forms) is taken as a whole set: two tokenizers are never mixed.
"""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint, check_contained
from ia3_export.checkpoint.side_files import matches
from ia3_export.checkpoint.tokenizers import (
    GENERATION,
    PROCESSORS,
    TEMPLATES,
    TOKENIZERS,
    VOCABULARIES,
    Settings,
    Tokenizer,
    read_generation,
    read_processors,
    read_tokenizer,
)
from ia3_export.errors import IA3ExportError, NotFound, Refused, first_line
from ia3_export.words import TokenizerChoice

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Companions:
    """The output's files besides weights and configuration.

    `files` maps names to what they are copied from, `taken` names of an adapter's files to that adapter.
    """

    files: Mapping[str, Path]
    taken: Mapping[str, str]
    warnings: tuple[str, ...]
    problems: tuple[IA3ExportError, ...]


def is_companion(name: str) -> bool:
    """Whether a file is of a kind that an adapter may bring as well."""
    return matches(name, (*TOKENIZERS, *GENERATION, *PROCESSORS))


def choose_companions(
    stored: Checkpoint, adapters: Sequence[Adapter], choice: TokenizerChoice, config: Mapping[str, Any] | None
) -> Companions:
    """Decide whose files the output gets; `config` is its configuration.

    An adapter's token ids must lie in the output's embedding, and several adapters must agree; else the
    base's files stay, with a warning (``auto``) or a refusal (``adapter``).
    """
    made = _Choice(stored, choice, config)
    sides = [side for adapter in adapters if (side := _beside(adapter)) is not None]
    if choice == "auto" and stored.is_gguf:
        made.warnings += [
            (
                f"the tokenizer and chat template beside {side.adapter} are not written into the GGUF "
                "file, which keeps its own"
            )
            for side in sides
            if side.of(TOKENIZERS)
        ]
    if choice == "base" or not stored.location.path.is_dir() or stored.is_gguf:
        if choice == "adapter":
            made.problems.append(
                Refused(
                    f"{stored.location.given} has its tokenizer and settings in no files of their own, so "
                    "none of an adapter take their place",
                    hint="leave --tokenizer adapter out",
                )
            )
        return made.done()
    if choice == "adapter" and not any(side.names for side in sides):
        made.problems.append(
            NotFound(
                "no tokenizer, generation or processor settings lie beside "
                f"{' or '.join(a.name for a in adapters)}",
                hint="leave --tokenizer adapter out, or put those files into the adapter's folder",
            )
        )
        return made.done()
    made.take_tokenizer(sides)
    made.take_generation(sides)
    made.take_processors(sides)
    made.check_ends()
    return made.done()


def other_companions(wanted: Companions, folder: Path) -> Iterator[str]:
    """Kinds of files in which `folder` says something else than a merge writes there."""
    kinds: tuple[tuple[str, Sequence[str], Callable[[Path, Sequence[str]], Any]], ...] = (
        ("tokenizer", TOKENIZERS, read_tokenizer),
        ("generation settings", GENERATION, read_generation),
    )
    for what, patterns, read in kinds:
        names = [name for name in wanted.files if matches(name, patterns)]
        present = [name for name in _names(folder) if matches(name, patterns)]
        if sorted(names) == sorted(present) and all(
            filecmp.cmp(wanted.files[name], folder / name, shallow=False) for name in names
        ):
            continue
        with suppress(OSError, ValueError, RecursionError):
            if names and read(wanted.files[names[0]].parents[names[0].count("/")], names).differences(
                read(folder, present)
            ):
                yield what


def _names(folder: Path) -> list[str]:
    """Files of `folder`, and of the folder in it that tokenizers have."""
    paths = (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*"))
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())


@dataclass(frozen=True, slots=True)
class _Side:
    """What lies beside an adapter: `names` of files in `folder`."""

    adapter: str
    folder: Path
    names: tuple[str, ...]

    def of(self, patterns: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in self.names if matches(name, patterns))


def _beside(adapter: Adapter) -> _Side | None:
    """The files in the adapter's folder, or in the one above where PEFT saved it under its name."""
    if not adapter.location.path.is_dir():
        return None
    above = Path(adapter.location.given).expanduser()
    folders = [adapter.folder]
    if above.is_dir() and above.resolve() == adapter.folder.resolve().parent:
        folders.append(above)
    for folder in folders:
        found = tuple(name for name in _names(folder) if is_companion(name))
        if found:
            for name in found:
                check_contained(folder / name, folder)
            return _Side(adapter.name, folder, found)
    return _Side(adapter.name, adapter.folder, ())


class _Choice:
    """Files and reasons, while they are gathered."""

    def __init__(self, stored: Checkpoint, choice: TokenizerChoice, config: Mapping[str, Any] | None) -> None:
        self.stored, self.choice, self.config = stored, choice, config or {}
        self.rows = _vocabulary_size(self.config)
        self.files = {name: stored.folder / name for name in stored.side_files}
        self.taken: dict[str, str] = {}
        self.warnings: list[str] = []
        self.problems: list[IA3ExportError] = []
        self.tokenizer: Tokenizer | None = None

    def done(self) -> Companions:
        return Companions(self.files, self.taken, tuple(self.warnings), tuple(self.problems))

    def take_tokenizer(self, sides: Sequence[_Side]) -> None:
        """The adapters' tokenizer, or, where they bring nothing else of it, their chat template alone."""
        own = self._own(TOKENIZERS)
        if self._copies(sides, TOKENIZERS):
            return
        ours = self._of_base(own, read_tokenizer) or Tokenizer()
        found: list[tuple[_Side, Tokenizer, list[str], Sequence[str]]] = []
        for side, theirs in self._read(sides, TOKENIZERS, read_tokenizer, "tokenizer"):
            if side.of(VOCABULARIES):
                found.append((side, theirs, ours.differences(theirs), TOKENIZERS))
            elif side.of(TEMPLATES):  # the base's tokens in another form
                found.append((side, theirs, ours.differences(theirs, template_only=True), TEMPLATES))
            elif ours.templates != theirs.templates or ours.special != theirs.special:
                self._keep(
                    f"{', '.join(side.of(TOKENIZERS))} beside {side.adapter} come without a vocabulary"
                )
        if not self._agree([(row[0], row[1], row[2]) for row in found], "tokenizers"):
            return
        side, theirs, differences, patterns = next(row for row in found if row[2] or self.choice == "adapter")
        problem = self._misfit(theirs, ours, side)
        if problem is not None:
            self._keep(problem)
            return
        if patterns is TOKENIZERS:
            self.tokenizer = theirs
        what = "tokenizer" if patterns is TOKENIZERS else "chat template"
        self._take(side, patterns, what, differences if own and patterns is TOKENIZERS else [])

    def take_generation(self, sides: Sequence[_Side]) -> None:
        """Take the generation settings of the adapters where they differ from the base's.

        A base without any has those that its configuration says.
        """
        own = self._own(GENERATION)
        if self._copies(sides, GENERATION):
            return
        ours = self._of_base(own, read_generation) or Settings({})
        found = []
        for side, theirs in self._read(sides, GENERATION, read_generation, "generation settings"):
            stated = ours if own else Settings(self.config).only(theirs.values.keys())
            found.append((side, theirs, stated.differences(theirs)))
        if not self._agree(found, "generation settings"):
            return
        side, theirs, differences = next(row for row in found if row[2] or self.choice == "adapter")
        high = [(k, v) for k, v in theirs.token_ids() if self.rows is not None and v >= self.rows]
        if high:
            what = f"{high[0][0]} {high[0][1]}, and the output's embedding has {self.rows} rows"
            self._keep(f"the generation settings beside {side.adapter} say {what}")
            return
        self._take(side, GENERATION, "generation_config.json", differences)
        self._compare_config(theirs)

    def take_processors(self, sides: Sequence[_Side]) -> None:
        """Take the processor settings of the adapters where they differ from the base's.

        What only one version of transformers writes is no difference.
        """
        own = self._own(PROCESSORS)
        if self._copies(sides, PROCESSORS):
            return
        ours = self._of_base(own, read_processors) or Settings({})
        found = []
        for side, theirs in self._read(sides, PROCESSORS, read_processors, "processor settings"):
            common = ours.values.keys() & theirs.values.keys()
            differences = ours.only(common).differences(theirs.only(common)) if own else sorted(theirs.values)
            found.append((side, theirs, differences))
        if self._agree(found, "processor settings"):
            side, _, differences = next(row for row in found if row[2] or self.choice == "adapter")
            self._take(side, PROCESSORS, "processor configuration", differences if own else [])

    def check_ends(self) -> None:
        """Say where generation would not stop at the end of text that the adapter's tokenizer has."""
        if self.tokenizer is None:
            return
        path = self.files.get("generation_config.json")
        settings = None
        if path is not None:
            with suppress(OSError, ValueError, RecursionError):
                settings = read_generation(path.parent, (path.name,))
        stated = settings.values if settings is not None else self.config
        token = self.tokenizer.special.get("eos_token")
        own = self.tokenizer.id_of(token) if isinstance(token, str) else None
        ends = stated.get("eos_token_id")
        if own is not None and ends is not None and own not in (ends if isinstance(ends, list) else [ends]):
            where = "generation_config.json" if settings is not None else "config.json"
            self.warnings.append(
                f"the adapter's tokenizer ends a text with {token!r} (id {own}), {where} with {ends}: "
                "generation would not stop there"
            )

    def _compare_config(self, generation: Settings) -> None:
        other = [
            f"{key} {self.config[key]} (generation_config.json: {generation.values[key]})"
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if key in self.config and key in generation.values and self.config[key] != generation.values[key]
        ]
        if other:
            self.warnings.append(
                f"config.json still says the base's {', '.join(other)}; generation goes by "
                "generation_config.json"
            )

    def _own(self, patterns: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in self.files if matches(name, patterns))

    def _copies(self, sides: Sequence[_Side], patterns: Sequence[str]) -> bool:
        """Whether nothing has to be read: the adapters bring nothing of a kind, or the base's very bytes."""
        return self.choice == "auto" and all(
            name in self.files and filecmp.cmp(self.files[name], side.folder / name, shallow=False)
            for side in sides
            for name in side.of(patterns)
        )

    def _of_base(self, names: Sequence[str], read: Callable[[Path, Sequence[str]], T]) -> T | None:
        with suppress(OSError, ValueError, RecursionError):
            return read(self.stored.folder, names)
        return None

    def _read(
        self,
        sides: Sequence[_Side],
        patterns: Sequence[str],
        read: Callable[[Path, Sequence[str]], T],
        what: str,
    ) -> Iterator[tuple[_Side, T]]:
        """What `read` makes of the adapters' files of a kind; those that cannot be read are said."""
        for side in sides:
            names = side.of(patterns)
            if not names:
                continue
            try:
                yield side, read(side.folder, names)
            except (OSError, ValueError, RecursionError) as error:
                self._keep(f"the {what} beside {side.adapter} cannot be read ({first_line(error)})")

    def _agree(self, found: Sequence[tuple[_Side, Any, list[str]]], what: str) -> bool:
        """Whether there is something to take, and the adapters that bring it bring the same.

        Says so where they do not.
        """
        if not any(differences or self.choice == "adapter" for _, _, differences in found):
            return False
        if all(not found[0][1].differences(other) for _, other, _ in found[1:]):
            return True
        self._keep(f"{' and '.join(side.adapter for side, _, _ in found)} bring different {what}")
        return False

    def _misfit(self, theirs: Tokenizer, ours: Tokenizer, side: _Side) -> str | None:
        """Why the output cannot have the tokenizer beside an adapter."""
        if theirs.code and not ours.code:
            return f"the tokenizer beside {side.adapter} names code of its own (auto_map)"
        highest = theirs.highest()
        if highest is not None and self.rows is not None and highest[1] >= self.rows:
            return (
                f"the tokenizer beside {side.adapter} has ids up to {highest[1]} ({highest[0]!r}), and the "
                f"output's embedding has {self.rows} rows"
            )
        return None

    def _keep(self, reason: str) -> None:
        if self.choice == "adapter":
            self.problems.append(Refused(reason, hint="--tokenizer base takes the base's"))
        else:
            self.warnings.append(f"{reason}: the base's are kept")

    def _take(self, side: _Side, patterns: Sequence[str], what: str, differences: Sequence[str]) -> None:
        for name in [name for name in self.files if matches(name, patterns)]:
            del self.files[name]
        for name in side.of(patterns):
            self.files[name] = side.folder / name
            self.taken[name] = side.adapter
        if self.choice == "auto":
            of = f", which differs from the base's in {', '.join(differences)}" if differences else ""
            self.warnings.append(
                f"the {what} is that of {side.adapter}{of} (--tokenizer base keeps the base's)"
            )


def _vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the largest embedding that the configuration states."""
    sizes = [part.get("vocab_size") for part in (config, *config.values()) if isinstance(part, dict)]
    return max((size for size in sizes if isinstance(size, int)), default=None)
