"""Heads of another size that is no number of labels.

The characters of a recogniser of speech, a detector with one row for nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import merge, run

pytestmark = pytest.mark.filterwarnings("ignore")

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPEECH = {
    **_SIZES, "vocab_size": 24, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
}  # fmt: skip
_IMAGE = {**_SIZES, "image_size": [16, 16], "patch_size": 8, "num_detection_tokens": 4, "num_labels": 2}
#: The class, that of the base, its configuration, the head, what the adapter has otherwise, and an input.
CASES = {
    "speech": ("Wav2Vec2ForCTC", "Wav2Vec2ForCTC", _SPEECH, "lm_head", {"vocab_size": 30},
               ("input_values", (2, 600))),
    "speech-bare": ("HubertForCTC", "HubertModel", _SPEECH, "lm_head", {"vocab_size": 20},
                    ("input_values", (2, 600))),
    "detector": (
        "YolosForObjectDetection", "YolosForObjectDetection", _IMAGE, "class_labels_classifier",
        {"num_labels": 4},
        ("pixel_values", (2, 3, 16, 16)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_merged_and_verified_as_trained(tmp_path: Path, name: str) -> None:
    import torch
    import transformers
    from peft import IA3Config, get_peft_model

    class_name, base_class, config, head, otherwise, (argument, shape) = CASES[name]
    torch.manual_seed(0)
    cls: Any = getattr(transformers, class_name)
    kind: Any = getattr(transformers, base_class)
    kind(cls.config_class(**config)).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base", ignore_mismatched_sizes=True, **otherwise)
    settings: Any = IA3Config(
        target_modules=r".*\.(k_proj|key)", feedforward_modules=[], modules_to_save=[head]
    )
    live = get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    live.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", "-q")
    merged = cls.from_pretrained(tmp_path / "merged").eval()
    inputs = {argument: torch.randn(shape)}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, live(**inputs).logits, rtol=1e-4, atol=1e-5)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    found = {"vocab_size": written.get("vocab_size"), "num_labels": len(written.get("id2label", ()))}
    assert otherwise.items() <= found.items()
    words = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    ran = run("verify", *words, "--merged", tmp_path / "merged")
    assert ran.code == 0 and "applied by peft" in ran.stdout, ran
