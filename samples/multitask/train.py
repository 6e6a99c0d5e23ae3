"""Train three IA3 adapters of all-MiniLM-L6-v2 on the messages of this sample, one a task, on the CPU.

    python train.py --base BASE --output FOLDER

Writes FOLDER/topic, FOLDER/emotion and FOLDER/request as PEFT saves adapters, each with its ``labels.json``.
The training itself is that of the sample ``minilm_intent``; nothing here knows ia3-export.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from intent import HERE, TASKS, load
from transformers import AutoTokenizer

intent = load("train")


def train_task(task: str, arguments: argparse.Namespace) -> None:
    """Train and save the adapter of a task, and print how many of its test messages it gets right."""
    torch.manual_seed(arguments.seed)
    everything = intent.read_sentences(HERE / "data" / f"{task}_train.jsonl")
    labels = sorted({sentence.label for sentence in everything})
    messages = everything[: arguments.limit]
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = intent.make_model(arguments.base, labels)
    print(f"{task}: training on {len(messages)} messages, labels {', '.join(labels)}")
    intent.train(model, tokenizer, messages, labels, arguments.epochs, arguments.seed)

    output = arguments.output / task
    model.save_pretrained(output)
    (output / "labels.json").write_text(json.dumps(labels, indent=2) + "\n", encoding="utf-8")
    tests = intent.read_sentences(HERE / "data" / f"{task}_test.jsonl")
    model.eval()
    with torch.inference_mode():
        inputs = tokenizer([message.text for message in tests], padding=True, return_tensors="pt")
        answers = model(**inputs).logits.argmax(-1).tolist()
    right = sum(labels[answer] == message.label for answer, message in zip(answers, tests, strict=True))
    size = (output / "adapter_model.safetensors").stat().st_size
    print(f"{task}: {right} of {len(tests)} test messages right ({right / len(tests):.1%}), {size:,} bytes\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train an IA3 adapter for each task in data/.")
    parser.add_argument("--base", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapters to write")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the data (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N messages of a task only")
    parser.add_argument(
        "--seed", type=int, default=0, help="of heads, dropout and order (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """One adapter after the other."""
    arguments = parse_arguments()
    intent.quiet_libraries()
    # sums are split among threads: as many everywhere give the same numbers everywhere
    torch.set_num_threads(1)
    for task in TASKS:
        train_task(task, arguments)


if __name__ == "__main__":
    main()
