"""Names, order, types and free axes of inputs and outputs.

Those that optimum and transformers.js look for.
"""

from __future__ import annotations

from typing import Any

import pytest

from ia3_export.errors import Unsupported
from ia3_export.onnx.contract import plan_graphs
from ia3_export.onnx.tasks import TASKS
from ia3_export.parity.runs.inputs import make_cases
from tests.support import zoo
from tests.support.exported import KINDS, Exports

pytestmark = [pytest.mark.filterwarnings("ignore")]

Ports = list[tuple[str, list[int | str]]]

_BATCH, _LENGTH = "batch_size", "sequence_length"
_PAST, _TOTAL = "past_sequence_length", "past_sequence_length + sequence_length"
_TEXT: Ports = [("input_ids", [_BATCH, _LENGTH]), ("attention_mask", [_BATCH, _LENGTH])]
_TYPED: Ports = [*_TEXT, ("token_type_ids", [_BATCH, _LENGTH])]


def _cache(kind: str, heads: int, length: str, layers: int) -> Ports:
    return [
        (f"{kind}.{layer}.{part}", [_BATCH, heads, length, 8])
        for layer in range(layers)
        for part in ("key", "value")
    ]


def _decoder(
    heads: int, *, positions: bool = True, vocabulary: int = 128, layers: int = 2
) -> tuple[Ports, Ports]:
    placed: Ports = [("position_ids", [_BATCH, _LENGTH])] if positions else []
    inputs: Ports = [("input_ids", [_BATCH, _LENGTH]), ("attention_mask", [_BATCH, _TOTAL]), *placed]
    logits: Ports = [("logits", [_BATCH, _LENGTH, vocabulary])]
    past = _cache("past_key_values", heads, _PAST, layers)
    return inputs + past, logits + _cache("present", heads, _TOTAL, layers)


_NEW, _DECODED = "decoder_sequence_length", "past_decoder_sequence_length"
_GROWN = f"{_DECODED} + {_NEW}"


def _cross(kind: str, length: str, encoded: int | str | None, heads: int = 4, size: int = 8) -> Ports:
    """Layer by layer; the order is the one by which optimum pairs inputs and outputs."""
    return [
        (f"{kind}.{layer}.{part}", [_BATCH, heads, extent, size])
        for layer in (0, 1)
        for part, extent in (
            ("decoder.key", length),
            ("decoder.value", length),
            ("encoder.key", encoded),
            ("encoder.value", encoded),
        )
        if extent is not None
    ]


def _crossing(form: str, encoded: int | str, *, masked: bool = True, size: int = 8) -> tuple[Ports, Ports]:
    """Inputs and outputs of a decoder of an encoder-decoder: ``first``, ``cached``, ``either`` or ``if``."""
    mask: Ports = [("encoder_attention_mask", [_BATCH, "encoder_sequence_length"])] if masked else []
    inputs: Ports = [*mask, ("input_ids", [_BATCH, _NEW])]
    if form != "cached":
        inputs += [("encoder_hidden_states", [_BATCH, encoded, 32])]
    if form != "first":
        inputs += _cross("past_key_values", _DECODED, "encoder_sequence_length_out", size=size)
    if form == "if":
        inputs += [("use_cache_branch", [1])]
    given = None if form == "cached" else encoded
    return inputs, [("logits", [_BATCH, _NEW, 320]), *_cross("present", _GROWN, given, size=size)]


_STATES: Ports = [("last_hidden_state", [_BATCH, _LENGTH, 32])]
_TEXT_LENGTH = "encoder_sequence_length"
_SOUND: Ports = [("input_features", [_BATCH, 8, 528])]

#: name, options, graph: its inputs and outputs
CONTRACT: list[tuple[str, tuple[str, ...], str, tuple[Ports, Ports]]] = [
    ("llama", (), "model", _decoder(2)),
    ("gpt2", (), "model", _decoder(4, vocabulary=320)),
    ("bloom", (), "model", _decoder(4, positions=False, vocabulary=320, layers=1)),
    ("gpt_bigcode", (), "model", _decoder(1, layers=1)),
    ("bert-seq-cls", (), "model", (_TYPED, [("logits", [_BATCH, 3])])),
    ("bert-token-cls", (), "model", (_TYPED, [("logits", [_BATCH, _LENGTH, 3])])),
    (
        "bert-question",
        (),
        "model",
        (_TYPED, [(f"{end}_logits", [_BATCH, _LENGTH]) for end in ("start", "end")]),
    ),
    ("bert-masked-lm", (), "model", (_TYPED, [("logits", [_BATCH, _LENGTH, 320])])),
    ("modernbert", (), "model", (_TEXT, [("logits", [_BATCH, 3])])),
    ("mpnet", ("--task", "feature-extraction"), "model", (_TEXT, _STATES)),
    ("llama-seq-cls", (), "model", (_TEXT, [("logits", [_BATCH, 3])])),
    ("t5", ("--decoder", "merged"), "encoder_model", (_TEXT, _STATES)),
    ("t5", ("--decoder", "merged"), "decoder_model_merged", _crossing("either", _TEXT_LENGTH, size=16)),
    ("t5", ("--decoder", "separate"), "encoder_model", (_TEXT, _STATES)),
    ("t5", ("--decoder", "separate"), "decoder_model", _crossing("first", _TEXT_LENGTH, size=16)),
    ("t5", ("--decoder", "separate"), "decoder_with_past_model", _crossing("cached", _TEXT_LENGTH, size=16)),
    ("t5", ("--decoder", "if"), "decoder_model_merged", _crossing("if", _TEXT_LENGTH, size=16)),
    ("bart", ("--decoder", "merged"), "decoder_model_merged", _crossing("either", _TEXT_LENGTH)),
    (
        "whisper",
        ("--decoder", "merged"),
        "encoder_model",
        (_SOUND, [("last_hidden_state", [_BATCH, 264, 32])]),
    ),
    ("whisper", ("--decoder", "merged"), "decoder_model_merged", _crossing("either", 264, masked=False)),
    ("vit", (), "model", ([("pixel_values", [_BATCH, 3, 16, 16])], [("logits", [_BATCH, 3])])),
]


