"""Tiny models with real tokenizers, their IA3 adapters, and what the unmerged PyTorch model answers.

Every row of `RECIPES` is a model of the zoo with a tokenizer that transformers and tokenizers train and write
here. `write` makes base and adapter on disk and computes the answers by plain forwards of base + live
adapter: greedy tokens without a cache for what generates, outputs for the rest. What a runtime gives for the
exported folder is compared with these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support import zoo

if TYPE_CHECKING:
    from torch import Tensor

NEW_TOKENS = 12
PRECISIONS = ("fp32", "int8", "q8", "int4")
LABELS = {0: "ask", 1: "sing", 2: "sleep"}

# Two greedy candidates this close could change places by rounding, and no runtime would be wrong. float32
# moves the logits of these models, which are of size 5, by less than 1e-5.
_MARGIN = 2e-3

_CORPUS = (
    "the cat sat on the mat and looked at the moon",
    "a small fox jumps over the lazy dog in the garden",
    "we sing a song while the kettle boils and the rain falls",
    "Paris is the capital of France and Rome is the capital of Italy",
    "she wrote a letter to the old man who lives by the sea",
    "how many ships can you see from the top of the hill?",
    "the moon is bright tonight, and nobody wants to sleep!",
    "he asked for bread, water and a song of the north",
)
_SENTENCES = ("the small cat sat by the sea", "how many songs can the old man sing?", "nobody wants to sleep")


@dataclass(frozen=True)
class Recipe:
    """How one exported model comes about."""

    name: str
    task: str
    """optimum's name of the task."""
    kind: str
    """A kind of tests/support/zoo."""
    tokenizer: str | None
    """A tokenizer class of transformers."""
    seed: int = 0
    """Chosen so that greedy text varies and no step is a near tie; `write` asserts both."""
    model_class: str | None = None
    """Instead of the kind's own."""
    task_type: str | None = None
    """PEFT's, instead of the kind's own."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Over the kind's own."""
    inputs: tuple[Any, ...] = _SENTENCES


@dataclass(frozen=True)
class Exported:
    """A folder that ``ia3-export onnx`` wrote, what to ask it, and what the unmerged model answers."""

    name: str
    task: str
    """optimum's name: ``text-generation``, ``text-classification``, ..."""
    folder: Path
    """Graphs in ``onnx/`` in every precision of `PRECISIONS`, configuration and tokenizer beside it."""
    base: Path
    adapter: Path
    inputs: tuple[Any, ...]
    """A text; ``[question, context]``; samples of a waveform at 16 kHz; rows of columns of RGB bytes."""
    input_ids: tuple[tuple[int, ...], ...]
    """The tokens of each input that is text."""
    expected: tuple[Any, ...]
    """An answer to each input by base + live adapter in float32, alone in its batch.

    Tasks that generate: `NEW_TOKENS` greedy token ids, without prompt or decoder prefix. Classifiers: a logit
    a label. token-classification: these for each token. question-answering: start logits and end logits.
    fill-mask: a logit a token of the vocabulary at the mask. feature-extraction: the mean of the last hidden
    states over the tokens.
    """


def _generates(recipe: Recipe) -> bool:
    return "generation" in recipe.task or "text2text" in recipe.task or "speech" in recipe.task


def _wave() -> list[float]:
    """0.6 seconds of noise over a tone, as a microphone's samples."""
    import numpy as np

    rng = np.random.default_rng(3)
    wave = 0.3 * np.sin(np.arange(9600) * 0.1) + 0.1 * rng.standard_normal(9600)
    return [round(float(x), 4) for x in wave]


def _picture() -> list[list[list[int]]]:
    import numpy as np

    image: list[list[list[int]]] = np.random.default_rng(4).integers(0, 256, (16, 16, 3)).tolist()
    return image


