"""``merge``: fold IA3 adapters into a base, streaming, into a complete checkpoint folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ia3_export.adapters import read_adapter
from ia3_export.adapters.combine import Combine
from ia3_export.adapters.model import Adapter
from ia3_export.arguments import check_arguments, real
from ia3_export.checkpoint import ranges
from ia3_export.checkpoint.folder import Checkpoint, read_checkpoint
from ia3_export.errors import CheckFailed, OutputError, UsageError
from ia3_export.planning.changes import Cast, Dtype
from ia3_export.planning.companions import TokenizerChoice
from ia3_export.planning.plan import Plan, Quantized, make_plan
from ia3_export.quantization.settings import SIDE_FILES
from ia3_export.writing.card import BASE_CARD, make_card
from ia3_export.writing.execute import Progress, write_outputs
from ia3_export.writing.layout import INDEX, OutputFile, lay_out, make_index
from ia3_export.writing.manifest import NAME, Digests, Manifest, make_manifest
from ia3_export.writing.stage import check_target, copy_file, set_aside, space_hint, staged


def ignore_progress(_: Progress) -> None:
    """The default progress callback: does nothing."""


def plan_merge(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    *,
    combine: Combine = "product",
    weights: Sequence[float] = (),
    cast: Cast = "peft",
    dtype: Dtype = "auto",
    quantized: Quantized = "dequantize",
    allow_missing: bool = False,
    allow_unused: bool = False,
    tokenizer: TokenizerChoice = "auto",
) -> Plan:
    """What `merge` with the same arguments would do (``--dry-run``). Refusals are in ``Plan.problems``.

    Raises `IA3ExportError` for inputs that cannot be read.
    """
    check_arguments(plan_merge, locals())
    weights = real(weights)
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one --adapter")
    read = [read_adapter(source) for source in adapters]
    return make_plan(
        read_checkpoint(base), read, combine=combine, weights=weights, cast=cast, dtype=dtype, quantized=quantized,
        allow_missing=allow_missing, allow_unused=allow_unused, tokenizer=tokenizer,
    )  # fmt: skip


def merge(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    combine: Combine = "product",
    weights: Sequence[float] = (),
    cast: Cast = "peft",
    dtype: Dtype = "auto",
    quantized: Quantized = "dequantize",
    shard_size: int | None = None,
    link: bool = False,
    overwrite: bool = False,
    allow_missing: bool = False,
    allow_unused: bool = False,
    tokenizer: TokenizerChoice = "auto",
    digests: Digests = "output",
    flush: bool = False,
    reload_check: bool = True,
    on_progress: Callable[[Progress], None] = ignore_progress,
) -> Manifest:
    """Fold IA3 `adapters` into `base` and write a complete checkpoint folder.

    Every changed tensor is bit-identical to PEFT's ``merge_and_unload`` after a default ``from_pretrained`` in
    the stored dtype: ``round_to_dtype(f32(W) * f32(l))``, once per adapter, in float64 for float64 tensors;
    every other tensor is byte-identical to the base (Liu et al. 2022, arXiv:2205.05638; peft 0.21,
    ``tuners/ia3/layer.py``).

    Args:
        base: folder, weight file or hub id ``org/name[@revision]`` of the base model, quantized or not.
        adapters: folders, files or hub ids of IA3 adapters in any format of `READERS`, or what `read_adapter` returned, in the
            order in which they are folded.
        output: folder to create.
        combine: ``product`` folds one adapter after the other; ``linear`` is PEFT's ``add_weighted_adapter``
            (``sum w l``); ``delta`` is ``1 + sum w (l - 1)``.
        weights: one number an adapter, for ``linear`` and ``delta``.
        cast: ``peft`` multiplies with the vector as saved; ``peft-low-mem`` rounds it to the base's dtype first.
        dtype: ``auto`` keeps every tensor's stored dtype (of dequantized ones the dtype that the checkpoint computes in);
            others convert all floating tensors, rounding once.
        quantized: of a quantized base. ``dequantize`` writes it dense; ``keep`` folds the vectors into the stored scales and
            leaves every code alone, or refuses; ``keep-or-dense`` writes the weights dense for which that is impossible.
        shard_size: largest shard in bytes; None keeps the base's shards and names.
        link: hard-link shards that no vector touches instead of copying them.
        overwrite: replace an output folder that a command of ours wrote, and in which nothing else lies.
        allow_missing: leave targeted modules without a vector as they are.
        allow_unused: drop vectors and tensors that have no place in the base.
        tokenizer: whose tokenizer, chat template, generation and processor settings the output gets: ``auto`` an adapter's where
            they differ from the base's and their ids fit the vocabulary, ``base``, or ``adapter``.
        digests: SHA-256 of all input and output files (``full``), of outputs (``output``), or ``none``.
        flush: sync everything to disk before the final rename.
        reload_check: of a quantized base, open the output through transformers (bitsandbytes, compressed-tensors) or gguf
            and compare every weight, where they are installed and memory allows it.
        on_progress: called with bytes done and in total, from several threads, one at a time.

    Returns the manifest that was written as ``ia3_export.json``.

    Raises `IA3ExportError`: `NotFound`, `DamagedFile`, `Unsupported`, `Refused` and its kinds for inputs,
    `UsageError` for options, `OutputError` for the output, `CheckFailed` when the reload check fails. Nothing is left behind in any of these cases.
    """
    check_arguments(merge, locals())
    weights = real(weights)
    target = Path(output)
    plan = plan_merge(
        base, adapters, combine=combine, weights=weights, cast=cast, dtype=dtype, quantized=quantized,
        allow_missing=allow_missing, allow_unused=allow_unused, tokenizer=tokenizer,
    )  # fmt: skip
    plan.raise_problems()
    return _write([(plan, target)], shard_size, link, overwrite, digests, flush, reload_check, on_progress)[0]


def merge_each(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    directory: str | Path,
    *,
    cast: Cast = "peft",
    dtype: Dtype = "auto",
    quantized: Quantized = "dequantize",
    shard_size: int | None = None,
    link: bool = False,
    overwrite: bool = False,
    allow_missing: bool = False,
    allow_unused: bool = False,
    tokenizer: TokenizerChoice = "auto",
    digests: Digests = "output",
    flush: bool = False,
    reload_check: bool = True,
    on_progress: Callable[[Progress], None] = ignore_progress,
) -> list[Manifest]:
    """One merged model for each adapter alone, as ``directory/<adapter name>``, reading the base once.

    Arguments and errors as in `merge`; adapters of the same name are a `UsageError`.
    """
    check_arguments(merge_each, locals())
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one --adapter")
    read = [read_adapter(source) for source in adapters]
    names = [adapter.name for adapter in read]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            f"several adapters are called {', '.join(sorted(twice))}",
            hint="rename their folders, or merge them apart",
        )
    checkpoint = read_checkpoint(base)
    jobs = []
    for adapter in read:
        plan = make_plan(
            checkpoint,
            [adapter],
            cast=cast,
            dtype=dtype,
            quantized=quantized,
            allow_missing=allow_missing,
            allow_unused=allow_unused,
            tokenizer=tokenizer,
        )
        plan.raise_problems()
        jobs.append((plan, Path(directory) / adapter.name))
    return _write(jobs, shard_size, link, overwrite, digests, flush, reload_check, on_progress)


def _write(
    jobs: Sequence[tuple[Plan, Path]],
    shard_size: int | None,
    link: bool,
    overwrite: bool,
    digests: Digests,
    flush: bool,
    reload_check: bool,
    on_progress: Callable[[Progress], None],
) -> list[Manifest]:
    if shard_size is not None and shard_size <= 0:
        raise UsageError(
            f"a shard of {shard_size} bytes holds nothing", hint="for example shard_size=5_000_000_000"
        )
    for plan, target in jobs:
        inputs = [
            *plan.base.location.inputs, *(path for a in plan.adapters for path in a.location.inputs)
        ]  # fmt: skip
        check_target(target, inputs, overwrite=overwrite)
    with ExitStack() as stack:
        outputs = [
            (stack.enter_context(staged(target, overwrite=overwrite, flush=flush)), lay_out(plan, shard_size))
            for plan, target in jobs
        ]
        _check_space(outputs, jobs[0][0].base, link)
        written = write_outputs(outputs, link=link, digests=digests != "none", on_progress=on_progress)
        manifests = []
        for (plan, target), (stage, files), done in zip(jobs, outputs, written, strict=True):
            _write_side_files(plan, stage, files)
            reload = _reload(plan, stage, target) if reload_check else None
            manifest = make_manifest(plan, stage, target, done, digests, reload)
            (stage / NAME).write_text(manifest.to_json(), encoding="utf-8")
            manifests.append(manifest)
    return manifests


def _reload(plan: Plan, stage: Path, target: Path) -> Mapping[str, Any] | None:
    """Open the output of a quantized base through its users' library; one that is not what was written is kept aside."""
    if not plan.quantization.packed:
        return None
    from ia3_export.parity.reload_check import check_output

    try:
        return check_output(stage, plan.base, dense=plan.dequantizes).to_json()
    except CheckFailed as error:
        aside = set_aside(stage, target)
        raise CheckFailed(f"{error}; the output is kept in {aside}", hint=error.hint) from error


