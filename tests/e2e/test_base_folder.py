"""A base folder that holds more than a base: adapters, states of trainings, code.

None of it reaches what is written or run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.command import edit_json, merge, only_complaint, run, run_process
from tests.e2e.conftest import Tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STATES = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
    "trainer_state.json", "random_states_0.pkl", "non_lora_trainables.bin", "checkpoint-10/model.safetensors",
    "checkpoint-10/training_args.bin", "global_step20/mp_rank_00_model_states.pt",
    "pytorch_model_fsdp_0/__0_0.distcp",
)  # fmt: skip
HUBS = ("pytorch_adapter.bin", "adapter.safetensors", "head_config.json", "model_head.safetensors")
KEPT = ("spk_dict.pt", "1_Dense/pytorch_model.bin", "vision-lora/adapter_config.json", "notes/optimizer.pt")
CODE = "from pathlib import Path\nPath(__file__).parent.joinpath('ran').touch()\nPath({!r}).touch()\n"


@pytest.fixture
def both(tiny: Tiny, tmp_path: Path) -> Path:
    """A base with the adapter's files beside its own, as a training that saved into one folder leaves it."""
    shutil.copytree(tiny.single, tmp_path / "both")
    shutil.copytree(tiny.adapter, tmp_path / "both", dirs_exist_ok=True)
    return tmp_path / "both"


def write(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_an_adapter_in_the_base_folder_is_left_out_and_named(tiny: Tiny, both: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    ran = merge(both, both, tmp_path / "merged")
    files = {"adapter_config.json", "adapter_model.safetensors"}
    manifest = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())
    assert files <= set(manifest["left_out"])
    assert "also holds an adapter (adapter_config.json)" in ran.stdout
    assert any("also holds an adapter" in warning for warning in manifest["warnings"])
    assert not list((tmp_path / "merged").rglob("adapter*"))
    ids = torch.arange(5, 17)[None]
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.single), tiny.adapter).eval()
    model = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, live(ids).logits, rtol=0, atol=1e-5)


def test_states_of_trainings_and_other_adapters_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.single, tmp_path / "base"))
    write(base, *STATES, *HUBS, *KEPT)
    shutil.copytree(tiny.adapter, base / "my-style")
    write(base / "vision-lora", "adapter_config.json", text='{"peft_type": "LORA"}')
    ran = merge(base, tiny.adapter, tmp_path / "merged")
    written = {
        p.relative_to(tmp_path / "merged").as_posix() for p in (tmp_path / "merged").rglob("*") if p.is_file()
    }
    assert written.isdisjoint((*STATES, *HUBS))
    assert not any(name.startswith("my-style") for name in written)
    assert written >= set(KEPT)
    left_out = json.loads((tmp_path / "merged" / "ia3_export.json").read_text())["left_out"]
    assert {*STATES, *HUBS, "my-style/adapter_config.json"} <= set(left_out)
    assert all(name in ran.stdout for name in left_out)


def test_verify_does_not_see_the_adapter_beside_the_base(tiny: Tiny, both: Path, tmp_path: Path) -> None:
    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    assert run("verify", "--base", both, "--adapter", both, "--merged", tmp_path / "merged").code == 0
    assert run("verify", "--base", both, "--adapter", tiny.other).code == 0


def test_an_adapter_beside_merged_weights_is_a_finding(tiny: Tiny, both: Path, tmp_path: Path) -> None:
    merge(tiny.single, tiny.adapter, tmp_path / "merged")
    shutil.copy(both / "adapter_config.json", tmp_path / "merged")
    ran = run("verify", "--base", tiny.single, "--adapter", tiny.adapter, "--merged", tmp_path / "merged")
    assert ran.code == 1, ran
    assert "adapter_config.json" in ran.stdout
    assert "it would act twice" in ran.stdout


def test_onnx_refuses_a_model_with_an_adapter_beside_it(both: Path, tmp_path: Path) -> None:
    ran = run("onnx", "--model", both, "--output", tmp_path / "onnx")
    only_complaint(ran, 3, "holds a model and an adapter")
    assert f"--base {both} --adapter {both}" in ran.stderr


def test_remote_code_is_neither_run_nor_asked_about(tiny: Tiny, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    write(base, "code.py", text=CODE.format(str(tmp_path / "ran")))
    edit_json(
        base / "config.json",
        auto_map={
            "AutoConfig": "code.Config",
            "AutoModelForCausalLM": "code.Model",
            "AutoModel": "code.Model",
        },
    )
    edit_json(
        base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["code.Tokenizer", None]},
        tokenizer_class="Tokenizer",
    )
    (tmp_path / "texts").write_text("tiny tiny\n")
    # once as a process of its own, whose questions would go to a real terminal
    for start, more in ((run_process, ("--text", tmp_path / "texts")), (run, ())):
        ran = start("verify", "--base", base, "--adapter", tiny.adapter, *more, stdin="y\n" * 20)
        assert ran.code in (0, 3), ran
        assert "[y/N]" not in ran.stdout + ran.stderr
    for task in ("feature-extraction", "text-generation"):
        words = ("onnx", "--model", base, "--task", task, "--output", tmp_path / task, "--no-verify")
        ran = run(*words, stdin="y\n" * 20)
        assert ran.code == 0, ran
        assert "[y/N]" not in ran.stdout + ran.stderr
    assert not (tmp_path / "ran").exists()
