"""Every error that ia3-export raises on purpose.

::

    IA3ExportError
    ├── CheckFailed        exit 1   the check ran, and the answer is no
    ├── UsageError         exit 2   arguments that contradict each other
    ├── InputError         exit 3
    │   ├── NotFound               a file, folder or hub id that is not there
    │   ├── DamagedFile            truncated, overlapping, not what its header says
    │   ├── Unsupported            well-formed, but not something this version folds
    │   └── Refused                could be folded, but the result would not be what was trained
    │       ├── UnusedVector       a vector (or extra tensor) of the adapter that lands nowhere
    │       ├── MissingVector      a module that the configuration targets, without its vector
    │       ├── ShapeMismatch      vector or tensor of the wrong length for its place
    │       └── NotFinite          NaN or infinity, in a vector or after the cast
    └── OutputError        exit 4   the output could not be written

Each carries ``hint``: what to do next. The command line prints ``error:`` and ``hint:`` and exits
with ``exit_code``. Any other exception is a mistake of ours: exit 70 (``EX_SOFTWARE``), one line to
report, and the traceback with ``--verbose``.
"""

from __future__ import annotations

#: The exit code of a crash of ours, which must not be taken for a verdict.
CRASHED = 70


class IA3ExportError(Exception):
    """Base of the family. ``str(error)`` says what is wrong and where, ``hint`` what to do."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def first_line(error: BaseException) -> str:
    """What a library's exception says, in one line; its class where it says nothing."""
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)


def kind_and_line(error: BaseException) -> str:
    """``KeyError: 'weight'``; the class alone where the exception says nothing."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def last_line(text: str) -> str:
    """The last line of what a process wrote to standard error, where Python says what went wrong; empty if it
    wrote none."""
    return (text.strip().splitlines() or [""])[-1]


class CheckFailed(IA3ExportError):
    """An artifact is not in parity, or is incomplete."""

    exit_code = 1


class UsageError(IA3ExportError):
    """Options that contradict each other."""

    exit_code = 2


class InputError(IA3ExportError):
    """An input cannot be read or is refused."""


class NotFound(InputError):
    """A file, folder or hub id does not exist."""


class DamagedFile(InputError):
    """A file does not hold what its own header or index promises."""


class Unsupported(InputError):
    """A well-formed input of a kind that this version does not fold."""


class Refused(InputError):
    """Folding would give something else than the unmerged forward."""


class UnusedVector(Refused):
    """The adapter brings something that has no place in the base."""


class MissingVector(Refused):
    """A targeted module has no vector in the adapter."""


class ShapeMismatch(Refused):
    """A vector or tensor does not fit the place that its name gives it."""


class NotFinite(Refused):
    """NaN or infinity in a vector, or in a tensor after the fold."""


class OutputError(IA3ExportError):
    """The output could not be written."""

    exit_code = 4
