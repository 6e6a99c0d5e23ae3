"""The committed checkpoints that real quantizers wrote (tools/fixtures/quantized/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint.folder import read_checkpoint

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "quantized"
#: Checkpoints in safetensors; GGUF files are apart.
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/recipe.json") if "gguf" not in path.parent.name)
GGUF_CASES = sorted(path.parent.name for path in FIXTURES.glob("gguf-*/recipe.json"))


def expected_weights(case: str) -> dict[str, Any]:
    """The float32 weights that the format's own library made of the file, by dense parameter name."""
    with np.load(FIXTURES / case / "expected.npz") as stored:
        return {name: stored[name] for name in stored.files}


#: Target and feed-forward modules by model type, where they are not Llama's.
_TARGETS = {
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_oss": (["k_proj", "v_proj"], []),  # experts are no modules
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
}


def write_adapter(folder: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """An IA3 adapter that PEFT writes for a dense model of the fixture's configuration.

    Keys, values, feed-forward.
    """
    import torch
    import transformers
    from peft import IA3Config, get_peft_model

    from ia3_export.models.model_class import make_config

    torch.manual_seed(seed)
    name = config["architectures"][0]
    model = getattr(transformers, name)(make_config(config))
    targets, feedforward = _TARGETS.get(
        config["model_type"], (["k_proj", "v_proj", "down_proj"], ["down_proj"])
    )
    live = get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=feedforward))
    for key, parameter in live.named_parameters():
        if "ia3_l" in key:
            values = 1 + 0.3 * torch.randn_like(parameter)
            values.view(-1)[::7] *= -1
            parameter.data = values
    live.save_pretrained(folder)
    return folder


def adapter_for(case: str, folder: Path) -> Path:
    """`write_adapter` for a fixture."""
    return write_adapter(folder, dict(read_checkpoint(source_of(case)).config or {}))


def dense_model(folder: Path) -> Any:
    """The checkpoint in `folder`, quantized or not, as a dequantized float64 transformers model."""
    import torch
    import transformers

    from ia3_export.checkpoint.folder import read_checkpoint
    from ia3_export.checkpoint.header import read_values
    from ia3_export.fold import FLOAT_DTYPES
    from ia3_export.models.model_class import make_config
    from ia3_export.quantization.detection import dense_view, find_quantization

    base = read_checkpoint(folder)
    quantization = find_quantization(base)
    assert quantization.problems == ()
    view = dense_view(base, quantization)
    assert view.config is not None
    model = getattr(transformers, view.config["architectures"][0])(make_config(view.config)).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    state = {}
    for name, tensor in view.tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            continue
        state[name.replace("embed_out.", "lm_head.")] = torch.from_numpy(read_values(tensor).astype("<f8"))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "lm_head" not in name], (missing, unexpected)
    model.tie_weights()
    return model.eval()


def logits(model: Any) -> Any:
    """Logits of fixed tokens, float64 numpy."""
    import torch

    tokens = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    with torch.no_grad():
        return model(tokens).logits.double().numpy()


def unmerged_logits(base: Path, adapter: Path) -> Any:
    """Logits of the dequantized base with the adapter live, through PEFT's own forward in float64."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(dense_model(base), adapter).double().eval())


def source_of(case: str) -> Path:
    """What ``--base`` takes for a fixture: its folder, or the GGUF file in it."""
    return next((FIXTURES / case).glob("*.gguf"), FIXTURES / case)


def dequantized(case: str, quantization: Any, name: str) -> Any:
    """A weight of a fixture as ``expected.npz`` has it.

    (out, in), of GGUF files by and in the order of the file.
    """
    from ia3_export.checkpoint.gguf_models import ARCHITECTURES, hugging_face_name

    stored = name
    if case in GGUF_CASES:
        stored = str(hugging_face_name(name, ARCHITECTURES["llama"]))
    packed = quantization.packed[stored]
    values = packed.dense("F32").computed.read(0, int(np.prod(packed.shape))).reshape(packed.shape)
    if "attn_k" in name:  # llama.cpp's own formula (LlamaModel.permute), 32 the head's size
        values = values.reshape(len(values) // 32, 2, 16, -1).swapaxes(1, 2).reshape(values.shape)
    return values.T if packed.conv1d else values


def graph_logits(graph: Path, vocabulary: int) -> np.ndarray:
    """What ONNX Runtime makes of a decoder's `graph` for the tokens of `logits`, float64."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    tokens = np.arange(24).reshape(2, 12) % vocabulary
    feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feeds |= {"position_ids": np.arange(12)[None].repeat(2, 0)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = [
                2 if i == 0 else size if isinstance(size, int) else 0 for i, size in enumerate(value.shape)
            ]
            feeds[value.name] = np.zeros(shape, "f4")
    names = {value.name for value in session.get_inputs()}
    found = session.run(["logits"], {name: value for name, value in feeds.items() if name in names})[0]
    return np.asarray(found, "f8")
