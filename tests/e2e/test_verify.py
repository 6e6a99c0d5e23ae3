"""``verify`` through the CLI: right merges pass, damaged ones fail with exit 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ia3_export.cli import cli
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = [
    "bert-seq-cls",
    "roberta-seq-cls",
    "llama-biased",
    "gpt2",
    "t5",
    "vit",
    "whisper",
    "resnet-basic",
    "mixtral",
]


def _run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with ``base``, ``adapter`` and ``merged`` for each kind, in float32 and (llama) bfloat16."""
    folders = {}
    for name in KINDS:
        kind = zoo.by_name(name)
        folder = tmp_path_factory.mktemp(name)
        model = zoo.build(kind, dtype="bfloat16" if name == "llama-biased" else "float32")
        model.save_pretrained(folder / "base")
        zoo.adapt(model, kind).save_pretrained(folder / "adapter")
        code, text = _run(
            "merge", "--base", folder / "base", "--adapter", folder / "adapter", "--output", folder / "merged"
        )
        assert code == 0, text
        folders[name] = folder
    return folders


@pytest.mark.parametrize("name", KINDS)
def test_a_right_merge_is_in_parity(made: dict[str, Path], name: str) -> None:
    folder = made[name]
    code, text = _run(
        "verify", "--base", folder / "base", "--adapter", folder / "adapter", "--merged", folder / "merged"
    )
    assert code == 0, text
    assert "in parity" in text and "NOT" not in text


@pytest.mark.parametrize("name", KINDS)
def test_the_base_passed_off_as_the_merge_is_found_out(made: dict[str, Path], name: str) -> None:
    folder = made[name]
    code, text = _run(
        "verify",
        "--base",
        folder / "base",
        "--adapter",
        folder / "adapter",
        "--merged",
        folder / "base",
        "--json",
    )
    report = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert code == 1
    assert report["rows"][0]["in_parity"] is False
    if name != "roberta-seq-cls":  # there the base's head counts as part of the base, PEFT's own differs
        assert "computes the base" in report["rows"][0]["finding"]


def _forget_a_site(tensors: dict[str, Any], base: dict[str, Any]) -> None:
    name = next(n for n in tensors if n.endswith("0.self_attn.v_proj.weight"))
    tensors[name] = base[name]


def _apply_twice(tensors: dict[str, Any], base: dict[str, Any]) -> None:
    name = next(n for n in tensors if n.endswith("0.mlp.down_proj.weight"))
    tensors[name] = (tensors[name].float() ** 2 / base[name].float()).nan_to_num().to(tensors[name].dtype)


def _swap_layers(tensors: dict[str, Any], base: dict[str, Any]) -> None:
    one, other = (f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]


@pytest.mark.parametrize("damage", [_forget_a_site, _apply_twice, _swap_layers])
def test_a_damaged_merge_fails(made: dict[str, Path], tmp_path: Path, damage: Any) -> None:
    folder = made["llama-biased"]
    shutil.copytree(folder / "merged", tmp_path / "bad")
    tensors = load_file(folder / "merged" / "model.safetensors")
    damage(tensors, load_file(folder / "base" / "model.safetensors"))
    save_file(
        {n: t.clone() for n, t in tensors.items()},
        tmp_path / "bad" / "model.safetensors",
        metadata={"format": "pt"},
    )
    code, text = _run(
        "verify", "--base", folder / "base", "--adapter", folder / "adapter", "--merged", tmp_path / "bad"
    )
    assert code == 1, text
    assert "NOT in parity" in text


@pytest.mark.parametrize(
    "combine",
    [[], ["--combine", "linear", "--weights", "0.3,0.6"], ["--combine", "delta", "--weights", "0.5,1.5"]],
)
def test_several_adapters_are_verified_as_they_were_combined(
    made: dict[str, Path], tmp_path: Path, combine: list[str]
) -> None:
    folder = made["llama-biased"]
    kind = zoo.by_name("llama-biased")
    zoo.adapt(zoo.build(kind, dtype="bfloat16"), kind, seed=9).save_pretrained(tmp_path / "second")
    inputs = ["--base", folder / "base", "--adapter", folder / "adapter", "--adapter", tmp_path / "second"]
    code, text = _run("merge", *inputs, "--output", tmp_path / "merged", *combine)
    assert code == 0, text
    code, text = _run("verify", *inputs, "--merged", tmp_path / "merged")
    assert code == 0, text


def test_without_artifacts_a_temporary_merge_is_verified(made: dict[str, Path]) -> None:
    folder = made["bert-seq-cls"]
    code, text = _run("verify", "--base", folder / "base", "--adapter", folder / "adapter")
    assert code == 0, text


def test_fused_experts_with_vectors_of_transformers_4_are_named_as_not_runnable() -> None:
    fixture = Path(__file__).parent.parent / "fixtures" / "mixtral_v4"
    code, text = _run("verify", "--base", fixture / "base", "--adapter", fixture / "adapter")
    assert code == 3
    assert "experts" in text and "hint:" in text


@pytest.mark.gpu
def test_a_merge_is_in_parity_on_a_gpu(made: dict[str, Path]) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    for name in ("llama-biased", "bert-seq-cls", "vit"):
        folder = made[name]
        code, text = _run(
            "verify",
            "--base",
            folder / "base",
            "--adapter",
            folder / "adapter",
            "--merged",
            folder / "merged",
            "--device",
            "cuda",
        )
        assert code == 0, text


def test_a_missing_gpu_is_a_usage_error(made: dict[str, Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    folder = made["bert-seq-cls"]
    code, text = _run(
        "verify", "--base", folder / "base", "--adapter", folder / "adapter", "--device", "cuda"
    )
    assert code == 2
    assert "no CUDA device" in text
