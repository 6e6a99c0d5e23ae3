"""Inputs that the user brings: tensors in a file, or lines of text for a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.checkpoint.tokenizers import VOCABULARIES
from ia3_export.errors import DamagedFile, NotFound, Unsupported, UsageError, first_line
from ia3_export.parity.runs.inputs import Case

_ROWS = 8
#: Tokenizers of bytes and of characters have a configuration only.
_TOKENIZERS = (*VOCABULARIES, "tokenizer_config.json")
_NO_TOKENIZER = "put the tokenizer's files into the base folder, or give token ids with --inputs"


def read_inputs(path: str | Path) -> list[Case]:
    """The forward calls in a file, as keyword arguments of the model's forward.

    ``.jsonl``: an object a line, argument name → nested lists of numbers (``{"input_ids": [[5, 9, 2]]}``).
    ``.npz``, ``.safetensors``: arrays called by argument name for one call, or ``<call>.<argument>`` for
    several (``0.input_ids``, ``1.input_ids``). Integers become int64, other numbers float32. Raises
    `NotFound`, `DamagedFile`, and `UsageError` for other file kinds.
    """
    file = Path(path)
    if not file.is_file():
        raise NotFound(f"{file} does not exist", hint="--inputs takes a .jsonl, .npz or .safetensors file")
    readers = {".jsonl": _read_jsonl, ".npz": _read_npz, ".safetensors": _read_safetensors}
    if file.suffix not in readers:
        raise UsageError(
            f"--inputs {file}: this kind of file is not read", hint="give a .jsonl, .npz or .safetensors file"
        )
    try:
        cases = list(readers[file.suffix](file))
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise DamagedFile(
            f"{file}: {error}", hint="every argument must be a rectangular array of numbers"
        ) from None
    if not cases:
        raise DamagedFile(f"{file} holds no inputs", hint="give at least one forward call")
    return cases


def read_texts(path: str | Path, folder: Path) -> list[Case]:
    """The lines of a text file, tokenized by the tokenizer in `folder`: eight in a batch, or one if it has no
    padding token.

    Raises `NotFound`, `DamagedFile`, and `Unsupported` without a tokenizer.
    """
    file = Path(path)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise NotFound(f"{file} does not exist", hint="--text takes a file with one text a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{file}: {error}", hint="--text takes a UTF-8 file with one text a line") from None
    if not lines:
        raise DamagedFile(f"{file} holds no text", hint="write one text a line")
    tokenizer = load_tokenizer(folder)
    longest = min(tokenizer.model_max_length, 512)
    step = _ROWS if tokenizer.pad_token_id is not None else 1
    cases = []
    for start in range(0, len(lines), step):
        rows = lines[start : start + step]
        encoded = tokenizer(
            rows, return_tensors="pt", padding=len(rows) > 1, truncation=True, max_length=longest
        )
        length = encoded["input_ids"].shape[1]
        name = f"lines {start + 1} to {start + len(rows)}, length {length}"
        cases.append(Case(name, dict(encoded)))
    return cases


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises `Unsupported` where there is none that transformers can load."""
    if not has_tokenizer(folder):
        # transformers would make up an empty tokenizer for some model types
        raise Unsupported(f"{folder} holds no tokenizer", hint=_NO_TOKENIZER)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers fail in many ways
        raise Unsupported(
            f"{folder} has no tokenizer that transformers can load: {first_line(error)}",
            hint=_NO_TOKENIZER,
        ) from None


def find_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in `folder`, if there is one that transformers can load."""
    with suppress(Unsupported):
        return load_tokenizer(folder)
    return None


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's files lie in `folder`."""
    return any(file.is_file() for pattern in _TOKENIZERS for file in folder.glob(pattern))


def fit_text(case: Case, model: Any) -> Case:
    """`case` with the tokens that `model` takes: no token types where it has none, and for an encoder-decoder
    the text itself, shifted, as the decoder's input.
    """
    import inspect

    import torch

    accepted = inspect.signature(model.forward).parameters
    tensors = {name: value for name, value in case.tensors.items() if name in accepted}
    start = getattr(model.config, "decoder_start_token_id", None)
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted and start is not None:
        ids = tensors["input_ids"]
        tensors["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return Case(case.name, tensors)


def _read_jsonl(file: Path) -> Iterator[Case]:
    for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            value = json.loads(line)
            if not isinstance(value, dict) or not value:
                raise ValueError(f"line {i} is no object of arrays")
            yield _case(f"line {i}", {name: np.asarray(rows) for name, rows in value.items()})


def _read_npz(file: Path) -> Iterator[Case]:
    with np.load(file, allow_pickle=False) as arrays:
        yield from _calls({name: arrays[name] for name in arrays.files})


def _read_safetensors(file: Path) -> Iterator[Case]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        yield from _calls(load_file(file))
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _calls(arrays: Mapping[str, Any]) -> Iterator[Case]:
    calls: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        call, dot, argument = name.partition(".")
        calls.setdefault(call if dot else "", {})[argument if dot else name] = array
    for call in sorted(calls, key=lambda c: (len(c), c)):
        yield _case(f"call {call}" if call else "the file's arrays", calls[call])


def _case(name: str, arrays: Mapping[str, Any]) -> Case:
    import torch

    tensors = {}
    for argument, array in arrays.items():
        if array.dtype.kind not in "iufb":
            raise ValueError(f"{name}: {argument} is no rectangular array of numbers")
        kind = bool if array.dtype.kind == "b" else np.int64 if array.dtype.kind in "iu" else np.float32
        tensors[argument] = torch.from_numpy(np.array(array, dtype=kind))
    shapes: Sequence[str] = [f"{argument} {list(t.shape)}" for argument, t in tensors.items()]
    return Case(f"{name}: {', '.join(shapes)}", tensors)
