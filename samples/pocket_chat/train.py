"""Teach SmolLM2 a voice: an IA3 adapter, trained on the dialogues of this sample, on the CPU.

    python train.py --base BASE --output ADAPTER

An ordinary PEFT fine-tune: nothing here knows ia3-export.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from base import made_whole
from peft import IA3Config, PeftModel, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

DATA = Path(__file__).resolve().parent / "data"
BATCH = 4
# Vectors start at one and move by a few tenths: a rate of full fine-tuning (5e-5) would leave them there.
LEARNING_RATE = 1e-2
# cross_entropy's own word for "no target here"
IGNORED = -100

Message = dict[str, str]


def quiet_libraries() -> None:
    """No progress bars and hints of the libraries between the lines of the sample."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def read_dialogues(file: Path) -> list[list[Message]]:
    """The dialogues of ``train.jsonl``, or the questions of ``held_out.jsonl``."""
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: PreTrainedTokenizerBase, dialogue: list[Message]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of a dialogue in the model's chat template, and what to predict.

    The targets, int64 of the ids' length, are the ids in the assistant's answers and the mark that ends each
    of them, and IGNORED elsewhere.
    """

    def template(messages: list[Message], asking: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=asking, return_dict=False)

    ids = torch.tensor(template(dialogue, asking=False))
    targets = torch.full_like(ids, IGNORED)
    for turn, message in enumerate(dialogue):
        if message["role"] == "assistant":
            start = len(template(dialogue[:turn], asking=True))
            # the template ends a turn with a line break, which no one has to write
            end = len(template(dialogue[: turn + 1], asking=False)) - 1
            targets[start:end] = ids[start:end]
    return ids, targets


def make_model(base: Path) -> PeftModel:
    """The base in float32 with vectors of ones: on keys, values, and the input of each feed-forward's last
    layer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    return get_peft_model(model, config)


def make_batches(
    dialogues: list[tuple[torch.Tensor, torch.Tensor]], generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every dialogue once, in random batches of about equal length: little padding.

    Padding stands on the right, where no token of a dialogue looks, so it needs no mask.
    """
    order = torch.randperm(len(dialogues), generator=generator).tolist()
    order.sort(key=lambda index: len(dialogues[index][0]))
    starts = range(0, len(order), BATCH)
    for batch in torch.randperm(len(starts), generator=generator).tolist():
        chosen = [dialogues[index] for index in order[starts[batch] : starts[batch] + BATCH]]
        ids, targets = zip(*chosen, strict=True)
        yield (
            pad_sequence(ids, batch_first=True),
            pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        )


def loss_of_answers(llama: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens, given all before them.

    The head, a fifth of the model's arithmetic, is asked at the places of answers alone.
    """
    hidden = llama.model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = targets[:, 1:]
    answers = wanted != IGNORED
    return cross_entropy(llama.lm_head(hidden[answers]), wanted[answers])


def train(
    model: PeftModel, dialogues: list[tuple[torch.Tensor, torch.Tensor]], epochs: int, seed: int
) -> None:
    """AdamW on the vectors, the rate falling linearly; prints the mean loss of every tenth of the way."""
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(vectors, lr=LEARNING_RATE, weight_decay=0)
    steps = epochs * -(-len(dialogues) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    start, losses = time.monotonic(), []
    batches = (batch for _ in range(epochs) for batch in make_batches(dialogues, generator))
    for step, (ids, targets) in enumerate(batches, 1):
        loss = loss_of_answers(model.get_base_model(), ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step * 10 // steps > (step - 1) * 10 // steps:
            mean = sum(losses) / len(losses)
            print(f"step {step:3} of {steps}: loss {mean:.3f}, {time.monotonic() - start:.0f} s", flush=True)
            losses.clear()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train an IA3 adapter on data/train.jsonl.")
    parser.add_argument("--base", type=Path, required=True, help="folder that base.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter to write")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train, save, say what was saved."""
    arguments = parse_arguments()
    quiet_libraries()
    # sums are split among threads: as many everywhere give the same numbers everywhere
    torch.set_num_threads(arguments.threads)

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    dialogues = [encode(tokenizer, dialogue) for dialogue in read_dialogues(DATA / "train.jsonl")]
    model = make_model(arguments.base)
    answers = sum(int((targets != IGNORED).sum()) for _, targets in dialogues)
    print(f"training on {len(dialogues)} dialogues, {answers:,} tokens of answers")
    train(model, dialogues, arguments.epochs, arguments.seed)

    with made_whole(arguments.output) as unfinished:
        model.save_pretrained(unfinished)
    size = (arguments.output / "adapter_model.safetensors").stat().st_size
    trained, all_parameters = model.get_nb_trainable_parameters()
    print(f"saved {trained:,} trained of {all_parameters:,} parameters, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
