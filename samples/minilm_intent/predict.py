"""Tell the intent of sentences, from the ONNX file that ``run.py`` made. No PyTorch, no transformers.

python samples/minilm_intent/predict.py "wake me at six" "is it going to rain?"
python samples/minilm_intent/predict.py            # then type sentences, an empty line ends
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

WORK = Path(__file__).resolve().parent / "run"
BATCH = 32


class Classifier:
    """An exported text classifier with its tokenizer and the names of its labels."""

    def __init__(self, exported: Path, labels: Path) -> None:
        self.labels: list[str] = json.loads(labels.read_text(encoding="utf-8"))
        self._tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
        # MiniLM's file pads everything to 128 tokens; as long as the longest of the batch is enough
        self._tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        self._session = onnxruntime.InferenceSession(
            str(exported / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        self._inputs = [entry.name for entry in self._session.get_inputs()]

    def logits(self, texts: list[str]) -> np.ndarray:
        """One row a text, one column a label."""
        rows = []
        for start in range(0, len(texts), BATCH):
            encoded = self._tokenizer.encode_batch(texts[start : start + BATCH])
            known = {
                "input_ids": np.array([entry.ids for entry in encoded]),
                "attention_mask": np.array([entry.attention_mask for entry in encoded]),
                "token_type_ids": np.array([entry.type_ids for entry in encoded]),
            }
            rows.append(self._session.run(["logits"], {name: known[name] for name in self._inputs})[0])
        return np.concatenate(rows)

    def predict(self, texts: list[str]) -> list[tuple[str, float]]:
        """Label and probability of each text."""
        logits = self.logits(texts).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        return [(self.labels[int(row.argmax())], float(row.max())) for row in probabilities]


def load(work: Path) -> Classifier:
    """The classifier of a finished run; ends the program with an explanation if there is none."""
    exported, labels = work / "exported", work / "adapter" / "labels.json"
    if not (exported / "onnx" / "model.onnx").is_file() or not labels.is_file():
        option = "" if work == WORK else f" --work {work}"
        sys.exit(
            f"error: no exported model in {work}\n"
            f"hint: make one with: python {Path(__file__).with_name('run.py')}{option}"
        )
    return Classifier(exported, labels)


def show(classifier: Classifier, texts: list[str]) -> None:
    """A line for each text: label, probability, text."""
    for text, (label, probability) in zip(texts, classifier.predict(texts), strict=True):
        print(f"{label:18} {probability:5.1%}  {text}", flush=True)


def typed_sentences() -> Iterator[str]:
    """Lines of standard input up to an empty one or the end; asks for them on a terminal."""
    asking = sys.stdin.isatty()
    if asking:
        print("Type a sentence; an empty line ends.", flush=True)
    try:
        while text := input("> " if asking else "").strip():
            yield text
    except (EOFError, KeyboardInterrupt):
        if asking:
            print()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tell the intent of sentences from the exported ONNX file.")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="none: read them from the keyboard")
    parser.add_argument("--work", type=Path, default=WORK, help="where run.py worked (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Predict for the arguments, or for what is typed."""
    arguments = parse_arguments()
    classifier = load(arguments.work)
    if arguments.sentences:
        show(classifier, arguments.sentences)
    else:
        for text in typed_sentences():
            show(classifier, [text])


if __name__ == "__main__":
    main()
