"""Token ids that a model would see: sentences of its tokenizer, which a language model continues itself.

On random ids a trained model is not itself: its logits are extreme, 16-bit arithmetic is far off, and the
effect of an adapter is not the one that it was trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from ia3_export.parity.runs.generation import generate, special_ids

RANDOM, SENTENCES, CONTINUED = "random token ids", "sentences", "text that the model wrote (sampled)"

_TEXTS = (
    "The river was low that summer, and the children walked across it on the stones.",
    "How long does it take for light from the sun to reach the earth?",
    "She closed the ledger, counted the coins again and wrote down 41.50 in the margin.",
    "Please send me the report before Thursday; the meeting has been moved to nine o'clock.",
    "A good soup begins with onions, a little butter and more patience than most cooks have.",
    "Der Zug nach Hamburg fährt heute von Gleis sieben und hat zehn Minuten Verspätung.",
    "Water boils at 100 degrees Celsius at sea level, and at less than that in the mountains.",
    "I did not like the film at all: it was loud, far too long, and nobody in it was kind.",
    "El museo abre a las diez y cierra los lunes, pero el jardín está abierto todos los días.",
    "The committee agreed on the budget, although two of its members would have spent less.",
)
_QUESTION = _TEXTS[1]
#: Tokens of a text with which a model begins; the rest is its own.
_BEGINNING = 5
#: Tokens that a model writes in a turn of a chat.
_ANSWER = 24


@dataclass(frozen=True, slots=True, eq=False)
class TextRows:
    """Texts as token ids: `row` gives the next one of a number of tokens, `long` is a longer one if there is
    any. `origin` says where they come from."""

    origin: str
    row: Callable[[int], Any]
    long: Any | None = None


def reads_texts(tokenizer: Any, vocabulary: int, length: int) -> bool:
    """Whether `tokenizer` makes at least `length` ids of the sentences, all of a model of that `vocabulary`.

    That of another model does not, nor one that knows none of the words.
    """
    ids = tokenizer(" ".join(_TEXTS))["input_ids"]
    begun = any(len(tokenizer(text)["input_ids"]) >= _BEGINNING for text in _TEXTS)
    return begun and len(ids) >= length and max(ids) < vocabulary


def random_rows(vocabulary: int, generator: Any) -> TextRows:
    """Random ids of ordinary tokens: both ends of a vocabulary hold special ones nearly everywhere."""
    import torch

    low = min(5, vocabulary - 1)
    high = vocabulary - 3 if vocabulary > 16 else vocabulary
    return TextRows(RANDOM, lambda length: torch.randint(low, high, (length,), generator=generator))


def sentence_rows(tokenizer: Any) -> TextRows:
    """Sentences, cut to length by `tokenizer`, with its special tokens."""
    import torch

    start = cycle(range(len(_TEXTS)))

    def row(length: int) -> Any:
        first = next(start)
        text = " ".join(_TEXTS[first:] + _TEXTS[:first])
        return torch.tensor(tokenizer(text, truncation=True, max_length=length)["input_ids"])

    return TextRows(SENTENCES, row)


def continued_rows(model: Any, tokenizer: Any, short: int, long: int, seed: int) -> TextRows | None:
    """Texts of `short` tokens and one of `long` that `model`, a causal language model, writes by seeded
    sampling: on from the beginnings of sentences, the long one in a turn of a chat where `tokenizer` has a
    template. None if it cannot generate from ids alone.
    """
    import torch

    ids = [tokenizer(text)["input_ids"][:_BEGINNING] for text in _TEXTS]
    beginnings = torch.tensor([row for row in ids if len(row) == _BEGINNING])
    turn = _turn(tokenizer) if tokenizer.chat_template else beginnings[:1]
    rows = _continue(model, beginnings, short, seed)
    whole = _continue(model, turn, max(long, min(turn.shape[1] + _ANSWER, 2 * long)), seed)
    if rows is None or whole is None:
        return None
    following = cycle(rows)
    return TextRows(CONTINUED, lambda length: next(following)[:length], whole[0])


def _continue(model: Any, beginnings: Any, length: int, seed: int) -> Any | None:
    """`beginnings` (rows, tokens) as `model` goes on with them, `length` tokens each."""
    import torch

    missing = length - beginnings.shape[1]
    if missing <= 0:
        return beginnings[:, :length]
    ids = beginnings.to(model.device)
    return sample(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, missing, seed)


def sample(model: Any, inputs: Mapping[str, Any], tokens: int, seed: int) -> Any | None:
    """What `model` answers to `inputs`, sampled: `tokens` more, after those of the decoder (rows, tokens).

    None if it cannot generate from them.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = generate(model, inputs, tokens, special_ids(model), sampled=True)
    return None if out is None else out.sequences.cpu()


def _turn(tokenizer: Any) -> Any:
    messages = [{"role": "user", "content": _QUESTION}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