#: Enough where other rows show how layers come together.
_ONE_LAYER = {"num_hidden_layers": 1}

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("llama", "text-generation", "llama", "GPT2Tokenizer", config=_ONE_LAYER),
        Recipe("gpt2", "text-generation", "gpt2", "GPT2Tokenizer", seed=18),
        Recipe(
            "t5", "text2text-generation", "t5", "T5Tokenizer", seed=24,
            # with tied or larger embeddings every seed says one token over and over
            config={
                "tie_word_embeddings": False, "initializer_factor": 0.05,
                "num_layers": 1, "num_decoder_layers": 1,
            },
        ),
        Recipe(
            "bart", "text2text-generation", "bart", "BartTokenizer", seed=140,
            config={"forced_eos_token_id": None},
        ),
        Recipe(
            "whisper", "automatic-speech-recognition", "whisper", "WhisperTokenizer", seed=11,
            # one second of audio; the front end needs at least as many mel bands as the real ones have
            config={
                "num_mel_bins": 80, "max_source_positions": 50, "forced_eos_token_id": None,
                "encoder_layers": 1, "decoder_layers": 1,
            },
            inputs=(_wave(),),
        ),
        Recipe("bert", "text-classification", "bert-seq-cls", "BertTokenizer", config={"id2label": LABELS}),
        Recipe(
            "tagger", "token-classification", "bert-seq-cls", "BertTokenizer",
            model_class="BertForTokenClassification", task_type="TOKEN_CLS",
            config={"id2label": LABELS} | _ONE_LAYER,
        ),
        Recipe(
            "reader", "question-answering", "bert-seq-cls", "BertTokenizer",
            model_class="BertForQuestionAnswering", task_type="QUESTION_ANS",
            config={"num_labels": 2} | _ONE_LAYER,
            inputs=(["who lives by the sea?", "the old man lives by the sea and the cat in the garden"],),
        ),
        Recipe(
            "masked", "fill-mask", "bert-masked-lm", "BertTokenizer",
            inputs=("the cat sat on the [MASK]", "[MASK] is the capital of France"),
        ),
        Recipe(
            "sentence", "feature-extraction", "bert-seq-cls", "BertTokenizer",
            model_class="BertModel", task_type="FEATURE_EXTRACTION", config=_ONE_LAYER,
        ),
        Recipe("vit", "image-classification", "vit", None, config={"id2label": LABELS}, inputs=(_picture(),)),
    )
}  # fmt: skip


def write(recipe: Recipe, folder: Path) -> None:
    """Write ``base``, ``adapter`` and ``answers.json`` into `folder`."""
    import torch
    import transformers
    from peft import PeftModel

    base, adapter = folder / "base", folder / "adapter"
    tokenizer = None if recipe.tokenizer is None else _make_tokenizer(recipe.tokenizer)
    kind = _kind(recipe, tokenizer)
    model = zoo.build(kind, seed=recipe.seed)
    _write_side_files(recipe, model, tokenizer, base)
    model.save_pretrained(base)
    zoo.adapt(model, kind).save_pretrained(adapter)

    # eager: the plain formula, whatever kernels this machine has
    load = partial(getattr(transformers, kind.model_class).from_pretrained, base, attn_implementation="eager")
    with torch.no_grad():
        bare = load().eval()
        plain = [answer(recipe, bare, tokenizer, given) for given in recipe.inputs]
        # without PEFT's outer class, which for question answering drops the token types (0.21)
        adapted = PeftModel.from_pretrained(load(), adapter).get_base_model().eval()
        live = [answer(recipe, adapted, tokenizer, given, margin=_MARGIN) for given in recipe.inputs]
    assert all(with_adapter != without for with_adapter, without in zip(live, plain, strict=True))
    if _generates(recipe):
        # a runtime that loses its cache, its positions or the prompt must not pass by repeating itself
        assert all(len(set(tokens)) >= 4 for tokens in live)
        assert len({tuple(tokens) for tokens in live}) == len(live)
        assert not any(model.config.eos_token_id in tokens for tokens in live)
    texts = () if tokenizer is None or "speech" in recipe.task else recipe.inputs
    ids = [_encode(tokenizer, text)["input_ids"][0].tolist() for text in texts]
    (folder / "answers.json").write_text(json.dumps({"input_ids": ids, "expected": live}))


def read(recipe: Recipe, folder: Path) -> Exported:
    """What `write` and the export left in `folder`."""
    answers = json.loads((folder / "answers.json").read_text())
    ids = tuple(tuple(row) for row in answers["input_ids"])
    return Exported(
        recipe.name,
        recipe.task,
        folder / "exported",
        folder / "base",
        folder / "adapter",
        recipe.inputs,
        ids,
        tuple(answers["expected"]),
    )


