"""The public functions take what the command line takes, and say what that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ia3_export
from ia3_export import OutputOptions, Recipe, RunSettings
from ia3_export.errors import IA3ExportError, UsageError

A, B, OUT = "base", "adapter", "out"

WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("Recipe", (), {"combine": "banana"}, "'product', 'linear', 'delta'"),
    ("Recipe", (), {"quantized": "yes"}, "'dequantize', 'keep', 'keep-or-dense'"),
    ("OutputOptions", (), {"digests": "sha1"}, "'full', 'output', 'none'"),
    ("Recipe", (), {"dtype": "fp16"}, "'float16'"),
    ("Recipe", (), {"cast": None}, "'peft', 'peft-low-mem'"),
    ("Recipe", (), {"tokenizer": "mine"}, "'auto', 'base', 'adapter'"),
    ("merge", (A, B, OUT), {}, "adapters=['adapter']"),
    ("merge", (A, Path(B), OUT), {}, "give a list"),
    ("merge", (A, [B, 7], OUT), {}, "a text"),
    ("Recipe", (), {"weights": "0.5"}, "weights=['0.5']"),
    ("Recipe", (), {"weights": ["0.5"]}, "a number"),
    ("Recipe", (), {"weights": 0.5}, "weights=[0.5]"),
    ("OutputOptions", (), {"overwrite": "no"}, "True or False"),
    ("OutputOptions", (), {"shard_size": "5GB"}, "a whole number"),
    ("merge", (None, [B], OUT), {}, "a path"),
    ("Recipe", (), {"weights": {0.5, 1.0}}, "weights=["),
    ("merge", (A, {B}, OUT), {}, "adapters=['adapter']"),
    ("merge", (A, [B], OUT), {"on_progress": 7}, "a function"),
    ("merge", (A, [B], "a\0b"), {}, "a path"),
    ("merge", (A, [B], Path("a\ud800")), {}, "a path"),
    ("merge", (A, [B], OUT), {"recipe": "linear"}, "a Recipe"),
    ("merge", (A, [B], OUT), {"options": Recipe()}, "an OutputOptions"),
    ("verify", (A, [B]), {"settings": "cpu"}, "a RunSettings"),
    ("merge_each", (A, B, OUT), {}, "adapters=['adapter']"),
    ("Recipe", (), {"dtype": "half"}, "'float16'"),
    ("Recipe", (), {"combine": "Product"}, "'product'"),
    ("plan_merge", (A, B), {}, "give a list"),
    ("inspect", (B,), {"quantized": True}, "'keep'"),
    ("GraphOptions", (), {"precisions": "fp32"}, "precisions=['fp32']"),
    ("GraphOptions", (), {"targets": "genai"}, "targets=['genai']"),
    ("GraphOptions", (), {"decoder": "both"}, "'merged', 'separate', 'if'"),
    ("export_onnx", (OUT,), {"base": A, "adapters": B}, "adapters=['adapter']"),
    ("GraphOptions", (), {"opset": "20"}, "a whole number"),
    ("export_onnx", (OUT,), {"model": A, "graphs": "fp32"}, "a GraphOptions"),
    ("bench", (A, [B]), {"settings": 5}, "a BenchSettings"),
    ("refold", (OUT, A, B), {}, "adapters=['adapter']"),
    ("refold", (OUT, A, [B]), {"check": "no"}, "True or False"),
    ("patch", (A, B, OUT), {"max_carried": "1MB"}, "a whole number"),
    ("apply", (None, A), {}, "a path"),
    ("revert", (A,), {"on_progress": 7}, "a function"),
    ("verify", (A, B), {}, "adapters=['adapter']"),
    ("verify", (A, [B]), {"onnx": "exported"}, "onnx=['exported']"),
    ("RunSettings", (), {"dtype": "fp32"}, "'float64'"),
    ("Recipe", (), {"combine": "sum"}, "'linear'"),
    ("RunSettings", (), {"atol": "1e-4"}, "a number"),
    ("RunSettings", (), {"seed": 0.5}, "a whole number"),
    ("verify", (A, [B]), {"on_progress": "x"}, "a function"),
    ("export_onnx", (OUT,), {"model": A, "on_step": 7}, "a function"),
    ("convert", (B, OUT), {"task_type": "classification"}, "'SEQ_CLS'"),
    ("combine", ("ab", OUT), {}, "adapters=['ab']"),
    ("combine", ([B, B], OUT), {"combine": "mean"}, "'delta'"),
    ("unmerge", (A, B, OUT), {}, "give a list"),
    ("unmerge", (A, [B], OUT), {"recipe": {}}, "a Recipe"),
    ("bench", (A, B), {}, "give a list"),
    ("BenchSettings", (), {"precisions": "int8"}, "precisions=['int8']"),
    ("BenchSettings", (), {"threads": "two"}, "a whole number"),
    ("compare", (B, 3), {}, "a path"),
    ("plot_vectors", (B, "x.html"), {}, "give a list"),
    ("read_adapter", (B,), {"rules": "(.+)=output"}, "give a list"),
    ("read_checkpoint", ([A],), {}, "a path"),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "offered"), WRONG, ids=lambda value: str(value)[:40])
def test_what_the_command_line_refuses_is_wrong_usage(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], offered: str
) -> None:
    with pytest.raises(UsageError) as caught:
        getattr(ia3_export, name)(*args, **kwargs)
    assert f"{name}(" in str(caught.value)
    assert offered in caught.value.hint


def test_every_public_function_is_checked() -> None:
    functions = [name for name in ia3_export.__all__ if name != "errors"]
    assert {name for name, *_ in WRONG} == set(functions)


@pytest.mark.parametrize("weights", [(1, 0.5), [0.25, 0.5]])
def test_numbers_and_paths_of_every_kind_are_taken(tmp_path: Path, weights: Any) -> None:
    """They get as far as the files, which are not there."""
    adapters = (path for path in (tmp_path / "a", str(tmp_path / "b")))
    with pytest.raises(IA3ExportError, match="does not exist"):
        ia3_export.merge(
            tmp_path,
            adapters,
            "out",
            recipe=Recipe(combine="linear", weights=weights),
            options=OutputOptions(overwrite=False, link=True),
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -5])
def test_a_shard_of_nothing_is_wrong_usage(size: int) -> None:
    with pytest.raises(UsageError, match="holds nothing"):
        OutputOptions(shard_size=size)


@pytest.mark.parametrize("wrong", [{"atol": -1.0}, {"rtol": -1e-9}, {"seed": 2**63}, {"seed": -1}])
def test_numbers_that_the_command_line_refuses_are_wrong_usage(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RunSettings(**wrong)


def test_a_merged_model_is_exported_without_adapter(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="either --model, or --base with --adapter"):
        ia3_export.export_onnx(tmp_path / "out", model=tmp_path, adapters=[tmp_path])


def test_numbers_of_numpy_and_of_generators_count(tmp_path: Path) -> None:
    import numpy as np

    from tests.support import zoo

    kind = zoo.by_name("llama")
    zoo.build(kind).save_pretrained(tmp_path / "base")
    adapters = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(adapters):
        zoo.adapt(zoo.build(kind), kind, seed=seed).save_pretrained(folder)
    written = []
    for i, weights in enumerate(([0.25, 0.5], np.float32([0.25, 0.5]), (x for x in (0.25, 0.5)))):
        ia3_export.merge(
            tmp_path / "base", adapters, tmp_path / f"{i}", recipe=Recipe(combine="linear", weights=weights)
        )  # type: ignore[arg-type]
        written.append((tmp_path / f"{i}" / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
    with pytest.raises(UsageError, match="finite"):
        ia3_export.merge(
            tmp_path / "base", adapters, tmp_path / "x", recipe=Recipe(combine="linear", weights=[10**400, 1])
        )
