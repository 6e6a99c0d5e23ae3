"""Models for the benchmarks.

Real architectures and sizes, random weights, adapters trained by nobody but saved by PEFT.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any


def make_llama(folder: Path, *, shard_size: str = "800MB", small: bool = False) -> tuple[Path, Path]:
    """A 1.1-billion-parameter bf16 Llama with a PEFT IA3 adapter on its default targets.

    The shape of TinyLlama 1.1B: 2.2 GB, three shards. Returns (base, adapter); made once, reused afterwards.
    """
    base, adapter = folder / "llama-1.1b", folder / "llama-1.1b-ia3"
    if (adapter / "adapter_config.json").exists():
        return base, adapter
    import torch
    from peft import IA3Config, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2 if small else 22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(base, max_shard_size=shard_size)
    tuned = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, dtype=torch.float32)
    tuned.save_pretrained(adapter)
    return base, adapter


#: The quantized variants of `make_quantized`, with the arguments of bitsandbytes' writer; W4A16 has another.
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
    "w4a16": {},
}


def make_quantized(folder: Path, kind: str, *, shard_size: str = "800MB") -> Path:
    """The Llama of `make_llama`, which has to be there, quantized by the format's own writer.

    Made once, reused afterwards.

    bitsandbytes through transformers (saved before any forward, which would repack the weights). "w4a16" is
    symmetric 4-bit integers in groups of 128, by llmcompressor, whose environment this has to run in. lm_head
    stays bf16 in all.
    """
    base, quantized = folder / "llama-1.1b", folder / f"llama-1.1b-{kind}"
    if (quantized / "config.json").exists():
        return quantized
    unfinished = quantized.with_name(f"{quantized.name}.part")
    if kind == "w4a16":
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
        from llmcompressor import model_free_ptq

        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*embed_tokens"]
        )
        model_free_ptq(base, unfinished, config=config)
    else:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype="auto",
            quantization_config=BitsAndBytesConfig(**QUANTIZED[kind]),
            device_map="cpu",
        )
        model.save_pretrained(unfinished, max_shard_size=shard_size)
    unfinished.rename(quantized)
    return quantized


def make_in_child(
    folder: Path, kind: str | None = None, *, python: str | Path = sys.executable, small: bool = False
) -> None:
    """`make_llama`, or with a `kind` `make_quantized`, by another process.

    No child of this one can show a smaller peak memory than this one's own, so torch stays out of it.
    """
    words = [str(python), __file__, str(folder), *([] if kind is None else [kind])]
    subprocess.run([*words, *(["--small"] if small else [])], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", nargs="?", choices=QUANTIZED, help="a quantized variant of it")
    parser.add_argument("--small", action="store_true", help="two layers instead of 22, to try a script")
    given = parser.parse_args()
    if given.kind is None:
        print(*make_llama(given.folder, small=given.small))
    else:
        print(make_quantized(given.folder, given.kind))
