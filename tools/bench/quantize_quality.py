"""What each precision of an exported model costs and gains on real texts: size, quality, speed.

    python tools/bench/quantize_quality.py --exported exported [--base exported-base] [--files more.onnx ...]
        [--gguf merged-q8_0.gguf ...] [--genai folder ...] [--rounds 5] [--threads 1]

--exported is a folder of ``ia3-export onnx`` with its float32 graph and tokenizer; every graph beside it is
compared with that one, and so are --files, graphs of other tools with the same inputs. --base is the export
of the unmerged base: with it the share of the adapter's effect that is left is printed. --gguf are files of
the same merged model for llama.cpp (needs llama-cpp-python), --genai are folders of onnxruntime-genai.

Decoders: KL divergence (nats a token), top-1 agreement and change of perplexity over all tokens of `TEXTS`;
decoding of 64 tokens after 32, and the forward of 128 tokens, each the median of --rounds that take turns.
Others: the least and the mean cosine of mean-pooled vectors, and the time of a sentence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import make_parser, markdown, positive

from ia3_export.onnx.files import size_of
from ia3_export.onnx.runtime import OnnxModel, call, first_step, next_step, open_model
from ia3_export.parity.runs.metrics import distance_between, effect_present, perplexity

#: What is measured on. Dialogues are laid out by the tokenizer's chat template where it has one.
TEXTS = (
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote the weather "
    "into his book.",
    "Bread needs flour, water, salt and time. Mix them in the evening, and let the dough rest until morning.",
    "In 1969 two people walked on the moon for the first time while a third waited in orbit above them.",
    "A river carries stones from the mountains to the sea; on the way they become pebbles, and then sand.",
    "The train was late again, so we shared a sandwich on the platform and talked about the summer.",
    "Photosynthesis turns light, water and carbon dioxide into sugar, and gives off oxygen as it does so.",
    "She opened the old piano, blew the dust from the keys, and played a waltz that nobody had heard "
    "for years.",
    "To find the average of some numbers, add them all together and divide the sum by how many there are.",
    ("Which ocean is the largest?", "The Pacific Ocean is the largest; it covers a third of the Earth."),
    ("How do I keep a cactus alive?", "Give it a lot of sun, little water, and a pot with a hole."),
    (
        "Why do cats purr?",
        "Cats often purr when they feel safe, but also to calm themselves when they are hurt.",
    ),
    ("What is a prime number?", "A whole number above one that only one and itself divide without a rest."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted it in the early sixteenth century."),
    (
        "How can I sleep better?",
        "Go to bed at the same hour, keep the room dark, and leave the phone outside.",
    ),
    ("What does a compass do?", "Its needle turns until it points to the north, so that you know your way."),
    (
        "Tell me about honey.",
        "Bees make it from nectar. It keeps for years, and it tastes of the flowers around.",
    ),
)
_PROMPT, _NEW, _PREFILL = 32, 64, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; `decode` in tokens a second, `prefill` in milliseconds."""

    name: str
    size: int
    quality: tuple[str, ...]
    decode: float | None = None
    prefill: float | None = None


