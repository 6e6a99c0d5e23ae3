"""``GenerationMixin.generate`` with settings of ours alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: Sampling draws from the likeliest tokens that together have this probability.
_TOP_P = 0.95
_NAMES = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def special_ids(model: Any) -> dict[str, Any]:
    """The special tokens of a transformers model: those of its generation configuration, else of its own."""
    own, text = getattr(model, "generation_config", None), model.config.get_text_config()
    return {
        n: getattr(own, n, None) if getattr(own, n, None) is not None else getattr(text, n, None)
        for n in _NAMES
    }


def generate(
    model: Any, inputs: Mapping[str, Any], tokens: int, special: Mapping[str, Any], *, sampled: bool = False
) -> Any:
    """So many `tokens` after `inputs`, the likeliest or `sampled` ones, with the cache, and their logits.

    `special` are the special tokens. None if `model` cannot generate.
    ``GenerationMixin.generate`` itself, because some classes (Whisper) put long-form logic of their own
    before it.
    """
    import torch
    from transformers import GenerationConfig, GenerationMixin

    if not isinstance(model, GenerationMixin) or not model.can_generate():
        return None
    config = GenerationConfig(
        do_sample=sampled,
        top_k=0 if sampled else None,
        top_p=_TOP_P if sampled else None,
        num_beams=1,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        **special,
    )
    try:
        with torch.no_grad(), _only(model, config):
            return GenerationMixin.generate(model, **inputs, generation_config=config)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, AssertionError):
        return None


@contextmanager
def _only(model: Any, config: Any) -> Iterator[None]:
    """Make `config` the model's own in this context.

    generate() fills what is None in it (forced and suppressed tokens, penalties) from there.
    """
    own = model.generation_config
    model.generation_config = copy.deepcopy(config)
    try:
        yield
    finally:
        model.generation_config = own
