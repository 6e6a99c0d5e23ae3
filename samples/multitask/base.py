"""Give all-MiniLM-L6-v2 a head of four labels that nothing has trained: what is deployed before any task.

    python base.py --base BASE --output FOLDER

Each adapter brings a trained head of this shape. A graph of the base needs one too, to be a graph of the same
class, and it can be any: it is replaced.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from intent import TASKS, load
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LABELS = 4


def main() -> None:
    """Load, add the head, save with the tokenizer."""
    parser = argparse.ArgumentParser(description="Save the base as a classifier with a new head.")
    parser.add_argument("--base", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    load("train").quiet_libraries()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.base, num_labels=LABELS)
    # transformers begins with zeros, and a tracer leaves out what adds nothing
    torch.nn.init.normal_(model.classifier.bias, std=model.config.initializer_range)
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.base).save_pretrained(arguments.output)
    size = (arguments.output / "model.safetensors").stat().st_size
    print(f"{size:,} bytes, with a head of {LABELS} labels that the tasks {', '.join(TASKS)} replace")


if __name__ == "__main__":
    main()