def main() -> None:
    """Measure and print a Markdown table."""
    parser = make_parser(__doc__)
    parser.add_argument("--exported", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--files", type=Path, nargs="*", default=[])
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--genai", type=Path, nargs="*", default=[])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args()
    reference = options.exported / "onnx" / "model.onnx"
    paths = [reference]
    for path in (*sorted(reference.parent.glob("model*.onnx")), *options.files):
        if not any(path.samefile(other) for other in paths):  # int8 may lie there under two names
            paths.append(path)
    tokens = tokenize(options.exported)
    models = {path.stem: open_model([path], threads=options.threads) for path in paths}
    sizes = {path.stem: size_of(path) for path in paths}
    base = None if options.base is None else open_model([options.base / "onnx" / "model.onnx"])
    if models["model"].cached:
        print_decoders(models, sizes, tokens, base, options)
    else:
        print_encoders(models, sizes, tokens, options.rounds)


def tokenize(folder: Path, texts: Sequence[Any] = TEXTS) -> list[Any]:
    """The ids (1, length) of each text by the tokenizer in `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = []
    for text in texts:
        if isinstance(text, str):
            plain.append(tokenizer(text)["input_ids"])
        elif tokenizer.chat_template:
            turns = [
                {"role": role, "content": said}
                for role, said in zip(("user", "assistant"), text, strict=True)
            ]
            laid_out = tokenizer.apply_chat_template(turns, tokenize=False)
            plain.append(tokenizer(laid_out, add_special_tokens=False)["input_ids"])
        else:
            plain.append(tokenizer(" ".join(text))["input_ids"])
    return [np.array([ids], np.int64) for ids in plain]


def print_decoders(models: Any, sizes: Any, tokens: Any, base: OnnxModel | None, options: Any) -> None:
    """The table of a model that generates."""
    reference = logits_of(models["model"], tokens)
    plain = None if base is None else logits_of(base, tokens)
    decode, prefill = speeds(models, tokens, options.rounds)
    rows = []
    for name, model in models.items():
        quality = quality_of(logits_of(model, tokens), reference, plain, tokens)
        rows.append(
            Row(name=name, size=sizes[name], quality=quality, decode=decode[name], prefill=prefill[name])
        )
    rows += [of_llama_cpp(path, reference, plain, tokens, options) for path in options.gguf]
    rows += [of_genai(folder, reference, plain, tokens, options) for folder in options.genai]
    head = ("file", "MB", "KL", "top-1", "perplexity", "effect", "tokens/s", "128 tokens, ms")
    print(markdown(head, map(cells_of, rows)))


def cells_of(row: Row) -> tuple[str, ...]:
    """A line of the table of decoders."""
    return (row.name, f"{row.size / 1e6:.1f}", *row.quality, _number(row.decode), _number(row.prefill))


def print_encoders(models: Any, sizes: Any, tokens: Any, rounds: int) -> None:
    """The table of a model that encodes."""
    reference = [vector_of(models["model"], ids) for ids in tokens]
    times = take_turns(
        {n: lambda m=m: [vector_of(m, ids) for ids in tokens] for n, m in models.items()}, rounds
    )
    rows = []
    for name, model in models.items():
        cosines = [cosine(vector_of(model, ids), b) for ids, b in zip(tokens, reference, strict=True)]
        figures = (
            f"{min(cosines):.5f}",
            f"{np.mean(cosines):.5f}",
            f"{1000 * times[name] / len(tokens):.1f}",
        )
        rows.append((name, f"{sizes[name] / 1e6:.1f}", *figures))
    print(markdown(("file", "MB", "cosine, least", "mean", "ms a sentence"), rows))


def quality_of(found: Any, reference: Any, plain: Any, tokens: Any) -> tuple[str, ...]:
    """KL, top-1, change of perplexity, and effect."""
    distance = distance_between(found, reference, "float32")
    masks = [None] * len(tokens)
    now, then = (perplexity(outputs, tokens, masks) or 0.0 for outputs in (found, reference))
    effect = None if plain is None else effect_present(found, reference, plain)
    shares = (f"{distance.kl:.4f}", f"{distance.top1:.1%}", f"{now / then - 1:+.1%}")
    return (*shares, "" if effect is None else f"{effect:.3f}")


def logits_of(model: OnnxModel, tokens: Any) -> list[dict[str, Any]]:
    """The logits of each text."""
    return [{"logits": first_step(model, {}, ids).outputs["logits"].numpy()} for ids in tokens]


def vector_of(model: OnnxModel, ids: Any) -> Any:
    """The mean of the last hidden states, or the graph's own sentence vector."""
    outputs = call(model.decoder, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    own = outputs.get("sentence_embedding")
    return own.numpy()[0] if own is not None else next(iter(outputs.values())).numpy()[0].mean(0)


def cosine(a: Any, b: Any) -> float:
    """Of two vectors."""
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def speeds(models: Any, tokens: Any, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens a second of greedy decoding, and milliseconds of a long forward, of each model."""
    run = np.concatenate(tokens, axis=1)

    def decode(model: OnnxModel) -> None:
        step = first_step(model, {}, run[:, :_PROMPT])
        for _ in range(_NEW):
            step = next_step(model, step, step.outputs["logits"].numpy()[:, -1].argmax(-1)[:, None])

    decoding = take_turns({name: lambda m=m: decode(m) for name, m in models.items()}, rounds)
    filling = take_turns(
        {n: lambda m=m: first_step(m, {}, run[:, :_PREFILL]) for n, m in models.items()}, rounds
    )
    return (
        {name: _NEW / seconds for name, seconds in decoding.items()},
        {name: 1000 * seconds for name, seconds in filling.items()},
    )


def take_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each; all run once before they count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def of_llama_cpp(path: Path, reference: Any, plain: Any, tokens: Any, options: Any) -> Row:
    """The same of a GGUF file in llama.cpp."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=512, logits_all=True, n_threads=options.threads, n_threads_batch=options.threads,
        verbose=False,
    )  # fmt: skip
    found = []
    for ids in tokens:
        model.reset()
        model.eval(ids[0].tolist())
        found.append({"logits": np.array(model.scores[None, : ids.shape[1]])})
    run = np.concatenate(tokens, axis=1)[0].tolist()

    def decode() -> None:
        model.reset()
        model.eval(run[:_PROMPT])
        for i in range(_NEW):
            model.eval([int(model.scores[_PROMPT + i - 1].argmax())])

    def prefill() -> None:
        model.reset()
        model.eval(run[:_PREFILL])

    times = take_turns({"decode": decode, "prefill": prefill}, options.rounds)
    return Row(
        name=f"llama.cpp {path.name}",
        size=path.stat().st_size,
        quality=quality_of(found, reference, plain, tokens),
        decode=_NEW / times["decode"],
        prefill=1000 * times["prefill"],
    )


def of_genai(folder: Path, reference: Any, plain: Any, tokens: Any, options: Any) -> Row:
    """The same of a folder of onnxruntime-genai."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def start(ids: Any, length: int) -> Any:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids.astype(np.int32))
        return generator

    found = []
    for ids in tokens:
        generator = start(ids, ids.shape[1] + 1)
        found.append({"logits": np.array(generator.get_output("logits"), np.float32)})
    run = np.concatenate(tokens, axis=1)

    def decode() -> None:
        generator = start(run[:, :_PROMPT], _PROMPT + _NEW + 1)
        for _ in range(_NEW):
            generator.generate_next_token()

    times = take_turns(
        {"decode": decode, "prefill": lambda: start(run[:, :_PREFILL], _PREFILL + 1)}, options.rounds
    )
    return Row(
        name=f"onnxruntime-genai {folder.name}",
        size=sum(file.stat().st_size for file in folder.glob("*.onnx*")),
        quality=quality_of(found, reference, plain, tokens),
        decode=_NEW / times["decode"],
        prefill=1000 * times["prefill"],
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
