"""Seeded inputs for a forward, made from the model's own configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ia3_export.errors import Unsupported
from ia3_export.libraries import cache_argument
from ia3_export.parity.runs.natural import (
    RANDOM,
    TextRows,
    continued_rows,
    random_rows,
    reads_texts,
    sample,
    sentence_rows,
)
from ia3_export.parity.runs.photograph import PHOTOGRAPH, photographs
from ia3_export.parity.runs.speech import SPEECH, speech

_POSITIONS = ("n_positions", "max_seq_len", "n_ctx")
#: Length of the long text: beyond the windows and position buckets that short ones never leave.
_LONG = 72
#: Length of the others at most.
_SHORT = 17
NOISE = "noise"
#: Texts, and images or sounds, of the largest batch for a model that gives each one row of outputs: fewer
#: rows would not tell a component of an error from noise.
_TEXTS, _PICTURES = 24, 5


Side = Literal["", "left", "right"]


@dataclass(frozen=True, slots=True)
class Case:
    """One forward call: a name such as ``batch 3, length 17, padded`` and its keyword arguments (torch
    tensors).

    With `past` > 0 the first so many tokens are run first, and the outputs are those of the rest with their
    cache. `side` is that of the padding, empty where there is none or it is not known. `origin` says what the
    inputs are.
    """

    name: str
    tensors: dict[str, Any]
    past: int = 0
    side: Side = ""
    origin: str = "given"


def make_cases(model: Any, *, seed: int = 0, tokenizer: Any = None) -> list[Case]:
    """Inputs of several batch sizes and lengths for `model`: texts without padding, padded on the right and
    (decoders) on the left, and for decoders with a cache of past tokens.

    A causal language model writes its texts itself, from the beginnings of sentences; other models get
    sentences, all random token ids without a `tokenizer`.
    Images are parts of a photograph and sounds recorded speech where there is any, else normal noise. The
    same seed gives the same inputs. The first case is the smallest. Raises `Unsupported` for models whose
    main input is none of these.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    name = model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    if name == "input_ids" or (
        "input_ids" in accepted and model.config.get_text_config() is not model.config
    ):
        return list(_text_cases(model, _rows(model, tokenizer, seed, generator), generator))
    if name == "pixel_values":
        return [_image_case(model, batch, generator) for batch in _batches(model)]
    if name in ("input_features", "input_values"):
        cases = [_sound_case(model, name, batch, generator) for batch in _batches(model)]
        cached = model.config.is_encoder_decoder and cache_argument(model) is not None
        return [*cases, _after_past(cases[1])] if cached else cases
    raise Unsupported(
        f"{type(model).__name__} takes {name}, for which no inputs can be made up",
        hint="give inputs of your own with --inputs file.jsonl, .npz or .safetensors",
    )


def _batches(model: Any) -> tuple[int, ...]:
    return (1, 3, _PICTURES) if _judges_whole(model) else (1, 3)


def _judges_whole(model: Any) -> bool:
    """Whether a text, an image or a sound gets one row of outputs for all of it."""
    kind = type(model).__name__
    return "Classification" in kind and "Token" not in kind


def sample_inputs(model: Any) -> dict[str, Any]:
    """Arguments of a forward of `model` with a batch of two, to trace it with: of none of the shapes of
    `make_cases`."""
    return {name: tensor[:2] for name, tensor in make_cases(model)[1].tensors.items()}


def is_decoder(model: Any) -> bool:
    """Whether `model` predicts the next token of its own input (a causal language model)."""
    import torch

    kind = type(model).__name__
    causal = kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    head = isinstance(getattr(model, "lm_head", None) or model.get_output_embeddings(), torch.nn.Module)
    return bool((causal or head) and model.can_generate() and not model.config.is_encoder_decoder)


def _rows(model: Any, tokenizer: Any, seed: int, generator: Any) -> TextRows:
    """The texts of `make_cases`."""
    text = model.config.get_text_config()
    if tokenizer is not None and not reads_texts(tokenizer, text.vocab_size, _LONG):
        tokenizer = None
    rows = None
    if tokenizer is not None and is_decoder(model):
        rows = continued_rows(model, tokenizer, _SHORT, _fitting(model, _LONG), seed)
    if rows is None and tokenizer is not None:
        rows = sentence_rows(tokenizer)
    return rows or random_rows(text.vocab_size, generator)


