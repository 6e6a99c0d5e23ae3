"""From a PyTorch encoder to an ONNX file: the graph, and nothing in it that belongs to this machine."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from ia3_export.errors import Unsupported

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
#: Above this many bytes of weights they go into ``model.onnx_data``: one protobuf holds at most 2 GB.
_EXTERNAL = 1_800_000_000


def input_names(model: Any) -> list[str]:
    """The inputs of an encoder, in optimum's order: ``token_type_ids`` where the model has types to tell apart."""
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in _INPUTS if name in accepted]
    if getattr(model.config, "type_vocab_size", 0) < 2 and "token_type_ids" in names:
        names.remove("token_type_ids")
    return names


def export_encoder(model: Any, output: str, opset: int) -> Any:
    """An ``onnx.ModelProto`` of `model` with the single output `output`; batch and sequence length are free.

    ``torch.onnx.export(dynamo=True)``; the model is expected in float32 and eval mode. Raises `Unsupported` when
    torch cannot trace it.
    """
    import torch

    # torch would report that the vision operators of torchvision are missing; encoders of text have none
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    names = input_names(model)
    wrapper = _wrap(model, names, output)
    ids = torch.ones(2, 11, dtype=torch.int64)
    # sizes of 2 and more, all different: torch specialises 0 and 1, and merges equal ones
    batch, length = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    try:
        program = torch.onnx.export(
            wrapper, tuple(ids.clone() for _ in names), dynamo=True, opset_version=opset, verbose=False,
            input_names=names, output_names=[output], dynamic_shapes=(tuple({0: batch, 1: length} for _ in names),),
            external_data=False,
        )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise Unsupported(
            f"torch cannot export {type(model).__name__} to ONNX: {str(cause).splitlines()[0]}",
            hint="try another --task, or an attention implementation that torch can trace",
        ) from error
    proto = program.model_proto
    _strip(proto)
    return proto


def save(proto: Any, path: Path) -> None:
    """Check `proto` with ``onnx.checker`` and write it; large models with their weights in ``<name>_data``."""
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if size > _EXTERNAL:
        onnx.save_model(
            proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}_data",
            size_threshold=1024,
        )  # fmt: skip
    else:
        path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))


def _wrap(model: Any, names: list[str], output: str) -> Any:
    """The module that is traced: positional inputs in, one tensor out."""
    import torch

    class Encoder(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return self.model(**dict(zip(names, inputs, strict=True)))[output]

    return Encoder().eval()


def _strip(proto: Any) -> None:
    """Remove stack traces, source paths and stale intermediate shapes; parameter names lose the wrapper's prefix."""
    proto.producer_version = ""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    proto.doc_string = proto.graph.doc_string = ""
    del proto.graph.value_info[:]
    renamed = {t.name: t.name.removeprefix("model.") for t in proto.graph.initializer}
    for tensor in proto.graph.initializer:
        tensor.name = renamed[tensor.name]
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for holder in (*proto.graph.node, *proto.functions, *proto.graph.input, *proto.graph.output):
        holder.doc_string = ""
        del holder.metadata_props[:]
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
