"""Heads of AdapterHub's library, under the names that transformers' classes have for the same layers.

A static model (``adapters.init`` of a transformers class) saves its head under transformers' names. A
flexible one (``BertAdapterModel`` and the like) saves ``heads.<name>.<i>.weight`` of a sequence of layers;
some of these sequences are what a transformers class computes (the library's own table is
``STATIC_TO_FLEX_HEAD_MAP`` of ``adapters/head_utils.py``), the others have no class to be saved for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np

from ia3_export.adapters.sites import unwrapped
from ia3_export.adapters.source import Source, read_weights
from ia3_export.checkpoint.folder import read_config
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import DamagedFile, NotFound

_CONFIG = "head_config.json"
_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
_LAYER = re.compile(r"heads\.(?P<owner>[^.]+)\.(?P<index>\d+)\.(?P<leaf>\w+)")
_TASKS = {
    "classification": "SEQ_CLS", "multilabel_classification": "SEQ_CLS", "tagging": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS", "causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM",
}  # fmt: skip
_LABELLED = ("classification", "multilabel_classification", "tagging")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Head:
    """A head's `tensors` by the names of class `class_name` (None: of no class), and what it is for."""

    files: tuple[str, ...] = ()
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    class_name: str | None = None
    task_type: str | None = None
    problem_type: str | None = None
    labels: tuple[str, ...] = ()
    unplaced: frozenset[str] = frozenset()
    unplaced_reason: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def keeps_wrapper(self) -> bool:
        """Whether the class holds the whole body as ``transformer``, as the library's flexible T5 does."""
        return self.class_name in ("T5ForSequenceClassification", "MT5ForSequenceClassification")


@dataclass(frozen=True, slots=True)
class _Form:
    """A flexible head that a transformers class has.

    Its kind and hidden activation, and the class's name of each layer.
    """

    model_types: tuple[str, ...]
    head_types: tuple[str, ...]
    layers: Mapping[int, str]
    class_name: str
    _: KW_ONLY
    activation: str | None = None
    pooler: bool = False


_ROBERTA, _BART = ("roberta", "xlm-roberta"), ("bart", "mbart", "plbart", "t5", "mt5")
_CLASSES = {
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert",
    "bart": "Bart", "mbart": "MBart", "plbart": "PLBart", "t5": "T5", "mt5": "MT5",
}  # fmt: skip
_POOLED = {1: "bert.pooler.dense", 4: "classifier"}
_FORMS = (
    _Form(("bert",), ("classification", "multilabel_classification"), _POOLED, "ForSequenceClassification",
          activation="tanh"),
    _Form(("bert",), ("classification", "multilabel_classification"), {1: "classifier"},
          "ForSequenceClassification", pooler=True),
    _Form(("bert",), ("multiple_choice",), _POOLED, "ForMultipleChoice", activation="tanh"),
    _Form(
        ("bert",), ("masked_lm",),
        {0: "cls.predictions.transform.dense", 2: "cls.predictions.transform.LayerNorm",
         3: "cls.predictions.decoder"},
        "ForMaskedLM", activation="gelu",
    ),
    _Form(_ROBERTA, ("classification", "multilabel_classification"),
          {1: "classifier.dense", 4: "classifier.out_proj"}, "ForSequenceClassification", activation="tanh"),
    _Form(("distilbert",), ("classification", "multilabel_classification"),
          {1: "pre_classifier", 4: "classifier"}, "ForSequenceClassification", activation="relu"),
    _Form(("bert", *_ROBERTA, "distilbert"), ("tagging",), {1: "classifier"}, "ForTokenClassification"),
    _Form(("bert", *_ROBERTA, "distilbert"), ("question_answering",), {1: "qa_outputs"},
          "ForQuestionAnswering"),
    _Form(
        _BART, ("classification", "multilabel_classification"),
        {1: "classification_head.dense", 4: "classification_head.out_proj"}, "ForSequenceClassification",
        activation="tanh",
    ),
    _Form(_BART, ("seq2seq_lm",), {0: "lm_head"}, "ForConditionalGeneration"),
)  # fmt: skip


