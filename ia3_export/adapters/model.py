"""What every adapter reader returns: plain data, no file format left in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.checkpoint.hub import Location
from ia3_export.expressions import Matcher, Way, check_expression
from ia3_export.fold import Array, Direction
from ia3_export.ordering import enclosing

Pattern = str | frozenset[str] | tuple[str, ...] | None

#: What PEFT trains a copy of for a task, whether ``modules_to_save`` names it or not
#: (``PeftModelForSequenceClassification`` and its like).
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One learned vector: `vector` is 1-D and exact (float32 or float64), `dtype` as stored.

    `shape` is (n, 1) on an output and (1, n) on an input of Linear and Conv1D, (1, n, 1, 1[, 1]) for
    convolutions, as PEFT stores it, or (n,) where the format does not say what the module is.
    """

    module: str
    direction: Direction
    vector: Array
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_conv(self) -> bool:
        """PEFT stores vectors of convolutions with as many dimensions as the weight, of Linear with two."""
        return len(self.shape) > 2


@dataclass(frozen=True, slots=True)
class Fold:
    """A vector folded into a tensor: whose, of which module, and on which side.

    `adapter` is ``0.7 a + 0.3 b`` where several are combined. Without a `direction` it stands for the vectors
    of all experts in the fused parameter `module`.
    """

    adapter: str
    module: str
    direction: Direction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRules:
    """Which modules an adapter covers, matched as PEFT matches them (``check_target_module_exists``).

    A list entry matches a path equal to it or ending in ``.entry``; a string is a regular expression for
    the whole path, and so is each entry of ``to_save``, for a path or its part after a dot. ``feedforward``
    is different in PEFT: a list entry matches any path that *ends* in it, without the dot. `earlier` are the
    names that modules had when the rules were written, where they have others now.
    """

    target: Pattern
    feedforward: Pattern
    exclude: Pattern = None
    to_save: tuple[str, ...] = ()
    earlier: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    matcher: Matcher = field(default_factory=Matcher, repr=False, compare=False)

    def look_at(self, modules: Collection[str]) -> None:
        """Match many `modules` at once, for those that are asked for next.

        This and the questions below raise `DamagedFile` for an expression that takes too long.
        """
        questions: list[tuple[Way, str]] = [
            ("fullmatch", pattern)
            for pattern in (self.target, self.feedforward, self.exclude)
            if isinstance(pattern, str)
        ]
        questions += [("match", inside(name)) for name in self.to_save]
        self.matcher.look_at(questions, {self.earlier.get(module, module) for module in modules})

    @property
    def is_all_linear(self) -> bool:
        """Whether the target is PEFT's keyword for every Linear and Conv1D but the output layer."""
        return isinstance(self.target, str) and self.target.lower() == "all-linear"

    def targets(self, module: str) -> bool:
        """Whether PEFT would wrap `module`, if it is of a kind that can be wrapped."""
        module = self.earlier.get(module, module)
        if self._matches(self.exclude, module) or self._saves(module):
            return False
        return self.is_all_linear or self._matches(self.target, module)

    def saves(self, module: str) -> bool:
        """Whether `module` is, or lies in, one of ``modules_to_save``."""
        return self._saves(self.earlier.get(module, module))

    def _saves(self, module: str) -> bool:
        return any(self.matcher.matches("match", inside(name), module) for name in self.to_save)

    def is_feedforward(self, module: str) -> bool:
        """Whether PEFT puts the vector on the input of `module`."""
        module = self.earlier.get(module, module)
        if isinstance(self.feedforward, str):
            return self.matcher.matches("fullmatch", self.feedforward, module)
        return module.endswith(tuple(self.feedforward or ()))

    def _matches(self, pattern: Pattern, module: str) -> bool:
        if isinstance(pattern, str):
            return self.matcher.matches("fullmatch", pattern, module)
        ends = [module, *(module[i + 1 :] for i, letter in enumerate(module) if letter == ".")]
        return any(end in (pattern or ()) for end in ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An IA3 adapter: its vectors by module path, and the tensors it brings besides (heads, embeddings).

    Module paths and the names of `extras` are those of the model that was trained, without PEFT's prefix.
    PEFT has one vector a module; where a format has two, `sites` holds the second under `second_key`. `files`
    lie in `folder`. `labels` are the names of a classification head's labels, where the format keeps them,
    `unplaced` names extras that no class of transformers has (`unplaced_reason` says why), and `warnings` is
    what its reader noticed. With `vectors_only` its extras were left out on purpose.
    """

    name: str
    format: str
    location: Location
    files: tuple[str, ...]
    sites: Mapping[str, Site]
    extras: Mapping[str, StoredTensor]
    rules: TargetRules
    config: Mapping[str, Any]
    labels: tuple[str, ...] = ()
    unplaced: frozenset[str] = frozenset()
    unplaced_reason: str | None = None
    warnings: tuple[str, ...] = ()
    vectors_only: bool = False

    @property
    def task_type(self) -> str | None:
        """PEFT's task type, ``SEQ_CLS``, ``CAUSAL_LM``, ..., or None."""
        return self.config.get("task_type")

    @property
    def class_name(self) -> str | None:
        """The transformers class that it was trained as, if it says so (``auto_mapping``)."""
        mapping = self.config.get("auto_mapping")
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return name if isinstance(name, str) else None

    @property
    def copied(self) -> tuple[str, ...]:
        """Ends of the paths of modules that PEFT copies: ``modules_to_save``, and the heads of the task."""
        if self.vectors_only:
            return ()
        heads = _TASK_HEADS.get(self.task_type or "", ()) if self.format == "peft" else ()
        return tuple(name for name in dict.fromkeys((*self.rules.to_save, *heads)) if name)

    def copy_of(self, path: str) -> str | None:
        """The outermost module on the way to `path` that PEFT trains a copy of.

        Unlike targets, it need not end in a whole component (``_set_trainable``).
        """
        return next((outer for outer in enclosing(path) if outer.endswith(self.copied)), None)

    def inner_copy(self, module: str, entry: str) -> str | None:
        """The module on the way from `module` to its parameter `entry` that PEFT trains a copy of as well."""
        around = [outer for outer in enclosing(entry.rpartition(".")[0]) if len(outer) > len(module)]
        return next((inner for inner in around if inner.endswith(self.copied)), None)

    def without_module(self, paths: Iterable[str]) -> set[str]:
        """Those of `copied` that are the end of none of `paths`.

        Of the heads of a task, which PEFT names for every class, one is enough.
        """
        known = list(paths) if self.copied else []
        missing = {name for name in self.copied if not any(path.endswith(name) for path in known)}
        heads = set(_TASK_HEADS.get(self.task_type or "", ()))
        return missing if heads <= missing else missing - heads

    @property
    def folder(self) -> Path:
        """The folder that holds `files`."""
        return self.location.path if self.location.path.is_dir() else self.location.path.parent

    @property
    def modules(self) -> frozenset[str]:
        """Paths of the modules that have vectors."""
        return frozenset(site.module for site in self.sites.values())

    @property
    def parameters(self) -> int:
        """Elements of all vectors."""
        return sum(len(site.vector) for site in self.sites.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the vectors' values and sides, whatever the format, dtype and prefixes of names."""
        vectors = (
            site.direction.encode() + site.vector.astype("<f8").tobytes() for site in self.sites.values()
        )
        return sha256(b"".join(sorted(sha256(vector).digest() for vector in vectors))).hexdigest()


def second_key(module: str, direction: Direction) -> str:
    """Key in ``Adapter.sites`` of the second vector of a module, on the other side than the first."""
    return f"{module} ({direction}put)"


def same_in_every_layer(modules: Iterable[str]) -> str:
    """A regular expression for `modules` and their like in all other layers.

    This is what a format without a list of target modules must hold to be complete.
    """
    patterns = {
        r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split("."))
        for module in modules
    }
    return "|".join(sorted(patterns))


def inside(name: str) -> str:
    """PEFT's expression for the module `name` of ``modules_to_save`` and all that lies in it."""
    return rf"(^|.*\.){name}($|\..*)"


def as_pattern(value: object) -> Pattern:
    """A configuration value (string, list, None) as a `Pattern`; raises `ValueError` for anything else."""
    if value is None or isinstance(value, str):
        if value is not None:
            check_expression(value)
        return value
    if isinstance(value, Sequence) and all(isinstance(entry, str) for entry in value):
        return frozenset(value)
    raise ValueError("neither a list of names nor a regular expression")