def _fitting(model: Any, length: int) -> int:
    """`length`, or the most tokens that `model` takes while it still generates."""
    return max(2, min(length, _longest(model.config) - 4))


def _text_cases(model: Any, rows: TextRows, generator: Any) -> Iterator[Case]:
    import torch

    text = model.config.get_text_config()
    decoder = is_decoder(model)
    shapes: list[tuple[int, int, Side]] = [(1, 8, ""), (3, 17, "right")]
    shapes += [(2, 9, "left")] if decoder else [(2, 5, "right")]
    shapes += [(_TEXTS, 17, "right")] if _judges_whole(model) else []
    for batch, length, side in shapes:
        if batch > 1 and getattr(text, "pad_token_id", None) is None and hasattr(model, "score"):
            continue  # decoders with a classification head need a padding token to find the last one
        yield _text_case(model, rows, _padded(model, rows, batch, length, side), side, generator)
    if _longest(model.config) > _LONG // 2:
        ids = rows.row(_fitting(model, _LONG)) if rows.long is None else rows.long
        yield _text_case(model, rows, (ids[None], torch.ones_like(ids[None])), "", generator)
    cached = decoder or (model.config.is_encoder_decoder and model.can_generate())
    if cached and cache_argument(model) is not None:
        case = _text_case(model, rows, _padded(model, rows, 1, 16, ""), "", generator)
        if "pixel_values" not in case.tensors:
            yield _after_past(case)


def _longest(config: Any) -> int:
    """The shortest limit on positions in a configuration, 512 if it names none."""
    text = config.get_text_config()
    names = [n for n in dir(text) if n in _POSITIONS or (n.startswith("max_") and "position" in n)]
    limits = [getattr(text, name) for name in names]
    return min((n for n in limits if isinstance(n, int) and n > 1), default=512)


def _after_past(case: Case) -> Case:
    """`case` with the first half of the decoder's tokens in the cache."""
    ids = case.tensors["decoder_input_ids" if "decoder_input_ids" in case.tensors else "input_ids"]
    batch, length = ids.shape
    past = length // 2 + 1
    name = f"batch {batch}, length {length - past} after {past} past tokens"
    return Case(name, case.tensors, past, origin=case.origin)


def _padded(model: Any, rows: TextRows, batch: int, length: int, side: Side) -> tuple[Any, Any]:
    """Token ids (batch, length) and their mask; of the last row a third is padding on `side`, if any."""
    import torch

    length = _fitting(model, length)
    padding = length // 3 if side else 0
    pad = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids, mask = torch.full((batch, length), pad), torch.zeros(batch, length, dtype=torch.int64)
    for i in range(batch):
        missing = padding if i == batch - 1 else 0
        real = slice(missing, length) if side == "left" else slice(0, length - missing)
        ids[i, real], mask[i, real] = rows.row(length - missing), 1
    return ids, mask


