"""Ask the unmerged model and everything that was made of it the held-out questions, and lay the answers side
by side.

    cd samples/pocket_chat/run
    python ../compare.py

Greedy, so that equal models give equal answers. Writes ``answers.md``, and ``unmerged.json`` for look.py.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from base import load_gguf
from train import DATA, quiet_libraries, read_dialogues
from transformers import AutoTokenizer

NEW_TOKENS = 48
# what a ship's cat talks about and a helpful assistant does not
VOICE = re.compile(
    r"\b(sea|sailors?|ship|deck|captain|cook|galley|stove|tide|gulls?|fish|herring|cats?|rats?|whiskers?|mog)\b",
    re.I,
)

# ids of a prompt -> ids of the answer, without the one that ended it
Ask = Callable[[list[int]], list[int]]


@dataclass(frozen=True)
class Answers:
    """What one form of the model said, and how fast."""

    name: str
    texts: list[str]
    tokens_per_second: float


def in_pytorch(folder: Path, end: int, adapter: Path | None = None) -> Ask:
    """A model in float32, with the adapter live on it (PEFT) if there is one; GGUF files as what they stand
    for."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    gguf = next(folder.glob("*.gguf"), None)
    if gguf is None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = load_gguf(gguf, torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()

    def ask(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=end,
            )
        return without_end(found[0, len(prompt) :].tolist(), end)

    return ask


def onnx_runtime(graph: Path, end: int) -> Ask:
    """An exported graph: the prompt with an empty cache, then a token at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    empty = {
        node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past_key_values")
    }

    def ask(prompt: list[int]) -> list[int]:
        past, new, answer = empty, prompt, []
        while len(answer) < NEW_TOKENS:
            length = len(prompt) + len(answer)
            logits, *present = session.run(
                None,
                {
                    "input_ids": np.array([new]),
                    "attention_mask": np.ones((1, length), np.int64),
                    "position_ids": np.arange(length - len(new), length)[None],
                    **past,
                },
            )
            new = [int(logits[0, -1].argmax())]
            if new == [end]:
                break
            answer += new
            past = dict(zip(empty, present, strict=True))
        return answer

    return ask


def genai(folder: Path, end: int) -> Ask:
    """An exported folder in onnxruntime-genai, as its documentation runs one."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def ask(prompt: list[int]) -> list[int]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return without_end([int(token) for token in generator.get_sequence(0)[len(prompt) :]], end)

    return ask


def llama_cpp(file: Path, end: int) -> Ask:
    """A merged GGUF file in llama.cpp."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.verbosity = 2048, -1
    server = xllamacpp.Server(parameters)

    def ask(prompt: list[int]) -> list[int]:
        # with the probabilities come the ids
        wishes = {"prompt": prompt, "max_tokens": NEW_TOKENS, "top_k": 1, "logprobs": 1}
        [said] = server.handle_completions(wishes)["choices"]
        return without_end([token["id"] for token in said["logprobs"]["content"]], end)

    return ask


def without_end(tokens: list[int], end: int) -> list[int]:
    """`tokens` up to the one that ends an answer."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def forms(work: Path, end: int) -> Iterator[tuple[str, Callable[[], Ask]]]:
    """Every form of the model, and how to load it."""
    exported, gguf = work / "exported" / "Mog", work / "merged-gguf"
    yield "base, no adapter (transformers)", lambda: in_pytorch(work / "base", end)
    yield "base + adapter, unmerged (PEFT)", lambda: in_pytorch(work / "base", end, work / "adapter")
    yield "merged (transformers)", lambda: in_pytorch(work / "merged", end)
    graphs = sorted((exported / "onnx").glob("*.onnx"))
    for number, graph in enumerate(graphs):
        # int8 lies there under two names, unless q8 has the other
        if not any(graph.samefile(other) for other in graphs[:number]):
            yield f"{graph.name} (ONNX Runtime)", lambda graph=graph: onnx_runtime(graph, end)
    yield "model.onnx (onnxruntime-genai)", lambda: genai(exported, end)
    yield "merged GGUF, dequantized (transformers)", lambda: in_pytorch(gguf, end)
    yield "merged GGUF (llama.cpp)", lambda: llama_cpp(next(gguf.glob("*.gguf")), end)


def ask_all(name: str, ask: Ask, prompts: list[list[int]], tokenizer: Any) -> Answers:
    """The answers to all prompts; the first is asked once more, unmeasured, to warm up."""
    ask(prompts[0])
    start = time.perf_counter()
    answers = [ask(prompt) for prompt in prompts]
    seconds = time.perf_counter() - start
    return Answers(
        name,
        [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers],
        sum(map(len, answers)) / seconds,
    )


def summary(answers: Answers, reference: Answers) -> list[str]:
    """A row of the table: form, answers equal to the reference's, answers in the cat's voice, words,
    speed."""
    same = sum(mine == theirs for mine, theirs in zip(answers.texts, reference.texts, strict=True))
    voice = sum(VOICE.search(text) is not None for text in answers.texts)
    words = sum(len(text.split()) for text in answers.texts) / len(answers.texts)
    count = len(answers.texts)
    return [
        answers.name,
        f"{same}/{count}",
        f"{voice}/{count}",
        f"{words:.0f}",
        f"{answers.tokens_per_second:.0f}",
    ]


def write_markdown(file: Path, questions: list[str], answers: list[Answers], table: list[list[str]]) -> None:
    """The table, and under every question what was answered; forms with one answer share a line."""
    header, *rows = table
    lines = [
        "# Held-out questions",
        "",
        f'Greedy, at most {NEW_TOKENS} tokens. "same" counts answers equal, word for word, to those of the '
        "unmerged model.",
        "",
        f"| {' | '.join(header)} |",
        f"| --- |{' ---: |' * (len(header) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    for number, question in enumerate(questions):
        lines += ["", f"## {question}", ""]
        said: dict[str, list[str]] = {}
        for form in answers:
            said.setdefault(" ".join(form.texts[number].split()), []).append(form.name)
        lines += [f"- **{', '.join(names)}**: {text}" for text, names in said.items()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def show(table: list[list[str]]) -> None:
    """The table on the terminal: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *numbers in table:
        cells = [name.ljust(widths[0])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join(cells))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the answers of unmerged model and artifacts.")
    parser.add_argument(
        "--work", type=Path, default=Path(), help="where run.py worked (default: this folder)"
    )
    return parser.parse_args()


def main() -> None:
    """Ask, show the table, write the answers down."""
    work: Path = parse_arguments().work
    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    questions = read_dialogues(DATA / "held_out.jsonl")
    prompts = [
        tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        for question in questions
    ]
    answers = []
    for name, load in forms(work, tokenizer.eos_token_id):
        try:
            ask = load()
        except ImportError as missing:
            print(f"{name}: skipped, {missing.name} is not installed", flush=True)
            continue
        answers.append(ask_all(name, ask, prompts, tokenizer))
        print(f"{name}: {answers[-1].texts[0]}", flush=True)

    reference = answers[1]
    table = [["answered by", "same", "in voice", "words", "tokens/s"]]
    table += [summary(form, reference) for form in answers]
    print()
    show(table)
    texts = [question[-1]["content"] for question in questions]
    unmerged = dict(zip(texts, reference.texts, strict=True))
    (work / "unmerged.json").write_text(json.dumps(unmerged, indent=1), encoding="utf-8")
    write_markdown(work / "answers.md", texts, answers, table)


if __name__ == "__main__":
    main()
