"""``ia3-export patch`` and ``apply``: what `merge` and `onnx` wrote, as a patch of what they were given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ia3_export.patching.format import FoldRule, Stored, read_patch
from tests.e2e.command import contents, merge, only_complaint, run
from tests.e2e.conftest import Tiny
from tests.support.patches import write_merge
from tests.support.quantized import adapter_for, source_of

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = (".safetensors", ".gguf", ".onnx")


def patched(base: Path, merged: Path, folder: Path, *, folds: bool = True) -> tuple[Path, int]:
    """The patch, proven by use: in place, back, and into a new folder; and how much of weights it carries."""
    path, deployed, before = folder / "task.ia3patch", folder / "deployed", contents(base)
    ran = run("patch", "--from", base, "--to", merged, "--output", path, "--json")
    assert ran.code == 0, ran.stderr
    assert json.loads(ran.stdout)["bytes"] == path.stat().st_size
    shutil.copytree(base, deployed)
    ran = run("apply", path, deployed)
    assert ran.code == 0 and "in place" in ran.stdout, ran
    assert contents(deployed) == contents(merged)
    only_complaint(run("apply", path, deployed, "--quiet"), 3, "already patched")
    assert run("apply", "--revert", deployed).code == 0
    assert contents(deployed) == before
    assert run("apply", path, deployed, "--output", folder / "new", "--json").code == 0
    assert contents(folder / "new") == contents(merged)
    files = [change for change in read_patch(path).files if change.new.path.endswith(WEIGHTS)]
    assert files and all(change.old is not None for change in files)
    pieces = [piece for change in files for piece in change.pieces]
    assert any(isinstance(piece, FoldRule) for piece in pieces) == folds
    return path, sum(piece.length for piece in pieces if isinstance(piece, Stored))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "bfloat16"),
        ("gpt2", "float32"),
        ("bert-seq-cls", "float16"),
        ("gpt_neox", "bfloat16"),
        ("resnet-basic", "float32"),
        ("olmoe", "float32"),
        ("t5", "bfloat16"),
    ],
)
def test_a_merge_of_any_kind(tmp_path: Path, name: str, dtype: str) -> None:
    base, merged = write_merge(tmp_path, name, dtype)
    path, carried = patched(base, merged, tmp_path)
    # biases as long as their vector, and a head of the adapter's own
    assert carried <= 1500
    assert path.stat().st_size < 12000


def test_shards_that_no_vector_touches_are_not_in_the_patch(tiny: Tiny, tmp_path: Path) -> None:
    path, carried = patched(tiny.base, tiny.merged, tmp_path)
    patch = read_patch(path)
    assert carried == 0
    kept = {state.path for state in patch.kept}
    assert {"model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors"} <= kept
    card = next(change for change in patch.files if change.new.path == "README.base.md")
    assert card.old is not None and card.old.path == "README.md"


@pytest.mark.parametrize(
    "case",
    ["gguf-q4_k_m", "gguf-q6_k", "gguf-q8_0", "gguf-q4_1", "bnb-nf4", "awq-gemm-g32", "ct-w4a16-g32-sym"],
)
def test_a_quantized_base_whose_codes_a_merge_keeps(tmp_path: Path, case: str) -> None:
    source, base = source_of(case), tmp_path / "base"
    adapter = adapter_for(case, tmp_path / "adapter")
    given: tuple[Path | str, ...] = ("--quantized", "keep", "--quiet", "--no-reload-check")
    merge(source, adapter, tmp_path / "merged", *given)
    base.mkdir()
    for file in [source] if source.is_file() else source.iterdir():
        shutil.copy(file, base)
    _, carried = patched(base, tmp_path / "merged", tmp_path)
    assert carried <= 3000  # the header, where bfloat16 scales become float16


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `onnx` makes of ``base`` and ``merged``, and, ``folded``, of the base's graphs and the adapter."""
    folder = tmp_path_factory.mktemp("graphs")
    write_merge(folder, "llama", "bfloat16")
    for name, precisions in (("base", "fp32,fp16"), ("merged", "fp32,fp16"), ("base", "int8,int4,q8")):
        output = folder / f"{name}-{precisions}"
        given = ("--model", folder / name, "--output", output, "--precision", precisions)
        assert run("onnx", *given, "--no-verify", "--quiet").code == 0
    output = folder / "merged-int8"
    given = ("--model", folder / "merged", "--output", output, "--precision", "int8")
    assert run("onnx", *given, "--no-verify", "--quiet").code == 0
    source = ("--base", folder / "base", "--adapter", folder / "adapter", "--output", folder / "folded")
    ran = run("onnx", "--onnx-base", folder / "base-int8,int4,q8", *source, "--quiet")
    assert ran.code == 0, ran.stderr
    return folder


