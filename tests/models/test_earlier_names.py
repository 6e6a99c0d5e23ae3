"""Module paths of transformers before 4.52 in adapters and bases, in every combination with today's.

``save_pretrained`` still writes the earlier names of most vision-language models, PEFT the module paths of
the library that trained. The earlier adapter is today's under the names in which transformers saves; the
reference is PEFT's live one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ia3_export import RunSettings, merge, verify
from tests.e2e.command import edit_json

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
QWEN2_VL = {
    "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
                      "patch_size": 8},
    "image_token_id": 100, "tie_word_embeddings": False,
}  # fmt: skip

#: Class, configuration, and today's beginnings of paths with the earlier ones.
FAMILIES = {
    "LlavaForConditionalGeneration": (
        {"vision_config": VISION | {"model_type": "clip_vision_model"},
         "text_config": TEXT | {"model_type": "llama"},
         "image_token_index": 100, "tie_word_embeddings": False},
        {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
         "model.vision_tower.": "vision_tower.vision_model.",
         "model.multi_modal_projector.": "multi_modal_projector."},
    ),
    "PaliGemmaForConditionalGeneration": (
        {"vision_config": VISION | {"model_type": "siglip_vision_model"},
         "text_config": TEXT | {"model_type": "gemma", "head_dim": 8},
         "image_token_index": 100, "projection_dim": 32},
        {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
         "model.vision_tower.": "vision_tower.vision_model.",
         "model.multi_modal_projector.": "multi_modal_projector."},
    ),
    "Qwen2VLForConditionalGeneration": (QWEN2_VL, {"model.language_model.": "model.",
        "model.visual.": "visual."}),
}  # fmt: skip
TARGETS = ["k_proj", "v_proj", "down_proj", "fc2", "linear_1", "linear", "lm_head", "merger.mlp.0"]


def _rename(file: Path, beginnings: dict[str, str], prefix: str = "") -> None:
    tensors = {}
    for name, value in load_file(file).items():
        bare = name.removeprefix(prefix)
        begin = next((b for b in beginnings if bare.startswith(b)), None)
        tensors[prefix + (bare if begin is None else beginnings[begin] + bare[len(begin) :])] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder: the base as saved and with today's names, the adapter under today's and earlier names."""
    import torch
    import transformers
    from peft import IA3Config, PeftModel, get_peft_model

    config, earlier = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    cls = getattr(transformers, request.param)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config))
    model.save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "base-today")
    state = {
        n: t.clone()
        for n, t in model.state_dict().items()
        if n != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    save_file(state, folder / "base-today/model.safetensors", {"format": "pt"})
    tuned = get_peft_model(model, IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj", "fc2"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder / "today")
    shutil.copytree(folder / "today", folder / "earlier")
    _rename(folder / "earlier/adapter_model.safetensors", earlier, "base_model.model.")
    live = PeftModel.from_pretrained(cls.from_pretrained(folder / "base"), folder / "today").eval()
    inputs = {"input_ids": torch.arange(3, 20)[None]}
    with torch.no_grad():
        return cls, folder, inputs, live(**inputs).logits


@pytest.mark.parametrize("adapter", ["today", "earlier"])
@pytest.mark.parametrize("base", ["base", "base-today"])
def test_names_of_any_time_merge_to_the_live_model_and_verify(
    family: Any, tmp_path: Path, base: str, adapter: str
) -> None:
    import torch

    cls, folder, inputs, live = family
    merge(folder / base, [folder / adapter], tmp_path / "out")
    merged, report = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**inputs).logits, live, rtol=1e-5, atol=1e-5)
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    proof = verify(
        folder / base,
        [folder / adapter],
        merged=tmp_path / "out",
        settings=RunSettings(inputs=tmp_path / "inputs.npz"),
    )
    assert proof.verdict == "in parity", proof


def test_an_expression_of_earlier_names_still_finds_what_is_missing(family: Any, tmp_path: Path) -> None:
    from ia3_export import plan_merge

    _, folder, _, _ = family
    adapter = tmp_path / "adapter"
    shutil.copytree(folder / "earlier", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [name.removeprefix("base_model.model.").removesuffix(".ia3_l") for name in tensors]
    text = [name for name in names if ".layers." in name and "vision" not in name] + [
        n for n in names if "lm_head" in n
    ]
    beginning = text[0].partition(".layers.")[0].replace(".", r"\.")
    edit_json(
        adapter / "adapter_config.json",
        target_modules=rf"{beginning}\.layers\.\d+\..*(k_proj|v_proj|down_proj)|.*lm_head",
    )
    kept = {f"base_model.model.{name}.ia3_l" for name in text}
    save_file(
        {n: t for n, t in tensors.items() if n in kept},
        adapter / "adapter_model.safetensors",
        {"format": "pt"},
    )
    assert not plan_merge(folder / "base", [adapter]).problems
    lost = next(name for name in text if "layers.1" in name)
    save_file(
        {n: t for n, t in tensors.items() if n in kept and lost not in n},
        adapter / "adapter_model.safetensors",
        {"format": "pt"},
    )
    problems = plan_merge(folder / "base", [adapter]).problems
    assert len(problems) == 1 and "1 modules" in str(problems[0])
