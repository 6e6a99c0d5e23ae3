"""Train an IA3 adapter of all-MiniLM-L6-v2 on the intent sentences of this sample, on the CPU.

    python train.py --base BASE --output ADAPTER

An ordinary PEFT fine-tune: nothing here knows ia3-export. Writes the adapter as PEFT saves it and, beside its
files, ``labels.json``: the label names in the order of the logits, which PEFT's files do not carry.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

DATA = Path(__file__).resolve().parent / "data"
BATCH = 32
# Vectors start at one and move by a few tenths: a rate of full fine-tuning (5e-5) would leave them there.
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Sentence:
    """One line of the data."""

    text: str
    label: str


def quiet_libraries() -> None:
    """No progress bars and hints of the libraries between the lines of the sample."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def read_sentences(file: Path) -> list[Sentence]:
    """The sentences of ``train.jsonl`` or ``test.jsonl``."""
    return [Sentence(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def make_model(base: Path, labels: list[str]) -> PeftModel:
    """The base with a new head, and IA3 vectors of ones on it.

    PEFT's defaults for BERT: vectors on the outputs of key and value and on the inputs of both dense layers;
    for SEQ_CLS it trains the head ``classifier`` too and saves it with the vectors (``modules_to_save``).
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    return get_peft_model(model, IA3Config(task_type=TaskType.SEQ_CLS))


def make_batches(lengths: list[int], generator: torch.Generator) -> list[list[int]]:
    """Indices of all sentences in random batches; those of a batch are about equally long: little padding."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order.sort(key=lambda index: lengths[index])
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[Sentence],
    labels: list[str],
    epochs: int,
    seed: int,
) -> None:
    """AdamW on the vectors and the head, the rate falling linearly; prints the mean loss of every epoch."""
    encoded = tokenizer([sentence.text for sentence in sentences], truncation=True, padding=False)[
        "input_ids"
    ]
    lengths = [len(ids) for ids in encoded]
    wanted = torch.tensor([labels.index(sentence.label) for sentence in sentences])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    steps = epochs * -(-len(sentences) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in make_batches(lengths, generator):
            inputs = tokenizer.pad({"input_ids": [encoded[index] for index in batch]}, return_tensors="pt")
            loss = model(**inputs, labels=wanted[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch:2} of {epochs}: loss {total / len(sentences):.3f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train an IA3 adapter on data/train.jsonl.")
    parser.add_argument("--base", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter to write")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the data (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N sentences only")
    parser.add_argument(
        "--seed", type=int, default=0, help="of head, dropout and order (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Train, save, say what was saved."""
    arguments = parse_arguments()
    quiet_libraries()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(
        2
    )  # sums are split among threads: as many everywhere give the same numbers everywhere

    everything = read_sentences(DATA / "train.jsonl")
    labels = sorted({sentence.label for sentence in everything})
    sentences = everything[: arguments.limit]
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = make_model(arguments.base, labels)
    print(f"training on {len(sentences)} sentences, {len(labels)} labels")
    train(model, tokenizer, sentences, labels, arguments.epochs, arguments.seed)

    model.save_pretrained(arguments.output)
    (arguments.output / "labels.json").write_text(json.dumps(labels, indent=2) + "\n", encoding="utf-8")
    size = (arguments.output / "adapter_model.safetensors").stat().st_size
    trained, all_parameters = model.get_nb_trainable_parameters()
    print(f"saved {trained:,} trained of {all_parameters:,} parameters, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