def test_graphs_of_a_bfloat16_base_in_either_width(graphs: Path, tmp_path: Path) -> None:
    path, carried = patched(graphs / "base-fp32,fp16", graphs / "merged-fp32,fp16", tmp_path)
    assert carried == 0
    pieces = [piece for change in read_patch(path).files for piece in change.pieces]
    assert {piece.rounded for piece in pieces if isinstance(piece, FoldRule)} == {"BF16"}


def test_graphs_whose_codes_are_kept(graphs: Path, tmp_path: Path) -> None:
    path, carried = patched(graphs / "base-int8,int4,q8", graphs / "folded", tmp_path, folds=False)
    # scales as long as their vector, since these blocks are as wide as the model
    assert carried <= 6000
    assert path.stat().st_size < 20000


def test_codes_that_were_rounded_anew_are_refused_by_name(graphs: Path, tmp_path: Path) -> None:
    given = (
        "--from",
        graphs / "base-int8,int4,q8",
        "--to",
        graphs / "merged-int8",
        "--output",
        tmp_path / "p",
    )
    ran = run("patch", *given, "--max-carried", "2KB", "--quiet")
    only_complaint(ran, 3, "no vector makes", "onnx/model_")
    assert "--onnx-base" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_asked_for_wrongly(tiny: Tiny, tmp_path: Path) -> None:
    patch = tmp_path / "task.ia3patch"
    assert run("patch", "--from", tiny.base, "--to", tiny.merged, "--output", patch, "-q").code == 0
    again = ("patch", "--from", tiny.base, "--to", tiny.merged, "--output", patch)
    only_complaint(run(*again), 4, "already exists")
    assert run(*again, "--overwrite", "-q").code == 0
    inside = tiny.base / "task.ia3patch"
    only_complaint(run("patch", "--from", tiny.base, "--to", tiny.merged, "--output", inside), 3, "inside")
    only_complaint(
        run("patch", "--from", tiny.base, "--to", tiny.base, "--output", inside.name), 3, "same files"
    )
    only_complaint(run("patch", "--from", "nowhere", "--to", tiny.base, "--output", "p"), 3, "nowhere")
    for wrong in (("apply",), ("apply", patch), ("apply", "--revert", patch, tiny.base)):
        only_complaint(run(*wrong), 2)
    only_complaint(run("apply", "--revert", tiny.base, "--output", "x"), 2)
    only_complaint(run("apply", patch, tiny.base, "--dry-run", "--output", "x"), 2)
    only_complaint(run("apply", patch, tiny.single), 3, "which the patch was made for")
    only_complaint(run("apply", patch, "nowhere"), 3, "nowhere")
    only_complaint(run("apply", tiny.base / "model-00001-of-00006.safetensors", tiny.base), 3, "no patch")
    only_complaint(run("apply", tiny.base / "config.json", tiny.base), 3, "config.json")
    only_complaint(run("apply", "--revert", tiny.base), 3, "not patched in place")
    only_complaint(run("apply", patch, tiny.base, "--output", tiny.merged), 4, "already exists")
    assert run("apply", patch, tiny.base, "--dry-run").code == 0