def read_head(source: Source) -> Head:
    """The head beside an adapter; an empty one where there is none.

    One that no transformers class has keeps its own names, which have no place in a model, and a warning says
    so. Raises `NotFound` and `DamagedFile`.
    """
    folder = source.folder
    if not (folder / _CONFIG).is_file():
        return Head()
    config = read_config(folder / _CONFIG)
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise NotFound(
            f"{folder} has a {_CONFIG}, but neither {' nor '.join(_WEIGHTS)}", hint="save the adapter again"
        )
    tensors = {tensor.name: tensor for tensor in read_weights(file).tensors}
    if not tensors:
        raise DamagedFile(
            f"{file} holds no tensor, and {_CONFIG} beside it describes a head", hint="save the adapter again"
        )
    found = Head(files=(_CONFIG, file.name), tensors=tensors)
    settings = config.get("config")
    if not isinstance(settings, dict):
        return _static(found, config)
    kind = str(settings.get("head_type"))
    owners = {match["owner"] for name in tensors if (match := _LAYER.fullmatch(name))}
    if owners - {str(source.config.get("name"))}:
        found = replace(
            found, warnings=(f"the head beside the adapter is called {', '.join(sorted(owners))}",)
        )
    found = replace(
        found,
        task_type=_TASKS.get(kind),
        labels=_labels(settings) if kind in _LABELLED else (),
        problem_type="multi_label_classification" if kind.startswith("multilabel") else None,
    )
    return _flexible(found, kind, settings, str(config.get("model_type")))


def _static(found: Head, config: Mapping[str, Any]) -> Head:
    name = config.get("model_class")
    labelled = isinstance(name, str) and name.endswith(
        ("ForSequenceClassification", "ForTokenClassification")
    )
    return replace(
        found,
        tensors={unwrapped(key): tensor for key, tensor in found.tensors.items()},
        class_name=name if isinstance(name, str) else None,
        labels=_labels(config) if labelled else (),
    )


def _flexible(found: Head, kind: str, settings: Mapping[str, Any], model_type: str) -> Head:
    layers: dict[tuple[int, str], StoredTensor] = {}
    for name, tensor in found.tensors.items():
        match = _LAYER.fullmatch(name)
        if match is not None and tensor.shape:
            layers[int(match["index"]), match["leaf"]] = tensor
    places, class_name = _places(kind, settings, model_type, layers)
    if (
        places is None
        or len(layers) != len(found.tensors)
        or any((i, "weight") not in layers for i in places)
        or {i for i, _ in layers} != set(places)
    ):
        reason = (
            f"its head ({kind}, {settings.get('layers')} layers, {settings.get('activation_function')}) is "
            "one that no class of transformers computes"
        )
        return replace(
            found,
            unplaced=frozenset(found.tensors),
            unplaced_reason=reason,
            labels=(),
            warnings=(*found.warnings, reason),
        )
    tensors = {f"{places[index]}.{leaf}": tensor for (index, leaf), tensor in layers.items()}
    if kind == "seq2seq_lm" and model_type in ("bart", "mbart", "plbart"):
        tensors["final_logits_bias"] = _no_bias(tensors["lm_head.weight"])
    return replace(found, tensors=tensors, class_name=class_name)


def _places(
    kind: str, settings: Mapping[str, Any], model_type: str, layers: Mapping[tuple[int, str], StoredTensor]
) -> tuple[Mapping[int, str] | None, str | None]:
    """Names of the head's layers in a transformers class, and the class; None twice where there is none."""
    if kind == "causal_lm" and set(layers) == {(0, "weight")}:
        return {0: "lm_head"}, None
    hidden = settings.get("layers") == 2 or kind == "masked_lm"
    for form in _FORMS:
        if (
            model_type in form.model_types
            and kind in form.head_types
            and bool(settings.get("use_pooler")) == form.pooler
            and hidden == (form.activation is not None)
            and (not hidden or settings.get("activation_function") == form.activation)
        ):
            return form.layers, _CLASSES[model_type] + form.class_name
    return None, None


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    table = config.get("label2id")
    if not isinstance(table, dict) or not all(type(index) is int for index in table.values()):
        return ()
    names = {index: str(name) for name, index in table.items()}
    return tuple(names[i] for i in range(len(table))) if sorted(names) == list(range(len(table))) else ()


def _no_bias(weight: StoredTensor) -> StoredTensor:
    """transformers' class adds a bias to the logits that the library's head has not: zeros."""
    count = weight.shape[0]
    zeros = np.zeros(count * 4, "u1")
    return StoredTensor(
        name="final_logits_bias",
        dtype="F32",
        shape=(1, count),
        file=weight.file,
        offset=0,
        nbytes=zeros.nbytes,
        data=zeros,
    )