def _check_space(outputs: Sequence[tuple[Path, Sequence[OutputFile]]], base: Checkpoint, link: bool) -> None:
    """Refuse early when the disk is too small; a file system that clones needs next to nothing."""
    stage = outputs[0][0]
    needed = sum(file.size for _, files in outputs for file in files if not (link and file.untouched))
    free = shutil.disk_usage(stage).free
    if needed <= free:
        return
    probe = stage / ".probe"
    cloned = ranges.clone(base.shards[0].path, probe)
    probe.unlink(missing_ok=True)
    if not cloned:
        raise OutputError(
            f"the output needs {needed:,} bytes, {stage.parent} has {free:,} free",
            hint=space_hint(stage) + (", or use --link" if not link else ""),
        )


def _write_side_files(plan: Plan, stage: Path, files: Sequence[OutputFile]) -> None:
    for relative, source in plan.companions.files.items():
        target = stage / (BASE_CARD if relative == "README.md" else relative)
        if relative in (NAME, BASE_CARD) or (plan.dequantizes and relative in SIDE_FILES):
            continue
        if relative in plan.settings_files:
            _write_json(target, plan.settings_files[relative])
        else:
            copy_file(source, target)
    if plan.config is not None and not plan.base.is_gguf:
        _write_json(stage / "config.json", plan.config)
    index = make_index(plan, files)
    if index is not None:
        (stage / INDEX).write_bytes(index)
    (stage / "README.md").write_text(make_card(plan), encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
