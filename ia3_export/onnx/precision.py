"""Further precisions of an exported graph: float16, weights of 8 and 4 bits, and codes that are there
already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ia3_export.errors import Unsupported
from ia3_export.onnx.blocks import Codes
from ia3_export.onnx.files import external_files, save_model, size_of
from ia3_export.onnx.float16 import to_float16
from ia3_export.onnx.mixing import Aim, Calibrated, GivenCodes, Mix, choose, codes_of, find_choices
from ia3_export.onnx.narrow import narrow
from ia3_export.onnx.passes import Pass, run_passes
from ia3_export.onnx.quantize import quantize
from ia3_export.onnx.replaceable import Sample, take_sample
from ia3_export.onnx.weights import is_weight, looks_up_task


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a graph's weights a precision reached.

    Weights are the float32 initializers of more than 1 KB with two axes longer than 1 (biases and norms are
    none): `weight_bytes` is their size in the source, `converted_bytes` the part that is no longer held in
    float32 (of ``keep``: the part that is held as codes), and `left` names the others, largest first.
    """

    weight_bytes: int
    converted_bytes: int
    left: tuple[str, ...]


_REWRITES: Mapping[str, Pass] = {
    "fp16": to_float16,
    "q8": partial(quantize, bits=8, dense=True),
    "int8": partial(quantize, bits=8),
    "int4": partial(quantize, bits=4),
    "keep": partial(quantize, bits=8, kept=True),
}


def convert_precision(
    source: Path,
    target: Path,
    precision: str,
    codes: Mapping[str, Codes] | None = None,
    left: Collection[str] = (),
) -> Coverage:
    """Write the float32 graph `source` to `target` in `precision`: ``fp16``, ``int8``, ``q8``, ``int4`` or
    ``keep``; inputs and outputs stay as they are.

    ``fp16``: weights and activations are float16, except what float16 cannot hold (`to_float16`). The others:
    weights are codes (`quantize`), all else is float32; of ``int4`` they may be given as `codes` by
    initializer (`choose_bits`), and have 8 bits where they are not among them. ``keep`` has the `codes`
    alone, wherever the initializer is what they stand for; other weights have 16 bits if that is exact.
    The weights `left` become no codes. External data are read tensor by tensor; what is held in memory is the
    result.

    Raises `Unsupported` when no weight of the graph can be held in `precision`, but not for ``keep`` without
    any `codes`: an encoder may have none where its decoder has some.
    """
    import onnx_ir
    import onnx_ir.passes.common as common

    model = onnx_ir.load(source)
    run_passes(model, common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0))
    before = dict(_weights(model))
    rewrite: Callable[..., Any] = _REWRITES[precision]
    if codes is not None:
        rewrite = partial(quantize, bits=8, given=codes, kept=precision == "keep", left=left)
    elif precision != "fp16":
        rewrite = partial(rewrite, left=left)
    run_passes(model, rewrite, common.RemoveUnusedNodesPass(), common.ClearMetadataAndDocStringPass())
    after = {name: size for name, size in _weights(model) if name in before}
    left = tuple(sorted(after, key=lambda name: (-after[name], name)))
    coverage = Coverage(sum(before.values()), sum(before.values()) - sum(after.values()), left)
    if precision == "keep":
        run_passes(model, narrow)
    if not coverage.converted_bytes and not (precision == "keep" and codes == {}):
        raise Unsupported(
            f"{source.name} has no weight that {precision} reaches",
            hint=f"leave out --precision {precision}: the file would be the float32 one under another name",
        )
    # tensors that stayed float32 would be written as references to the source's external data
    onnx_ir.external_data.load_to_model(model)
    save_model(model, target)
    return coverage


def choose_bits(graphs: Sequence[Calibrated], aim: Aim, say: Callable[[str], None]) -> Mix:
    """Codes of the weights of all `graphs` of a model, some of 4 bits and some of 8, that meet `aim`.

    Every mix that is looked at is written beside its graph and run on the inputs, as it will be run.
    """
    choices = [choice for graph in graphs for choice in find_choices(graph, say)]
    samples = {graph.path: take_sample(graph.path, graph.feeds) for graph in graphs if graph.feeds}
    sizes: list[int] = []

    def judge(codes: GivenCodes) -> float:
        written = [_try(graph, codes.get(graph.path.stem, {}), samples.get(graph.path)) for graph in graphs]
        sizes.append(sum(size for size, _ in written))
        loss = max(loss for _, loss in written)
        say(f"{sizes[-1] / 1e6:.1f} MB lose {loss:.4f}")
        return loss

    if aim.size is None:
        return choose(choices, judge, limit=aim.loss)
    # what is in the files beside codes: zero points bring names and inputs with them
    for count in (0, len(choices)):
        judge(codes_of(choices, count))
    wide, narrow = (
        sum(one.nbytes for one in ones) for ones in zip(*((c.wide, c.narrow) for c in choices), strict=True)
    )
    return choose(choices, judge, budget=aim.size - max(sizes[0] - wide, sizes[1] - narrow))


def _try(graph: Calibrated, codes: Mapping[str, Codes], sample: Sample | None) -> tuple[int, float]:
    """Bytes of a graph with `codes`, and what it loses."""
    target = graph.path.with_name(f"{graph.path.stem}.tried.onnx")
    convert_precision(graph.path, target, "int4", codes, graph.left)
    try:
        return size_of(target), 0.0 if sample is None else sample.loss_of_file(target)
    finally:
        for file in (*external_files(target), target):
            file.unlink()


def _weights(model: Any) -> Iterator[tuple[str, int]]:
    """Name and bytes of every float32 weight, those in bodies of ``If`` too."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            # tables of tasks stay what they are
            table = any(looks_up_task(node) for node, _ in value.uses())
            if value.const_value.dtype.name == "FLOAT" and is_weight(value.const_value) and not table:
                yield name, value.const_value.nbytes
