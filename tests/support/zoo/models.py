"""Building a row of the zoo: its base model, its adapter, and something to feed them."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import TYPE_CHECKING, Any

from tests.support.zoo.kind import Kind

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


def build(kind: Kind, *, dtype: str = "float32", seed: int = 0) -> PreTrainedModel:
    """Return the base model of a kind, seeded and in eval mode.

    Fresh models have zero biases, unit norms and weights so small that a wrong fold hides below the
    tolerance, so noise goes onto every parameter and onto the running statistics of batch norms.  Another
    ``dtype`` holds the rounded values of float32.
    """
    import torch

    model = _fresh(kind, "float32", seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # else a sinusoidal table, which loading computes anew
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
                parameter.add_(noise(parameter) * fan_in**-0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.2 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(0.25 + 0.5 * torch.rand(buffer.shape, generator=generator))
            elif name.endswith(("normalization.weight", "normalization.bias")):  # frozen batch norm
                buffer.add_(0.2 * noise(buffer))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                # as trained models have it; loading a Funnel zeroes this row whatever the file says
                module.weight[module.padding_idx] = 0
    if dtype != "float32":
        # Not Module.to: it would cast what from_pretrained keeps, such as rotary frequencies.
        rounded = _fresh(kind, dtype, seed)
        rounded.load_state_dict(model.state_dict())
        model = rounded
    model.eval()
    built: PreTrainedModel = model
    return built


def _fresh(kind: Kind, dtype: str, seed: int) -> Any:
    """Construct the model as from_pretrained does, with ``dtype`` as torch's default."""
    import torch
    import transformers

    config = getattr(transformers, kind.config_class)(**copy.deepcopy(dict(kind.config)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(transformers, kind.model_class)(config)
    finally:
        torch.set_default_dtype(before)


def adapt(model: PreTrainedModel, kind: Kind, *, seed: int = 1) -> PeftModel:
    """Put a seeded IA3 adapter on the model (in place, as PEFT does), as if it had been trained.

    The vectors are normal around 1 with standard deviation 0.3, a tenth of the values negated.  A head that
    PEFT keeps in ``modules_to_save`` moves away from the base's head too.
    """
    import torch
    from peft import IA3Config, get_peft_model

    config = IA3Config(
        task_type=kind.task_type,
        target_modules=None if kind.targets is None else list(kind.targets),
        feedforward_modules=None if kind.feedforward is None else list(kind.feedforward),
        init_ia3_weights=True,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT corrects it itself
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".ia3_l." in name:
                values = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
                negated = torch.rand(parameter.shape, generator=generator) < 0.1
                parameter.copy_(torch.where(negated, -values, values))
            elif ".modules_to_save." in name:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    adapted.eval()
    return adapted


def example_inputs(model: Module, *, batch: int = 2, length: int = 7, seed: int = 2) -> dict[str, Tensor]:
    """Return seeded forward inputs for a model of the zoo, bare or wrapped by PEFT.

    What to feed is told by the config and by the signature of ``forward``; one model can take several
    modalities.  An image in a text takes places of its own before the ``length`` text tokens.
    """
    import torch

    outer: Any = model
    base = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    config = base.config
    accepted = inspect.signature(base.forward).parameters
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(base.dtype)

    def tokens(count: int) -> Tensor:
        text_config = config.get_text_config()
        # both ends of the vocabulary hold special tokens
        ids = torch.randint(5, text_config.vocab_size - 3, (batch, count), generator=generator)
        eos = getattr(text_config, "eos_token_id", None)
        if eos is not None:  # CLIP and BART's classifier pool at this token
            ids[:, -1] = eos
        return ids

    if "input_features" in accepted:  # whisper
        inputs = {"input_features": floats(batch, config.num_mel_bins, 2 * config.max_source_positions)}
    elif "input_values" in accepted and hasattr(config, "num_mel_bins"):  # spectrograms
        inputs = {"input_values": floats(batch, config.max_length, config.num_mel_bins)}
    elif "input_values" in accepted:  # raw speech
        inputs = {"input_values": floats(batch, 60 * length)}
    else:
        inputs = {}
    if "pixel_values" in accepted:
        vision = getattr(config, "vision_config", None) or config
        height, width = _image_size(vision)
        frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
        inputs["pixel_values"] = floats(batch, *frames, vision.num_channels, height, width)
    if "input_ids" in accepted:
        inputs["input_ids"] = tokens(length)
        image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        if image_token is not None:
            places = torch.full((batch, _image_tokens(config.vision_config)), image_token)
            inputs["input_ids"] = torch.cat([places, inputs["input_ids"]], dim=1)
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "decoder_input_ids" in accepted and not type(base).__name__.endswith("ForSequenceClassification"):
        inputs["decoder_input_ids"] = tokens(length)
    return inputs


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", 32)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _image_tokens(config: Any) -> int:
    """How many places of the text one image takes."""
    height, width = _image_size(config)
    patches = (height // config.patch_size) * (width // config.patch_size)
    return int(patches * getattr(config, "pixel_shuffle_ratio", 1) ** 2)
