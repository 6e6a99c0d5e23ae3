"""Where vectors stand in a picture: layers as rows, kinds of module as columns, stacks such as a decoder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ia3_export.drawing.formats import shortest_ends, span, tail
from ia3_export.ordering import natural
from ia3_export.vectors.picture import Cell, Column, PlotSite, Stack


def make_stacks(sites: Sequence[PlotSite], cells: Sequence[Cell]) -> tuple[Stack, ...]:
    """Sites by what stands before their layer number, below it by kind; both in order of appearance."""
    paths = [tuple(site.module.split(".")) for site in sites]
    places = _layer_places(paths)
    patterns = [
        (tuple("*" if i in at else part for i, part in enumerate(path)), site.direction)
        for path, at, site in zip(paths, places, sites, strict=True)
    ]
    # experts have rows of their own: 3.7 is the seventh of layer 3
    members: dict[tuple[tuple[str, ...], bool], list[int]] = {}
    for i, (path, at) in enumerate(zip(paths, places, strict=True)):
        members.setdefault((path[: at[0]] if at else (), len(at) > 1), []).append(i)
    labels = _stack_labels([prefix for prefix, _ in members])
    stacks = []
    for (prefix, crowded), indices in members.items():
        kinds = list(dict.fromkeys(patterns[i] for i in indices))
        names = _kind_labels(kinds)
        grid: dict[tuple[str, ...], dict[int, Cell]] = {}
        for i in indices:
            row = tuple(paths[i][place] for place in places[i])
            grid.setdefault(row, {})[kinds.index(patterns[i])] = cells[i]
        columns = tuple(
            Column(names[kind], _channels(cells[i] for i in indices if patterns[i] == kind), k)
            for k, kind in enumerate(kinds)
        )
        rows = tuple(
            (tail(".".join(row), 9) or "—", tuple(grid[row].get(k) for k in range(len(kinds))))
            for row in sorted(grid, key=lambda row: natural(".".join(row)))
        )
        label = f"{labels[prefix]} several per layer".strip() if crowded else labels[prefix]
        stacks.append(Stack(label, columns, rows))
    return tuple(stacks)


def _layer_places(paths: Sequence[tuple[str, ...]]) -> list[tuple[int, ...]]:
    """Where in each path the number of its layer is.

    It is the one that differs between paths that are alike but for numbers (``layer.0`` of T5's blocks does
    not), several for experts, the first where nothing differs.
    """

    def starred(path: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("*" if re.fullmatch("[0-9]+", part) else part for part in path)

    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for path in paths:
        alike.setdefault(starred(path), []).append(path)
    found = {}
    for pattern, members in alike.items():
        numbers = [i for i, part in enumerate(pattern) if part == "*"]
        differing = [i for i in numbers if len({path[i] for path in members}) > 1]
        found[pattern] = tuple(differing or numbers[:1])
    return [found[starred(path)] for path in paths]


def _stack_labels(prefixes: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What differs between the paths before the layer number (``decoder``); nothing where there is one."""
    known = list(dict.fromkeys(prefix for prefix in prefixes if prefix))
    if len(known) < 2:
        return dict.fromkeys(known, "") | {(): "outside of the layers" if known else ""}
    start = _shared(known)
    end = _shared([prefix[start:][::-1] for prefix in known])
    named = {
        prefix: tail(".".join(prefix[start : len(prefix) - end]) or ".".join(prefix), 40) for prefix in known
    }
    return named | {(): "outside of the layers"}


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """How many parts all of `paths` begin with."""
    return next(
        (i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths))
    )


def _kind_labels(kinds: Sequence[tuple[tuple[str, ...], str]]) -> dict[tuple[tuple[str, ...], str], str]:
    names = shortest_ends(pattern for pattern, _ in kinds)
    both = {pattern for pattern, n in Counter(pattern for pattern, _ in kinds).items() if n > 1}
    return {
        (pattern, direction): (tail(names[pattern], 32) or "—")
        + (f" ({direction}put)" if pattern in both else "")
        for pattern, direction in kinds
    }


def _channels(cells: Iterable[Cell]) -> str:
    return span(strip.counts.channels for cell in cells for strip in cell.strips if strip)
