"""``export_onnx``: a merged model as an ONNX folder, proven through ONNX Runtime before it is put in place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ia3_export.card import BASE_CARD
from ia3_export.checkpoint.folder import Checkpoint, read_checkpoint
from ia3_export.checkpoint.stage import check_target, staged
from ia3_export.errors import CheckFailed, UsageError
from ia3_export.execute import hash_file
from ia3_export.manifest import NAME, list_files
from ia3_export.merging import merge
from ia3_export.onnx.graph import export_encoder, save
from ia3_export.onnx.tasks import TASKS, canonical_task, infer_task, model_class
from ia3_export.parity.inputs import make_cases
from ia3_export.parity.metrics import EPSILON, compare, largest
from ia3_export.parity.runners import exact_matmul, open_onnx, quiet, run_onnx, run_torch
from ia3_export.parity.verification import verify
from ia3_export.report.model import Distance, Report

SCHEMA = "ia3-export/onnx/1"
_NOT_COPIED = ("README.md", BASE_CARD, NAME)


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """What `export_onnx` wrote. `report` compares with live adapters, `distance` with the merged PyTorch model."""

    folder: Path
    task: str
    opset: int
    distance: Distance | None
    report: Report | None

    def to_json(self) -> dict[str, Any]:
        """The JSON document of ``onnx --json``."""
        return {
            "schema": SCHEMA, "task": self.task, "opset": self.opset,
            "distance": None if self.distance is None else asdict(self.distance),
            "report": None if self.report is None else self.report.to_json(),
        }  # fmt: skip


def export_onnx(
    output: str | Path,
    *,
    model: str | Path | None = None,
    base: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    task: str | None = None,
    opset: int = 20,
    check: bool = True,
    overwrite: bool = False,
) -> OnnxExport:
    """Export an encoder or text classifier to ``output/onnx/model.onnx`` with its configuration and tokenizer.

    Args:
        output: folder to create.
        model: folder that `merge` wrote (or any checkpoint folder).
        base, adapters: instead of `model`; merged into a temporary folder first, compared with the live adapters.
        task: ``feature-extraction`` or ``text-classification`` (optimum's names and synonyms); inferred by default.
        opset: ONNX operator set.
        check: run the file through ONNX Runtime before it is put in place.
        overwrite: replace an existing output folder.

    The graph is float32 (weights of 16-bit checkpoints are widened exactly) with inputs ``input_ids``,
    ``attention_mask`` and, where the model has them, ``token_type_ids`` (int64, batch x length) and the output
    ``logits`` or ``last_hidden_state``, names as in optimum and transformers.js.

    Raises `UsageError`, `InputError` and its kinds, `OutputError`, and `CheckFailed` when ONNX Runtime does not
    give the model's outputs; then nothing is written.
    """
    if (model is None) == (base is None) or (base is not None and not adapters):
        raise UsageError("give either --model, or --base with --adapter")
    target = Path(output)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(exact_matmul())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ia3-export-")))
        inputs = [
            Path(source)
            for source in (model, base, *adapters)
            if source is not None and Path(source).exists()
        ]
        check_target(target, inputs, overwrite=overwrite)
        if base is not None:
            merge(base, adapters, scratch / "merged", digests="none")
            checkpoint = read_checkpoint(scratch / "merged")
        else:
            assert model is not None
            checkpoint = read_checkpoint(model)
        config = checkpoint.config
        if config is None:
            raise UsageError("the model has no config.json", hint="give the folder that merge wrote")
        chosen = canonical_task(task) if task is not None else infer_task(config)
        stage = stack.enter_context(staged(target, overwrite=overwrite))
        distance = _export(checkpoint, stage, chosen, opset, check)
        report = None
        if check and base is not None:
            report = verify(base, adapters, onnx=[stage], device="cpu")
            if not report.in_parity:
                findings = [f"{f.tensor}: {f.what}" for proof in report.weights for f in proof.findings]
                findings += [step.finding for step in report.steps if not step.passed]
                raise CheckFailed(
                    f"the exported graph does not compute what was trained: {findings[0]}",
                    hint="nothing was written; please report the architecture",
                )
        _copy_side_files(checkpoint, stage)
        _write_manifest(checkpoint, stage, chosen, opset)
        return OnnxExport(target, chosen, opset, distance, report)


def _export(checkpoint: Checkpoint, stage: Path, task: str, opset: int, check: bool) -> Distance | None:
    import torch

    # attn_implementation eager: plain operators that every runtime has, and no mask shortcuts baked in
    loaded = model_class(task).from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    loaded.eval()
    cases = make_cases(loaded)
    expected = run_torch(loaded, cases).outputs if check else []
    path = stage / "onnx" / "model.onnx"
    save(export_encoder(loaded, TASKS[task], opset), path)
    if not check:
        return None
    wanted = [{TASKS[task]: row[TASKS[task]]} for row in expected]
    distance = compare(run_onnx(open_onnx(path), cases), wanted, "float32")
    # both sides compute in float32 in another order of operations; 64 eps of the largest value is 7.6e-6 relative
    limit = 64 * EPSILON["float32"] * largest(wanted)
    if distance.max_error > limit:
        raise CheckFailed(
            f"ONNX Runtime gives other outputs than PyTorch: max error {distance.max_error:.3g}, bound {limit:.3g}",
            hint="nothing was written; try another --opset, and please report the architecture",
        )
    return distance


def _copy_side_files(checkpoint: Checkpoint, stage: Path) -> None:
    for name in checkpoint.side_files:
        if name not in _NOT_COPIED:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, stage / name)


def _write_manifest(checkpoint: Checkpoint, stage: Path, task: str, opset: int) -> None:
    merged = checkpoint.folder / NAME
    content = {
        "schema": SCHEMA,
        "tool": {"name": "ia3-export", "version": metadata.version("ia3-export")},
        "libraries": {
            name: metadata.version(name) for name in ("torch", "transformers", "onnx", "onnxscript")
        },
        "task": task,
        "opset": opset,
        "merge_manifest_sha256": hash_file(merged) if merged.is_file() else None,
        "files": list_files(stage, known={}, hashed=True),
    }
    (stage / NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
