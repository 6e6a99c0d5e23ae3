"""``verify``: does the shipped artifact compute what was trained?"""

from __future__ import annotations

import gc
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.adapters import read_adapter
from ia3_export.adapters.combine import Combine
from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.errors import DamagedFile, NotFound, Unsupported, UsageError
from ia3_export.manifest import NAME
from ia3_export.merging import merge
from ia3_export.parity.inputs import Case, make_cases
from ia3_export.parity.metrics import Distance, Outputs, bound, compare, largest
from ia3_export.parity.reference import LiveModel, load_live, load_plain

SCHEMA = "ia3-export/report/0"
_TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Row:
    """One artifact against the reference: its distance, the bound, and the verdict in words."""

    artifact: str
    distance: Distance
    bound: float
    in_parity: bool
    finding: str


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found. `reference` says who applied the vectors (``peft`` or ``hooks``) and `precision` in which
    dtype, `dtype` that of the unmerged forward it is compared with; `effect` is the largest change that the
    adapters make to the base's outputs."""

    in_parity: bool
    model_class: str
    reference: str
    precision: str
    dtype: str
    device: str
    inputs: tuple[str, ...]
    effect: float
    unmerged: Distance
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON document of ``verify --json``."""
        return {"schema": SCHEMA} | asdict(self)


def verify(
    base: str | Path,
    adapters: Sequence[str | Path],
    *,
    merged: str | Path | None = None,
    onnx: str | Path | None = None,
    combine: Combine | None = None,
    weights: Sequence[float] = (),
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Compare a merged folder and/or an ONNX folder with base + live adapters on seeded inputs.

    The reference is the unmerged forward in float64; an artifact is in parity when
    ``err(artifact) <= k * err(unmerged in the stored dtype) + eps`` (see `parity.metrics`). The control compares the
    error with the adapters' whole effect and names an artifact that equals the base.

    Args:
        base, adapters: as in `merge`.
        merged: folder that `merge` wrote. With neither `merged` nor `onnx`, a merge into a temporary folder is verified.
        onnx: folder that `export_onnx` wrote, or an ``.onnx`` file.
        combine, weights: how several adapters act together; by default what the manifest of `merged` says.
        device: ``cpu`` or ``cuda[:N]`` for the PyTorch forwards; ONNX Runtime runs on the CPU.
        seed: of the inputs.

    Raises `IA3ExportError` for inputs that cannot be read; a failed comparison is a `Report`, not an error.
    """
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device is available", hint="use --device cpu")
    checkpoint = read_checkpoint(base)
    read = [read_adapter(source) for source in adapters]
    if combine is None:
        combine, weights = _recorded_combination(merged)
    if combine != "product" and len(weights) != len(read):
        raise UsageError(f"{len(weights)} weights for {len(read)} adapters")
    with tempfile.TemporaryDirectory(prefix="ia3-export-") as scratch, quiet(), exact_matmul():
        if merged is None and onnx is None:
            merged = Path(scratch) / "merged"
            merge(base, adapters, merged, combine=combine, weights=weights, digests="none")
        dtype = _TORCH_DTYPES[checkpoint.main_dtype]
        live = load_live(checkpoint, read, combine, weights, dtype)
        live.model.to(device)
        cases = make_cases(_inner(live), seed=seed)
        hidden = onnx is not None and _onnx_outputs(find_onnx(onnx)) == ["last_hidden_state"]
        unmerged = run_torch(live.model, cases, device, hidden=hidden)
        precision = "float64"
        try:
            reference = run_torch(live.model.double(), cases, device, hidden=hidden)
        except Unsupported:  # an operator without a float64 kernel
            precision = "float32"
            reference = run_torch(live.model.float(), cases, device, hidden=hidden)
        with live.without_adapter():
            plain = run_torch(live.model, cases, device, hidden=hidden)
        class_name, by = live.class_name, live.by
        del live
        gc.collect()
        if not np.isfinite(largest(reference)):
            raise Unsupported(
                f"the unmerged forward itself gives NaN or infinity in {precision}: there is nothing to compare with",
                hint="check base and adapter; a diverged training looks like this",
            )
        effect = compare(plain, reference).max_error
        own = compare(unmerged, reference)
        limit = bound(own, reference, dtype, len(read))
        rows = []
        if merged is not None:
            outputs = _run_merged(merged, class_name, cases, device, hidden)
            rows.append(_judge("merged", outputs, reference, plain, effect, limit))
        if onnx is not None:
            rows.append(_judge("onnx", run_onnx(find_onnx(onnx), cases), reference, plain, effect, limit))
    notes = []
    if effect <= 4 * limit:
        notes.append(
            f"the adapters change the outputs by {effect:.3g} only, hardly more than the bound {limit:.3g}: "
            "this comparison could not tell the artifact from the base"
        )
    return Report(
        all(row.in_parity for row in rows), class_name, by, precision, dtype, device, tuple(c.name for c in cases), effect, own,
        tuple(rows), tuple(notes),
    )  # fmt: skip


