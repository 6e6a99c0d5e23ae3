"""The main job for one model of each family, through the CLI.

What CI runs with the newest and the oldest admitted releases too.

Every comparison is of this file: base + PEFT's live adapter on the one side, the written files on the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.command import run
from tests.support import zoo

pytestmark = [pytest.mark.versions, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

#: A kind of each family, and the dtype that it is stored in.
FAMILIES = {
    "llama": "bfloat16",
    "gpt2": "float16",
    "olmoe": "float32",
    "bert-seq-cls": "float32",
    "roberta-seq-cls": "float32",
    "t5": "float32",
    "whisper": "float32",
    "vit": "float32",
    "wav2vec2": "float32",
}


def _inputs(model: Any) -> dict[str, Any]:
    import torch

    noise = torch.Generator().manual_seed(5)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=noise)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn((2, 4000), generator=noise)}
    ids = torch.randint(5, 100, (2, 9), generator=noise)
    if model.main_input_name == "input_features":
        size = (2, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(size, generator=noise), "decoder_input_ids": ids}
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _output(model: Any, inputs: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        return model.float().eval()(**inputs)[0].numpy()


def _graph(folder: Path, inputs: dict[str, Any]) -> Any:
    """The first output of the exported graphs, with an empty cache."""
    import onnxruntime

    feeds = {name: value.numpy() for name, value in inputs.items()}
    names = (
        ("encoder_model", "decoder_model_merged")
        if (folder / "onnx/encoder_model.onnx").exists()
        else ("model",)
    )
    for name in names:
        session = onnxruntime.InferenceSession(
            str(folder / f"onnx/{name}.onnx"), providers=["CPUExecutionProvider"]
        )
        wanted = {port.name: port.shape for port in session.get_inputs()}
        ids = feeds.get("input_ids")
        if ids is not None and name != "decoder_model_merged":
            ones = np.ones_like(ids)
            feeds |= {"attention_mask": ones, "encoder_attention_mask": ones, "token_type_ids": 0 * ones}
            feeds["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        feeds |= {
            port: np.zeros(
                [2 if axis == "batch_size" else axis if isinstance(axis, int) else 0 for axis in shape], "f4"
            )
            for port, shape in wanted.items()
            if port.startswith("past_key_values.")
        }
        (output, *_) = session.run(None, {port: feeds[port] for port in wanted})
        feeds |= {"encoder_hidden_states": output, "input_ids": feeds.get("decoder_input_ids", ids)}
    return output


@pytest.mark.parametrize("name", FAMILIES)
def test_merge_verify_and_onnx_give_what_peft_computes_live(name: str, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    kind = zoo.by_name(name)
    model = zoo.build(kind, dtype=FAMILIES[name])
    model.save_pretrained(tmp_path / "base")
    zoo.adapt(model, kind).save_pretrained(tmp_path / "adapter")
    sources = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    for command in (
        ("inspect", tmp_path / "adapter", "--base", tmp_path / "base"),
        ("merge", *sources, "--output", tmp_path / "merged"),
        ("verify", *sources, "--merged", tmp_path / "merged"),
        (
            "onnx",
            "--model",
            tmp_path / "merged",
            "--output",
            tmp_path / "exported",
            "--precision",
            "fp32,int8",
        ),
    ):
        ran = run(*command)
        assert ran.code == 0, ran.stdout + ran.stderr
    cls = getattr(transformers, kind.model_class)
    base = cls.from_pretrained(tmp_path / "base")
    inputs = _inputs(base)
    plain = _output(base, inputs)
    live = _output(PeftModel.from_pretrained(base.float(), tmp_path / "adapter").get_base_model(), inputs)
    size, effect = np.abs(live).max(), np.abs(live - plain).max()
    merged = _output(cls.from_pretrained(tmp_path / "merged"), inputs)
    rounded = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 5e-2}[FAMILIES[name]]
    assert effect > 4 * rounded * size, "the adapter has no effect here, nothing is shown"
    assert np.abs(merged - live).max() <= rounded * size
    # the graph holds the merged weights in float32
    assert np.abs(_graph(tmp_path / "exported", inputs) - merged).max() <= 3e-5 * size