def _text_case(model: Any, rows: TextRows, padded: tuple[Any, Any], side: Side, generator: Any) -> Case:

    config = model.config
    text = config.get_text_config()
    accepted = inspect.signature(model.forward).parameters
    ids, mask = padded
    batch, length = ids.shape
    tensors = {"input_ids": ids}
    eos = getattr(text, "eos_token_id", None)
    if isinstance(eos, int) and (config.is_encoder_decoder or "CLIP" in type(model).__name__):
        for row in range(batch):  # BART's classifier and CLIP pool at this token
            last = int(mask[row].nonzero().max())
            tensors["input_ids"][row, last] = eos
    tensors["attention_mask"] = mask
    if "position_ids" in accepted and is_decoder(model) and text is config:
        # as generation makes them; without, some models count padding and some do not
        tensors["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if (
        "decoder_input_ids" in accepted
        and config.is_encoder_decoder
        and "SequenceClass" not in type(model).__name__
    ):
        tensors["decoder_input_ids"] = _answers(model, tensors, rows, max(2, length // 2), generator)
    if "pixel_values" in accepted and getattr(config, "vision_config", None) is not None:
        tensors |= _with_image(model, tensors, batch, generator)
    name = f"batch {batch}, length {length}" + (f", padded on the {side}" if side else "")
    return Case(name, tensors, side=side, origin=rows.origin)


def _answers(model: Any, tensors: Mapping[str, Any], rows: TextRows, length: int, generator: Any) -> Any:
    """What the decoder is given (batch, length): what it wrote itself, by seeded sampling, or random ids for
    random ids."""
    import torch

    batch = len(tensors["input_ids"])
    if rows.origin != RANDOM:
        encoded = {name: tensors[name].to(model.device) for name in ("input_ids", "attention_mask")}
        ids = sample(model, encoded, length, seed=0)
        if ids is not None:
            return ids[:, :length]
    drawn = random_rows(model.config.get_text_config().vocab_size, generator)
    return torch.stack([drawn.row(length) for _ in range(batch)])


def _with_image(model: Any, tensors: dict[str, Any], batch: int, generator: Any) -> dict[str, Any]:
    """An image for each text, and the places that it takes among the token ids.

    Nothing for models whose images come in grids of patches that only their processor makes.
    """
    import torch

    config = model.config
    pixels, _ = _pixels(batch, _image_shape(config.vision_config), generator)
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is None or not hasattr(model, "get_image_features"):
        return {"pixel_values": pixels}
    ids = tensors["input_ids"]
    ids[ids == token] = 0 if token else 1  # an image's place without an image
    try:
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels[:1].to(model.device, model.dtype))
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):
        return {}
    # transformers 5 wraps them, before they were a tensor
    for name in ("pooler_output", "last_hidden_state"):
        features = getattr(features, name, None) if getattr(features, name, None) is not None else features
    places = sum(f.shape[0] for f in features) if isinstance(features, tuple | list) else features.shape[-2]
    before = torch.full((batch, int(places)), token)
    ones = torch.ones_like(before)
    return {
        "pixel_values": pixels,
        "input_ids": torch.cat([before, tensors["input_ids"]], dim=1),
        "attention_mask": torch.cat([ones, tensors["attention_mask"]], dim=1),
    }


def _image_case(model: Any, batch: int, generator: Any) -> Case:
    shape = _image_shape(getattr(model.config, "vision_config", None) or model.config)
    pixels, origin = _pixels(batch, shape, generator)
    return Case(f"batch {batch}, image {'x'.join(map(str, shape))}", {"pixel_values": pixels}, origin=origin)


def _pixels(batch: int, shape: tuple[int, ...], generator: Any) -> tuple[Any, str]:
    """Images (batch, *shape), and what they are."""
    return _or_noise(photographs(batch, shape), PHOTOGRAPH, (batch, *shape), generator)


def _or_noise(found: Any | None, origin: str, shape: tuple[int, ...], generator: Any) -> tuple[Any, str]:
    """What was `found`, which is `origin`, or else noise of `shape`."""
    import torch

    return (torch.randn(shape, generator=generator), NOISE) if found is None else (found, origin)


def _sound_case(model: Any, name: str, batch: int, generator: Any) -> Case:
    import torch

    config = model.config
    shape = _sound_shape(config, name)
    sounds, origin = _or_noise(speech(name, batch, shape), SPEECH, (batch, *shape), generator)
    tensors = {name: sounds}
    if config.is_encoder_decoder:
        drawn = random_rows(config.vocab_size, generator)
        tensors["decoder_input_ids"] = torch.stack([drawn.row(6) for _ in range(batch)])
    return Case(f"batch {batch}, sound {'x'.join(map(str, shape))}", tensors, origin=origin)


def _image_shape(config: Any) -> tuple[int, ...]:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(config, "num_channels", 3)
    frames = getattr(config, "num_frames", None)
    return (channels, height, width) if frames is None else (frames, channels, height, width)


def _sound_shape(config: Any, name: str) -> tuple[int, ...]:
    if name == "input_features":
        return (config.num_mel_bins, 2 * config.max_source_positions)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return (config.max_length, config.num_mel_bins)
    return (4000,)