def run_torch(
    model: Any, cases: Sequence[Case], device: str, *, hidden: bool = False
) -> list[dict[str, Any]]:
    """Outputs of every case as numpy arrays by name (``logits``, ``last_hidden_state``), widened to float64.

    `hidden` gives the bare encoder's ``last_hidden_state`` alone, whatever head the model has.
    """
    import torch

    if hidden:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        captured: list[Any] = []
        handle = inner.base_model.register_forward_hook(lambda _m, _i, out: captured.append(out))
        try:
            run_torch(model, cases, device)
        finally:
            handle.remove()
        return [
            _attended(case, {"last_hidden_state": out.last_hidden_state.double().cpu().numpy()})
            for case, out in zip(cases, captured, strict=True)
        ]
    results = []
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for case in cases:
        inputs = {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in case.tensors.items()
        }
        try:
            with torch.no_grad():
                output = model(**inputs)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            raise Unsupported(
                f"the model does not run on generated inputs ({case.name}): {type(error).__name__}: {error}",
                hint="this version makes plain text, image and sound inputs only",
            ) from error
        named = {
            name: value.double().cpu().numpy()
            for name, value in output.items()
            if name in ("logits", "last_hidden_state") and value is not None
        }
        if not named:
            first = next(v for v in output.values() if isinstance(v, torch.Tensor))
            named = {"output": first.double().cpu().numpy()}
        results.append(_attended(case, named))
    return results


def run_onnx(path: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Outputs of every case from ONNX Runtime on the CPU. Raises `Unsupported` when it is not installed."""
    session = _session(path)
    wanted = {node.name for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    results = []
    for case in cases:
        feeds = {name: value.numpy() for name, value in case.tensors.items() if name in wanted}
        if "token_type_ids" in wanted and "token_type_ids" not in feeds:
            feeds["token_type_ids"] = feeds["input_ids"] * 0
        results.append(_attended(case, dict(zip(names, session.run(None, feeds), strict=True))))
    return results


def _attended(case: Case, outputs: dict[str, Any]) -> dict[str, Any]:
    """`outputs` with zeros at padded positions: what a model computes there is nobody's business (some give NaN)."""
    mask = case.tensors.get("attention_mask")
    if mask is None or "decoder_input_ids" in case.tensors:
        return outputs
    kept = mask.cpu().numpy().astype(bool)
    return {
        name: np.where(kept.reshape(*kept.shape, *(1,) * (values.ndim - 2)), values, 0)
        if values.shape[:2] == kept.shape
        else values
        for name, values in outputs.items()
    }


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise Unsupported(
            "ONNX Runtime is not installed", hint="pip install 'ia3-export[cpu]' (or [gpu], never both)"
        ) from None
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DamagedFile(
            f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}", hint="export the model again"
        ) from error


def _onnx_outputs(path: Path) -> list[str]:
    return [node.name for node in _session(path).get_outputs()]


def find_onnx(location: str | Path) -> Path:
    """The ``model.onnx`` of an exported folder, or the file itself. Raises `NotFound`."""
    path = Path(location)
    candidates = [path] if path.is_file() else [path / "onnx" / "model.onnx", path / "model.onnx"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise NotFound(f"{location} holds no onnx/model.onnx", hint="give the folder that ia3-export onnx wrote")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and torch draw progress bars and warn of their own internals; neither belongs into a report."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def exact_matmul() -> Iterator[None]:
    """TF32 off: it keeps 10 bits of the 23 that the bound counts on."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _recorded_combination(merged: str | Path | None) -> tuple[Combine, Sequence[float]]:
    file = Path(merged) / NAME if merged is not None else None
    if file is None or not file.is_file():
        return "product", ()
    try:
        options = json.loads(file.read_text(encoding="utf-8"))["options"]
        return options["combine"], options["weights"]
    except (ValueError, KeyError, TypeError):
        return "product", ()


def _inner(live: LiveModel) -> Any:
    return live.model.get_base_model() if live.by == "peft" else live.model


def _run_merged(
    merged: str | Path, class_name: str, cases: Sequence[Case], device: str, hidden: bool
) -> list[dict[str, Any]]:
    model = load_plain(read_checkpoint(merged), class_name, None, "auto").to(device)
    return run_torch(model, cases, device, hidden=hidden)


def _judge(
    name: str,
    outputs: Outputs,
    reference: Outputs,
    plain: Outputs,
    effect: float,
    limit: float,
) -> Row:
    shared = [set(output) & set(expected) for output, expected in zip(outputs, reference, strict=True)]
    if not all(shared):
        raise Unsupported(
            f"{name} has the outputs {sorted(outputs[0])}, the model {sorted(reference[0])}: nothing to compare",
            hint="export with the task of the model class",
        )
    expected = [{key: row[key] for key in keys} for row, keys in zip(reference, shared, strict=True)]
    try:
        distance = compare(outputs, expected)
    except ValueError as error:
        return Row(name, Distance(float("inf"), float("inf"), 0.0, None), limit, False, str(error))
    if distance.max_error <= limit:
        return Row(name, distance, limit, True, "in parity")
    untouched = [{key: row[key] for key in keys} for row, keys in zip(plain, shared, strict=True)]
    if compare(outputs, untouched).max_error < 0.1 * effect:
        return Row(name, distance, limit, False, "it computes the base: the adapter is not in it")
    return Row(
        name, distance, limit, False, f"off by {distance.max_error / max(effect, 1e-300):.2g} of the effect"
    )
