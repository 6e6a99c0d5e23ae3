"""Models for the benchmarks: real architectures and sizes, random weights, adapters trained by nobody but saved by PEFT."""

from __future__ import annotations

import argparse
from pathlib import Path


def make_llama(folder: Path, *, shard_size: str = "800MB", small: bool = False) -> tuple[Path, Path]:
    """A 1.1-billion-parameter bf16 Llama (the shape of TinyLlama 1.1B: 2.2 GB, three shards) with a PEFT IA3 adapter
    on its default targets. Returns (base, adapter); made once, reused afterwards."""
    base, adapter = folder / "llama-1.1b", folder / "llama-1.1b-ia3"
    if (adapter / "adapter_config.json").exists():
        return base, adapter
    import torch
    from peft import IA3Config, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2 if small else 22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(base, max_shard_size=shard_size)
    tuned = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, dtype=torch.float32)
    tuned.save_pretrained(adapter)
    return base, adapter


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(*make_llama(parser.parse_args().folder))
