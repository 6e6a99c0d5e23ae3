"""Names that training's wrappers leave in keys, bases saved inside them, and what lies beside an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.command import merge, only_complaint, run, vary_adapter
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    kind, folder = zoo.by_name("llama"), tmp_path_factory.mktemp("llama")
    model = zoo.build(kind)
    model.save_pretrained(folder / "base")
    zoo.adapt(model, kind).save_pretrained(folder / "adapter")
    merge(folder / "base", folder / "adapter", folder / "merged")
    return folder / "base", folder / "adapter", folder / "merged"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.module."),
        lambda key: key.replace("base_model.model.", "base_model.model.module._fsdp_wrapped_module."),
        lambda key: (
            "_fsdp_wrapped_module."
            + key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.")
        ),
        lambda key: key.replace(".self_attn.", ".self_attn._checkpoint_wrapped_module."),
        lambda key: key.replace(".layers.1.", ".layers.1._orig_mod.module._checkpoint_wrapped_module."),
        lambda key: key.replace(".ia3_l", "._fsdp_wrapped_module.ia3_l"),
    ],
)
def test_wrappers_in_keys_are_taken_off(saved: tuple[Path, Path, Path], tmp_path: Path, wrap: Any) -> None:
    base, adapter, merged = saved

    def edit(tensors: dict[str, Any]) -> None:
        wrapped = {wrap(key): value for key, value in tensors.items()}
        tensors.clear()
        tensors.update(wrapped)

    ran = merge(base, vary_adapter(adapter, tmp_path / "wrapped", edit), tmp_path / "out")
    assert "not of PEFT's form" in ran.stdout
    assert (tmp_path / "out/model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def _wrapped_by_peft(base: Path, folder: Path) -> None:
    import transformers
    from peft import IA3Config, get_peft_model

    model = transformers.LlamaForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    tuned.base_model.save_pretrained(folder)


def _compiled(base: Path, folder: Path) -> None:
    shutil.copytree(base, folder)
    tensors = {f"_orig_mod.{name}": value for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _compiled_and_parallel(base: Path, folder: Path) -> None:
    shutil.copytree(base, folder)
    tensors = {
        f"_orig_mod.module.{name}": value for name, value in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _sharded(base: Path, folder: Path) -> None:
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    wrapped = {
        name.replace(".mlp.", "._checkpoint_wrapped_module.mlp._fsdp_wrapped_module."): v
        for name, v in tensors.items()
    }
    save_file(wrapped, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("make", [_wrapped_by_peft, _compiled, _compiled_and_parallel, _sharded])
def test_a_base_saved_inside_a_wrapper_is_read_under_the_models_own_names(
    saved: tuple[Path, Path, Path], tmp_path: Path, make: Any
) -> None:
    make(saved[0], tmp_path / "base")
    ran = merge(tmp_path / "base", saved[1], tmp_path / "out")
    assert "was saved inside a wrapper" in ran.stdout
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", saved[2]))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_pipeline_of_diffusers_names_its_models(saved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    for name in ("unet", "text_encoder"):
        (pipeline / name).mkdir(parents=True)
        (pipeline / name / "config.json").write_text("{}")
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    shutil.copy(saved[0] / "model.safetensors", pipeline / "unet/diffusion_pytorch_model.safetensors")
    command = ("merge", "--adapter", saved[1], "--output", tmp_path / "out", "--base")
    only_complaint(run(*command, pipeline), 3, "diffusers pipeline", "text_encoder, unet")
    only_complaint(run(*command, pipeline / "unet"), 3, "a model of diffusers")
    assert run(*command, pipeline / "unet/diffusion_pytorch_model.safetensors").code == 0


def test_a_projector_beside_the_adapter_is_warned_of(saved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = saved
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter/non_lora_trainables.bin").write_bytes(b"")
    assert (
        "non_lora_trainables.bin beside the adapter"
        in merge(base, tmp_path / "adapter", tmp_path / "out").stdout
    )
