"""A zoo of tiny, randomly initialised transformers models for parametrised tests.

Each :class:`Kind` is one row: a model class, a config so small that the model has some ten thousand
parameters, and the modules that an IA3 adapter scales.  Nothing is downloaded and nothing heavy is imported
until a model is built, so that collecting tests over :data:`KINDS` stays cheap.

Where PEFT's own default table knows the model type, ``targets`` is ``None`` and PEFT chooses.  Elsewhere the
targets follow the paper: the key and value projections (or the fused projection that holds them) are scaled
on the output, the second feed-forward projection on the input.
"""

from __future__ import annotations

from tests.support.zoo.decoders import DECODERS
from tests.support.zoo.encoders import ENCODERS
from tests.support.zoo.kind import Kind
from tests.support.zoo.models import adapt, build, example_inputs
from tests.support.zoo.peft_table import PEFT_TABLE
from tests.support.zoo.vision_and_audio import VISION_AND_AUDIO

__all__ = ["KINDS", "Kind", "adapt", "build", "by_name", "example_inputs"]

KINDS: tuple[Kind, ...] = (*PEFT_TABLE, *DECODERS, *ENCODERS, *VISION_AND_AUDIO)


def by_name(name: str) -> Kind:
    """Return the kind of that name."""
    return next(kind for kind in KINDS if kind.name == name)
