"""Ask all four forms of the model for the intents of the test sentences and compare their answers.

    cd samples/minilm_intent/run
    python ../evaluate.py

Exit code 1 when the unmerged model, the merged one and the ONNX file do not agree on every sentence.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from predict import Classifier
from train import BATCH, DATA, Sentence, quiet_libraries, read_sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

EXAMPLES = [
    "wake me at quarter to six please",
    "how long do the eggs still need",
    "can you move the dentist to thursday afternoon",
    "umbrella or sunglasses today?",
    "tell mum the train is late again",
    "we are out of olive oil",
    "it is far too bright in the bedroom",
    "what is the danish word for cheers",
]


def ask_torch(model: Any, folder: Path, texts: list[str], labels: list[str]) -> list[str]:
    """The labels that a PyTorch classifier gives to `texts`, with the tokenizer in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    numbers: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            inputs = tokenizer(
                texts[start : start + BATCH], truncation=True, padding=True, return_tensors="pt"
            )
            numbers += model(**inputs).logits.argmax(dim=-1).tolist()
    return [labels[number] for number in numbers]


def random_head(base: Path, labels: list[str]) -> Any:
    """The base before any training: the head's weights are random."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))


def unmerged(base: Path, adapter: Path, labels: list[str], *, vectors: bool = True) -> PeftModel:
    """The base with the adapter live on it, as PEFT loads it; without `vectors`, only its trained head."""
    model = PeftModel.from_pretrained(random_head(base, labels), adapter)
    if not vectors:
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.data.fill_(1.0)
    return model


def show_accuracy(answers: dict[tuple[str, str], list[str]], sentences: list[Sentence]) -> None:
    """The table."""
    print(f"{'model':34} {'computed by':22} {'right':>7} {'accuracy':>9}")
    for (name, engine), given in answers.items():
        right = sum(label == sentence.label for label, sentence in zip(given, sentences, strict=True))
        share = f"{right / len(sentences):.1%}"
        print(f"{name:34} {engine:22} {right:3}/{len(sentences)} {share:>9}")


def show_disagreements(forms: dict[str, list[str]], texts: list[str]) -> int:
    """Every sentence that the `forms` of the model do not answer alike; returns how many there are."""
    count = 0
    for text, *given in zip(texts, *forms.values(), strict=True):
        if len(set(given)) > 1:
            count += 1
            print(
                f"  {text!r}: "
                + ", ".join(f"{form} {label}" for form, label in zip(forms, given, strict=True))
            )
    return count


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare base, unmerged, merged and exported model.")
    parser.add_argument(
        "--work", type=Path, default=Path(), help="where run.py worked (default: this folder)"
    )
    return parser.parse_args()


def main() -> None:
    """Table, comparison, examples."""
    work: Path = parse_arguments().work
    quiet_libraries()
    base, adapter, merged, exported = (work / name for name in ("base", "adapter", "merged", "exported"))
    labels: list[str] = json.loads((adapter / "labels.json").read_text(encoding="utf-8"))
    sentences = read_sentences(DATA / "test.jsonl")
    texts = [sentence.text for sentence in sentences]
    classifier = Classifier(exported, adapter / "labels.json")

    before = ask_torch(random_head(base, labels), base, texts, labels)
    head = ask_torch(unmerged(base, adapter, labels, vectors=False), base, texts, labels)
    live = ask_torch(unmerged(base, adapter, labels), base, texts, labels)
    loaded = AutoModelForSequenceClassification.from_pretrained(merged)
    folded = ask_torch(loaded, merged, texts, labels)
    onnx = [label for label, _ in classifier.predict(texts)]

    answers = {
        ("base, random head", "transformers"): before,
        ("base, trained head, no vectors", "transformers"): head,
        ("base + adapter, unmerged", "transformers + PEFT"): live,
        ("merged", "transformers"): folded,
        ("ONNX", "ONNX Runtime"): onnx,
    }
    show_accuracy(answers, sentences)
    print()
    forms = {"unmerged": live, "merged": folded, "ONNX": onnx}
    differing = show_disagreements(forms, texts)
    if differing:
        sys.exit(
            f"error: unmerged, merged and ONNX give different labels for {differing} of "
            f"{len(texts)} sentences"
        )
    print(f"unmerged, merged and ONNX give the same label to each of the {len(texts)} sentences")

    print("\nSentences that are in neither file, answered by the ONNX file:\n")
    for text, (label, probability) in zip(EXAMPLES, classifier.predict(EXAMPLES), strict=True):
        print(f"{label:18} {probability:5.1%}  {text}")


if __name__ == "__main__":
    main()
