"""``ia3_export.json`` tells which stored tensor of the merged checkpoint every initializer holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.command import merge
from tests.support.exported import Exports
from tests.support.tensors import read_folder

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

EXPORTED: list[tuple[str, tuple[str, ...]]] = [
    ("llama", ()), ("gpt2", ()), ("bloom", ()), ("olmoe", ()), ("bert-masked-lm", ()),
    ("mpnet", ("--task", "feature-extraction")), ("t5", ("--decoder", "merged")), ("t5", ("--decoder", "if")),
    ("bart", ("--decoder", "merged")), ("whisper", ("--decoder", "merged")), ("vit", ()), ("convnext", ()),
]  # fmt: skip


def _each(**broken: str) -> pytest.MarkDecorator:
    """All of `EXPORTED`, some of which are known to be told wrongly."""
    return pytest.mark.parametrize(
        ("name", "options"),
        [
            pytest.param(
                name,
                options,
                id="-".join((name, *options[1:])),
                marks=[pytest.mark.xfail(strict=True, reason=broken[name])] if name in broken else [],
            )
            for name, options in EXPORTED
        ],
    )


def _initializers(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    import onnx
    from onnx import numpy_helper

    found = [onnx.load(path).graph]
    for graph in found:
        found += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return {t.name: numpy_helper.to_array(t) for graph in found for t in graph.initializer}


@_each()
def test_every_named_initializer_holds_the_merged_tensor_that_it_claims(
    exports: Exports, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    exported = exports(name, *options)
    merge(exported.base, exported.adapter, tmp_path / "merged", "-q")
    stored = {key: value.numpy() for key, value in read_folder(tmp_path / "merged").items()}
    told = json.loads((exported.folder / "ia3_export.json").read_text())["provenance"]
    assert told.keys() == {path.stem for path in exported.graphs}
    shown = 0
    for graph, rows in told.items():
        held = _initializers(exported.graph(graph))
        assert rows.keys() <= held.keys()
        for initializer, origin in rows.items():
            if origin["tensor"] is None:
                continue
            wanted = stored[origin["tensor"]]
            value = held[initializer].T if origin["transposed"] else held[initializer]
            assert value.dtype == wanted.dtype and np.array_equal(value, wanted), f"{graph}: {initializer}"
            shown += 1
    # what the adapter changed is among them
    base = {key: value.numpy() for key, value in read_folder(exported.base).items()}
    changed = {key for key, value in stored.items() if not np.array_equal(value, base[key])}
    claimed = {origin["tensor"] for rows in told.values() for origin in rows.values()}
    assert changed and changed <= claimed
    assert shown >= 15


@_each(
    olmoe="transposed experts are not told at all",
    whisper="the table of decoder positions is written as val_24",
)
def test_every_weight_has_an_origin(exports: Exports, name: str, options: tuple[str, ...]) -> None:
    exported = exports(name, *options)
    told = json.loads((exported.folder / "ia3_export.json").read_text())["provenance"]
    for path in exported.graphs:
        weights = {n for n, a in _initializers(path).items() if a.dtype == np.float32 and a.nbytes > 1024}
        assert weights <= told[path.stem].keys(), f"{path.stem}: {weights - told[path.stem].keys()}"
        if name != "olmoe":
            named = {n for n, origin in told[path.stem].items() if origin["tensor"] is not None}
            assert weights <= named, f"{path.stem}: {weights - named}"
