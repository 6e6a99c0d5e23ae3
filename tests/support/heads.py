"""Tiny models with own heads, embeddings or vocabulary, adapted and saved by transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.support import zoo

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 80, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {**_SIZES, "bos_token_id": 1, "eos_token_id": 2}
BERT = dict(_SIZES)
LLAMA = {**ENCODER, "num_key_value_heads": 2}
TIED = {**LLAMA, "tie_word_embeddings": True}
BART = {
    **_TOKENS, "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 80,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}


def merging(folder: Path) -> tuple[str | Path, ...]:
    """The words of a merge of what `Trained.write` saved, into ``merged``."""
    return "merge", "--base", folder / "base", "--adapter", folder / "adapter", "--output", folder / "merged"


@dataclass(frozen=True)
class Trained:
    """An adapter of `model_class`: vectors on outputs of `targets`, copies of `save` (``modules_to_save``).

    The base is of `base_class` where it is another; the adapter has `labels` or a `vocabulary` of another
    size where they are given.
    """

    name: str
    model_class: str
    config: Mapping[str, Any]
    targets: Sequence[str] | str
    save: Sequence[str] | None = None
    task_type: str | None = None
    base_class: str | None = None
    labels: int | None = None
    vocabulary: int | None = None
    base_config: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Save ``base`` and ``adapter`` into `folder`, and the live model's logits into ``expected.pt``."""
        import torch
        import transformers
        from peft import IA3Config, get_peft_model

        base_class = self.base_class or self.model_class
        config_class = getattr(transformers, base_class).config_class.__name__
        kind = zoo.Kind(self.name, base_class, config_class, {**self.config, **self.base_config})
        model: Any = zoo.build(kind)
        if getattr(model.config, "tie_word_embeddings", False):
            model.tie_weights()
        model.save_pretrained(folder / "base")
        wanted: Any = (
            {} if self.labels is None else {"num_labels": self.labels, "ignore_mismatched_sizes": True}
        )
        model = getattr(transformers, self.model_class).from_pretrained(folder / "base", **wanted)
        if self.vocabulary is not None:
            model.resize_token_embeddings(self.vocabulary)
        settings: Any = IA3Config(
            task_type=self.task_type,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            feedforward_modules=[],
            modules_to_save=None if self.save is None else list(self.save),
        )
        live = get_peft_model(model, settings)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                if ".ia3_l." in name:
                    parameter.copy_(1 + noise)
                elif ".modules_to_save." in name:
                    parameter.add_(noise)
        live.eval()
        live.save_pretrained(folder / "adapter")
        torch.save(_logits(live, self.vocabulary or 64), folder / "expected.pt")
        return folder

    def error(self, folder: Path) -> float:
        """How far ``merged`` is from the live model, relative to its largest logit.

        It must load without a word.
        """
        import torch
        import transformers

        found = getattr(transformers, self.model_class).from_pretrained(
            folder / "merged", output_loading_info=True
        )
        model, report = found
        # the causal head that the base had under a classifier stays in the file
        assert not any(set(value) - {"lm_head.weight"} for value in report.values()), report
        expected = torch.load(folder / "expected.pt")
        return float(
            (_logits(model.eval(), self.vocabulary or 64) - expected).abs().max() / expected.abs().max()
        )


def _logits(model: Any, vocabulary: int) -> Any:
    import torch

    ids = torch.randint(3, min(vocabulary, 64), (2, 9), generator=torch.Generator().manual_seed(2))
    ids[0, 4] = vocabulary - 1
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model(input_ids=ids, **more)
    return getattr(output, "logits", None) if hasattr(output, "logits") else output.start_logits


def drop(folder: Path, *names: str) -> Path:
    """Take the tensors whose names in the model contain one of `names` out of ``adapter``."""
    from safetensors.numpy import load_file, save_file

    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {key: value for key, value in tensors.items() if not any(name in key for name in names)}
    assert len(kept) < len(tensors), f"none of {names} is in {sorted(tensors)}"
    save_file(kept, file, {"format": "pt"})
    return folder


def vary(case: Trained, **changes: Any) -> Trained:
    """`case` with other fields."""
    return replace(case, **changes)


def changes(folder: Path) -> dict[str, str]:
    """What the manifest of ``merged`` says of changed tensors: name and how."""
    manifest = json.loads((folder / "merged" / "ia3_export.json").read_text())
    return {change["tensor"]: change["how"] for change in manifest["changes"]}
