"""Runs in the environment that holds optimum-onnx, apart from this project's.

Folders in, answers out, both JSON.

    python optimum_runner.py < request.json > answers.json

Only what users of optimum call: an ORTModel class from the folder, then ``generate`` or a forward. Inputs
come as tensors, since not every tokenizer that transformers 5 writes can be read by the transformers 4 here.
Each answer has the form of `tests.runtimes.models.Exported.expected`, or is an object with the ``error``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CLASSES = {
    "text-generation": "ORTModelForCausalLM",
    "text2text-generation": "ORTModelForSeq2SeqLM",
    "automatic-speech-recognition": "ORTModelForSpeechSeq2Seq",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "question-answering": "ORTModelForQuestionAnswering",
    "fill-mask": "ORTModelForMaskedLM",
    "feature-extraction": "ORTModelForFeatureExtraction",
    "image-classification": "ORTModelForImageClassification",
}


def main() -> None:
    request = json.load(sys.stdin)
    answers = {}
    for item in request["models"]:
        try:
            answers[item["name"]] = answer(item, request["new_tokens"])
        except Exception as error:  # the other models shall be tried too, and the test shows which one failed
            answers[item["name"]] = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answers, sys.stdout)


def answer(item: dict[str, Any], new_tokens: int) -> list[Any]:
    """What the model of ``item["folder"]`` says to each of its inputs."""
    import torch
    from optimum import onnxruntime

    model = getattr(onnxruntime, CLASSES[item["task"]]).from_pretrained(item["folder"])
    answers = []
    for given in item["inputs"]:
        tensors = {name: torch.tensor(value) for name, value in given.items()}
        if "generation" in item["task"] or "speech" in item["task"]:
            answers.append(generate(model, tensors, Path(item["folder"]), new_tokens))
        else:
            answers.append(forward(item, model, tensors))
    return answers


def generate(model: Any, tensors: dict[str, Any], folder: Path, new_tokens: int) -> list[int]:
    """The greedy tokens that follow the prompt, or the decoder's prefix."""
    config = model.generation_config
    if "input_features" in tensors:
        # transformers 4 makes generation settings anew that were derived from the model's, and forgets these
        written = json.loads((folder / "generation_config.json").read_text())
        for key in ("is_multilingual", "no_timestamps_token_id"):
            setattr(config, key, written[key])
    wanted = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    found: list[int] = model.generate(**tensors, **wanted)[0].tolist()
    # speech comes without the decoder's prefix, one segment after the other: the first is what was asked for
    return found[:new_tokens] if "input_features" in tensors else found[-new_tokens:]


def forward(item: dict[str, Any], model: Any, tensors: dict[str, Any]) -> Any:
    output = model(**tensors)
    if item["task"] == "question-answering":
        return [output.start_logits[0].tolist(), output.end_logits[0].tolist()]
    if item["task"] == "feature-extraction":
        return output.last_hidden_state[0].mean(dim=0).tolist()
    if item["task"] == "fill-mask":
        return output.logits[tensors["input_ids"] == item["mask_token"]][0].tolist()
    return output.logits[0].tolist()


if __name__ == "__main__":
    main()
