"""Regular expressions out of other people's files: matched as ``re`` matches, but never for long.

``re`` cannot be interrupted, and the ways in which an expression can explode cannot be told from its text. So
all but the simplest are matched by a process of their own, many names at once, that ends itself when its time
is over.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ia3_export.errors import DamagedFile

#: How an expression is laid over a name, by the function of ``re`` that does it.
Way = Literal["match", "fullmatch"]

SECONDS = 2.0
_REPEATS = re.compile(r"[*+{]")
_NOT_SIMPLE = re.compile(r"\)[*+{?]|\(\?")
_LONG, _SHOWN = 200, 200
#: Ways in which a name may be tried against an expression in this process.
_WAYS = 500_000
_MATCHER = """
import faulthandler, json, os, re, sys, time
asked = json.load(sys.stdin)
with open(os.devnull, "w") as nowhere:
    faulthandler.dump_traceback_later(asked["seconds"], exit=True, file=nowhere)
    start = time.monotonic()
    for way, expression in asked["questions"]:
        matches = getattr(re.compile(expression), way)
        print(json.dumps([i for i, name in enumerate(asked["names"]) if matches(name)]), flush=True)
    print(time.monotonic() - start)
"""


def check_expression(expression: str) -> None:
    """Raise `ValueError` for what ``re`` cannot compile."""
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{_shown(expression)} is no regular expression: {error}") from None


def bound_expressions(where: str, texts: Iterable[str], names: Iterable[str]) -> None:
    """Raise `DamagedFile` where matching one of the `texts` with `names` takes too long.

    A library takes them for expressions; those that are none are the library's business.
    """
    asked: list[tuple[Way, str]] = []
    for text in texts:
        if not _is_simple(text):
            try:
                check_expression(text)
            except ValueError:
                continue
            asked.append(("match", text))
    Matcher(where).look_at(asked, names)


@dataclass(slots=True, eq=False)
class Matcher:
    """Matches the expressions of one file, called `where`, with names, and remembers what it found.

    All questions together have `left` seconds.
    """

    where: str = "the adapter"
    left: float = SECONDS
    found: dict[tuple[Way, str, str], bool] = field(default_factory=dict)

    def matches(self, way: Way, expression: str, name: str) -> bool:
        """Whether `expression` matches `name`. Raises `DamagedFile` when that takes too long."""
        if _is_simple(expression) and len(name) <= _LONG:
            return getattr(re, way)(expression, name) is not None
        if (way, expression, name) not in self.found:
            self.look_at([(way, expression)], [name])
        return self.found[way, expression, name]

    def look_at(self, questions: Iterable[tuple[Way, str]], names: Iterable[str]) -> None:
        """Match many `names` at once, which costs hardly more than one.

        Raises `DamagedFile` when that takes too long.
        """
        names = list(names)
        hard = any(len(name) > _LONG for name in names)
        asked = [
            (way, expression)
            for way, expression in questions
            if (hard or not _is_simple(expression))
            and any((way, expression, name) not in self.found for name in names)
        ]
        if not asked:
            return
        answers = self._ask(asked, names)
        for (way, expression), indices in zip(asked, answers, strict=True):
            self.found.update({(way, expression, name): False for name in names})
            self.found.update({(way, expression, names[index]): True for index in indices})

    def _ask(self, questions: list[tuple[Way, str]], names: list[str]) -> list[list[int]]:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps(
                {"questions": questions, "names": names, "seconds": max(self.left, 0.001)}
            ).encode(),
            capture_output=True,
            check=False,
        )
        *answers, last = done.stdout.splitlines() or [b""]
        if done.returncode != 0:
            self.left = 0.0
            expression = questions[len(done.stdout.splitlines())][1]
            raise DamagedFile(
                f"{self.where}: the expression {_shown(expression)} is not matched with the names of "
                f"{len(names):,} modules within {SECONDS:g} seconds",
                hint="write it without a repeat inside a repeat, such as (a+)+, or as a list of names",
            )
        self.left -= float(last)
        return [json.loads(answer) for answer in answers]


def _is_simple(expression: str) -> bool:
    """Whether matching a name of usual length takes no time.

    No group is repeated, and the ways through all single repeats, options and alternatives are few.
    """
    if len(expression) > _LONG or _NOT_SIMPLE.search(expression):
        return False
    ways: int = (1 + expression.count("|")) ** max(expression.count("("), 1)
    ways *= _LONG ** len(_REPEATS.findall(expression)) * 2 ** expression.count("?")
    return ways <= _WAYS


def _shown(expression: str) -> str:
    return repr(expression if len(expression) <= _SHOWN else expression[:_SHOWN] + "...")