def _ports(values: Any) -> Ports:
    return [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "graph", "ports"),
    CONTRACT,
    ids=["-".join((name, *options[1:], graph)) for name, options, graph, _ in CONTRACT],
)
def test_the_files_have_the_ports_of_the_contract(
    exports: Exports, name: str, options: tuple[str, ...], graph: str, ports: tuple[Ports, Ports]
) -> None:
    import onnx

    exported = exports(name, *options)
    proto = onnx.load(exported.graph(graph)).graph
    assert _ports(proto.input) == ports[0]
    assert _ports(proto.output) == ports[1]
    for port in proto.input:
        ids = port.name.endswith(("_ids", "_mask"))
        wanted = onnx.TensorProto.INT64 if ids else onnx.TensorProto.FLOAT
        if port.name == "use_cache_branch":
            wanted = onnx.TensorProto.BOOL
        assert port.type.tensor_type.elem_type == wanted, port.name
    assert {port.type.tensor_type.elem_type for port in proto.output} == {onnx.TensorProto.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "stems"),
    [
        ("merged", ["decoder_model_merged", "encoder_model"]),
        ("separate", ["decoder_model", "decoder_with_past_model", "encoder_model"]),
        ("if", ["decoder_model_merged", "encoder_model"]),
    ],
)
def test_the_files_of_an_encoder_decoder(exports: Exports, form: str, stems: list[str]) -> None:
    assert [path.stem for path in exports("t5", "--decoder", form).graphs] == stems


def _plan(kind: zoo.Kind, task: str) -> list[Any]:
    model = zoo.build(kind)
    sample = {name: tensor[:2] for name, tensor in make_cases(model)[1].tensors.items()}
    return plan_graphs(model, TASKS[task], sample, "merged", None)


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_models_without_keys_and_values_are_refused(name: str) -> None:
    kind = zoo.by_name(name)
    with pytest.raises(Unsupported, match=kind.model_class) as caught:
        _plan(kind, "text-generation")
    assert "--task feature-extraction" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "config", "inputs"),
    [
        ("distilbert", {}, ["input_ids", "attention_mask"]),
        # a real RoBERTa has one type, which is no choice
        ("roberta-seq-cls", {"type_vocab_size": 1}, ["input_ids", "attention_mask"]),
        ("roberta-seq-cls", {}, ["input_ids", "attention_mask", "token_type_ids"]),
    ],
)
def test_token_types_are_asked_for_only_where_there_are_types(
    name: str, config: dict[str, Any], inputs: list[str]
) -> None:
    from dataclasses import replace

    kind = zoo.by_name(name)
    (spec,) = _plan(replace(kind, config={**kind.config, **config}), "text-classification")
    assert [port.name for port in spec.inputs] == inputs


@pytest.mark.parametrize(
    "labels",
    [
        10,
        11,  # as long as the sample
    ],
)
def test_the_number_of_labels_is_no_length(labels: int) -> None:
    from dataclasses import replace

    kind = zoo.by_name("bert-seq-cls")
    (spec,) = _plan(replace(kind, config={**kind.config, "num_labels": labels}), "text-classification")
    assert [port.shape for port in spec.outputs] == [("batch_size", labels)]


@pytest.mark.parametrize("name", sorted(set(KINDS) & {"llama", "gemma2", "bloom", "gpt_bigcode", "olmoe"}))
def test_lengths_that_torch_would_merge_or_specialise_are_not_in_the_samples(name: str) -> None:
    """Free axes of 2 and more, and different ones for different names."""
    (spec,) = _plan(KINDS[name], "text-generation")
    sizes: dict[str, set[int]] = {}
    for port, sample in zip(spec.inputs, spec.samples, strict=True):
        for axis, size in zip(port.shape, sample.shape, strict=True):
            if isinstance(axis, str):
                sizes.setdefault(axis, set()).add(size)
    assert all(len(found) == 1 for found in sizes.values())
    found = [size for values in sizes.values() for size in values]
    assert min(found) >= 2 and len(set(found)) == len(found)
