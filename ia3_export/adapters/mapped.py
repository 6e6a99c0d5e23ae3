"""The generic reader: research code's bare vectors, told by ``REGEX=output|input`` rules what they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ia3_export.adapters.model import Adapter, Site, TargetRules, same_in_every_layer
from ia3_export.adapters.sites import add_site, make_site
from ia3_export.adapters.source import Source
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile, UnusedVector, UsageError
from ia3_export.expressions import Matcher, check_expression
from ia3_export.fold import Direction

_SIDES: dict[str, Direction] = {"output": "out", "input": "in"}


def parse_rules(rules: Sequence[str]) -> list[tuple[re.Pattern[str], Direction]]:
    """Rules as compiled expressions and directions. Raises `UsageError`."""
    parsed = []
    for rule in rules:
        expression, separator, side = rule.rpartition("=")
        if not separator or side not in _SIDES or not expression:
            raise UsageError(f"--map {rule!r} is no rule", hint=r"for example --map '(.+)\.ia3_scale=output'")
        try:
            check_expression(expression)
        except ValueError as error:
            raise UsageError(
                f"--map {rule!r}: {error}", hint="write a Python regular expression before the ="
            ) from None
        parsed.append((re.compile(expression), _SIDES[side]))
    return parsed


def read_mapped(source: Source, rules: Sequence[str]) -> Adapter:
    """The adapter in a file of vectors under any names.

    The first rule whose expression matches a whole key says the side that the vector scales. The module path
    is what the expression's groups matched, joined by dots; without groups the key without its last
    component. Keys that no rule matches are tensors that replace the base's. Raises `UsageError`,
    `UnusedVector` (no rule matches anything), `DamagedFile` (two vectors for one place), `Unsupported` and
    `ShapeMismatch`.
    """
    parsed = parse_rules(rules)
    names = [tensor.name for tensor in source.weights.tensors]
    try:  # once it is known not to take for ever, matching again for the groups is quick
        Matcher("--map").look_at([("fullmatch", regex.pattern) for regex, _ in parsed], names)
    except DamagedFile as error:
        raise UsageError(str(error), hint=error.hint) from None
    sites: dict[str, Site] = {}
    extras: dict[str, StoredTensor] = {}
    for tensor in source.weights.tensors:
        found = next(((m, side) for regex, side in parsed if (m := regex.fullmatch(tensor.name))), None)
        if found is None:
            extras[tensor.name] = tensor
            continue
        match, side = found
        module = ".".join(part for part in match.groups() if part) or tensor.name.rpartition(".")[0]
        add_site(sites, make_site(module, side, tensor), tensor)
    if not sites:
        keys = ", ".join(tensor.name for tensor in source.weights.tensors[:3])
        raise UnusedVector(
            f"no --map rule matches a key of {source.weights.path}",
            hint=f"an expression must match the whole key; the file has {keys}{', ...' if keys else 'none'}",
        )
    everywhere = TargetRules(
        target=same_in_every_layer(site.module for site in sites.values()), feedforward=()
    )
    return Adapter(
        name=source.name,
        format="mapped",
        location=source.location,
        files=source.files,
        sites=sites,
        extras=extras,
        rules=everywhere,
        config=source.config,
    )