def answer(recipe: Recipe, model: Any, tokenizer: Any, given: Any, *, margin: float = 0) -> Any:
    """What `model` says to `given`, in the form of `Exported.expected`; `margin` as in `greedy`."""
    import torch

    if "image" in recipe.task:
        pixels = torch.tensor(given, dtype=torch.float32).permute(2, 0, 1)[None]
        return model(pixel_values=(pixels / 255 - 0.5) / 0.5).logits[0].tolist()
    if "speech" in recipe.task:
        features = _feature_extractor()(given, sampling_rate=16000, return_tensors="pt").input_features
        start = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
        return greedy(lambda ids: model(input_features=features, decoder_input_ids=ids).logits, start, margin)
    encoded = _encode(tokenizer, given)
    if "text2text" in recipe.task:
        start = [model.config.decoder_start_token_id]
        return greedy(lambda ids: model(**encoded, decoder_input_ids=ids).logits, start, margin)
    if "generation" in recipe.task:
        return greedy(lambda ids: model(input_ids=ids).logits, encoded["input_ids"][0].tolist(), margin)
    output = model(**encoded)
    if recipe.task == "question-answering":
        return [output.start_logits[0].tolist(), output.end_logits[0].tolist()]
    if recipe.task == "feature-extraction":
        return output.last_hidden_state[0].mean(dim=0).tolist()
    if recipe.task == "fill-mask":
        return output.logits[encoded["input_ids"] == tokenizer.mask_token_id][0].tolist()
    return output.logits[0].tolist()


def greedy(logits: Callable[[Tensor], Tensor], start: Sequence[int], margin: float) -> list[int]:
    """The `NEW_TOKENS` tokens that follow `start`, by a whole forward a token; each must win by `margin`."""
    import torch

    ids = torch.tensor([start])
    for _ in range(NEW_TOKENS):
        best = logits(ids)[0, -1].topk(2)
        assert best.values[0] - best.values[1] >= margin, f"a near tie at {best}: choose another seed"
        ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return [int(token) for token in ids[0, len(start) :]]


def _make_tokenizer(name: str) -> Any:
    """A tokenizer of the class `name`.

    Byte-level ones are trained; the training of the others is not repeatable (hash maps in it), so they get
    all characters of the sentences and every other word.
    """
    import transformers

    make = getattr(transformers, name)
    words = sorted({word for sentence in _CORPUS for word in sentence.lower().rstrip("?!").split()})[::2]
    letters = sorted(set("".join(_CORPUS).lower()) - {" "})
    if name == "BertTokenizer":
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *letters,
            *(f"##{x}" for x in letters),
            *words,
        ]
        return make(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))})
    if name == "T5Tokenizer":
        # log probabilities: a word is likelier than its letters
        scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
        scored += [(letter, -4.0) for letter in letters] + [(f"\u2581{word}", -5.0) for word in words]
        return make(vocab=scored, extra_ids=0)
    tokenizer = make().train_new_from_iterator(_CORPUS, vocab_size=320, show_progress=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if name == "WhisperTokenizer":
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]}
        )
        tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(51)])
    return tokenizer


def _kind(recipe: Recipe, tokenizer: Any) -> zoo.Kind:
    kind = zoo.by_name(recipe.kind)
    config = {**kind.config, **recipe.config}
    if tokenizer is not None:
        config["vocab_size"] = len(tokenizer)
        config["pad_token_id"] = tokenizer.pad_token_id
        config["eos_token_id"] = tokenizer.eos_token_id if tokenizer.eos_token else tokenizer.sep_token_id
        config["bos_token_id"] = tokenizer.bos_token_id if tokenizer.bos_token else tokenizer.cls_token_id
    if recipe.tokenizer == "WhisperTokenizer":
        config["decoder_start_token_id"] = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
        config["begin_suppress_tokens"] = [tokenizer.eos_token_id]
    elif "decoder_start_token_id" in config:
        config["decoder_start_token_id"] = (
            tokenizer.pad_token_id if recipe.kind == "t5" else tokenizer.eos_token_id
        )
    return replace(
        kind,
        config=config,
        model_class=recipe.model_class or kind.model_class,
        task_type=recipe.task_type or kind.task_type,
    )


def _encode(tokenizer: Any, given: Any) -> Any:
    texts = [given] if isinstance(given, str) else given
    return tokenizer(*texts, return_tensors="pt")


def _feature_extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=80, chunk_length=1)


def _write_side_files(recipe: Recipe, model: Any, tokenizer: Any, base: Path) -> None:
    base.mkdir(parents=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(base)
    if recipe.kind == "whisper":
        _feature_extractor().save_pretrained(base)
        model.generation_config.is_multilingual = False
        model.generation_config.no_timestamps_token_id = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    if recipe.kind == "vit":
        # what ViTImageProcessor writes; the class itself needs torchvision, which nothing else here does
        processor = {
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "ViTImageProcessor", "image_std": [0.5, 0.5, 0.5], "resample": 2,
            "rescale_factor": 1 / 255, "size": {"height": 16, "width": 16},
        }  # fmt: skip
        (base / "preprocessor_config.json").write_text(json.dumps(processor))
