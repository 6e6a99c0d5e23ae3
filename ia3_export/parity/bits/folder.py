"""The weights proof of a merged folder: every tensor is what the plan says, bit for bit, without torch.

Both folders are read once, side by side, in blocks. A changed tensor must equal the fold of base and adapter,
any other the base's bytes; nothing may be missing and nothing extra. `diagnose` then says what became of a
tensor that is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ia3_export.checkpoint.folder import ADAPTER_CONFIG, Checkpoint
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.checkpoint.ranges import worker_count
from ia3_export.parity.bits.diagnosis import HEAD_NOT_REPLACED, LEFT_OUT, diagnose
from ia3_export.parity.bits.expected import (
    BLOCK,
    Expected,
    Reader,
    blocks,
    equal,
    expected_tensors,
    same_block,
)
from ia3_export.planning.companions import other_companions
from ia3_export.planning.plan import Plan
from ia3_export.report.model import TensorFinding, WeightsProof
from ia3_export.writing.execute import Progress

_PIECE = 32 << 20
_FINDINGS = 200


def prove_folder(
    plan: Plan, merged: Checkpoint, *, on_progress: Callable[[Progress], None] | None = None
) -> WeightsProof:
    """Compare the tensors of `merged` with what `plan` makes of its base and adapters.

    Raises `DamagedFile` when a file becomes shorter while it is read.
    """
    rows = expected_tensors(plan)
    findings = [_missing(row) for name, row in rows.items() if name not in merged.tensors]
    findings += [
        TensorFinding(name, "extra", f"{tensor.file.name} holds it, but neither base nor adapter brings it")
        for name, tensor in merged.tensors.items()
        if name not in rows
    ]
    if plan.base.stored.config is not None and merged.config is None and merged.location.path.is_dir():
        findings.append(TensorFinding("config.json", "missing", "without it no library loads the folder"))
    if merged.holds_adapter:
        detail = "transformers applies an adapter that lies in a model's folder: it would act twice"
        findings.append(TensorFinding(ADAPTER_CONFIG, "extra", detail))
    findings += _settings(plan, merged)
    pairs = []
    for name, row in rows.items():
        tensor = merged.tensors.get(name)
        if tensor is None:
            continue
        if (tensor.dtype, tensor.shape) != (row.dtype, row.source.shape):
            found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{row.dtype} {list(row.source.shape)}"
            findings.append(TensorFinding(name, "wrong type", f"it is {found}, it must be {wanted}"))
        else:
            pairs.append((row, tensor))
    different = _compare_all(pairs, on_progress)
    failed = [pair for pair in pairs if pair[0].name in different and not equal(*pair)]
    findings += diagnose(failed, rows, limit=_FINDINGS)
    bad = {finding.tensor for finding in findings}
    good = [row for row, _ in pairs if row.name not in bad]
    return WeightsProof(
        name="merged",
        kind="merged",
        file=merged.location.path.resolve().name,
        passed=not findings,
        changed=sum(row.changed for row in good),
        unchanged=sum(not row.changed for row in good),
        nbytes=sum(tensor.nbytes for _, tensor in pairs),
        findings=tuple(findings[:_FINDINGS]),
        notes=tuple(_notes(plan, merged, findings)),
    )


def _settings(plan: Plan, merged: Checkpoint) -> Iterator[TensorFinding]:
    """The finding where the settings of what stays quantized are not those it is written for."""
    wanted = plan.config if plan.config is not None else plan.base.stored.config
    if not plan.base.is_quantized or plan.base.stored.is_gguf or wanted is None or merged.config is None:
        return
    place = "quantization_config"
    if wanted.get(place) != merged.config.get(place):
        detail = (
            "it is not what the weights are written for: libraries would read them wrongly, or not at all"
        )
        yield TensorFinding(f"config.json: {place}", "differs", detail)


def _missing(row: Expected) -> TensorFinding:
    return TensorFinding(row.name, "missing", f"{row.dtype} {list(row.source.shape)} is not in the folder")


def _notes(plan: Plan, merged: Checkpoint, findings: Sequence[TensorFinding]) -> Iterator[str]:
    changed = {name for name, change in plan.changes.items() if change.how != "cast"}
    left_out = {finding.tensor for finding in findings if finding.what in (LEFT_OUT, HEAD_NOT_REPLACED)}
    if changed and changed <= left_out:
        yield "every tensor is the base's: the adapter is not in it"
    if len(findings) > _FINDINGS:
        yield f"{len(findings)} findings, of which {_FINDINGS} are listed"
    if merged.location.path.is_dir() and not plan.base.stored.is_gguf:
        for what in other_companions(plan.companions, merged.folder):
            yield f"the {what} differ{'s' if what == 'tokenizer' else ''} from what a merge writes"
    wanted = plan.config if plan.config is not None else plan.base.stored.config
    if merged.config is not None and wanted is not None:
        ignored = ("transformers_version", "_name_or_path")
        names = sorted(
            key
            for key in {*wanted, *merged.config} - {*ignored}
            if wanted.get(key, ...) != merged.config.get(key, ...)
        )
        if names:
            yield f"config.json differs from what a merge writes, in {', '.join(names[:8])}"


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Bytes ``start:start+nbytes`` of one tensor, or of several that lie alike in both files."""

    names: tuple[str, ...]
    row: Expected
    tensor: StoredTensor
    start: int
    nbytes: int


def _compare_all(
    pairs: Sequence[tuple[Expected, StoredTensor]], on_progress: Callable[[Progress], None] | None
) -> set[str]:
    """Names of the tensors that differ."""
    pieces = list(_pieces(pairs))
    total = sum(piece.nbytes for piece in pieces)
    different: set[str] = set()
    lock = threading.Lock()
    done = 0
    waiting = iter(pieces)

    def work() -> None:
        nonlocal done
        reader = Reader()
        with reader.stack:
            while True:
                with lock:
                    piece = next(waiting, None)
                if piece is None:
                    return
                names = _different(piece, reader)
                with lock:
                    different.update(names)
                    done += piece.nbytes
                    if on_progress is not None:
                        on_progress(Progress(done, total))

    workers = worker_count(len(pieces))
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()
    return different


def _pieces(pairs: Sequence[tuple[Expected, StoredTensor]]) -> Iterator[_Piece]:
    """Portions of work in file order: runs of untouched tensors as one, large ones cut."""
    ordered = sorted(pairs, key=lambda pair: (str(pair[1].file), pair[1].offset))
    run: list[tuple[Expected, StoredTensor]] = []

    def flush() -> Iterator[_Piece]:
        if run:
            names = tuple(row.name for row, _ in run)
            yield from _cut(names, *run[0], sum(tensor.nbytes for _, tensor in run))
            run.clear()

    for row, tensor in ordered:
        if _same_place(row, tensor) or not tensor.nbytes:
            continue
        if not row.plain or (run and not _continues(run[-1], (row, tensor))):
            yield from flush()
        if row.plain:
            run.append((row, tensor))
        else:
            yield from _cut((row.name,), row, tensor, tensor.nbytes)
    yield from flush()


def _same_place(row: Expected, tensor: StoredTensor) -> bool:
    """Whether base and output share the bytes on disk (``merge --link``)."""
    if not row.plain or not (tensor.in_file and row.source.in_file):
        return False
    return row.source.offset == tensor.offset and row.source.file.samefile(tensor.file)


def _continues(before: tuple[Expected, StoredTensor], after: tuple[Expected, StoredTensor]) -> bool:
    return all(
        a.in_file and b.in_file and a.file == b.file and a.offset + a.nbytes == b.offset
        for a, b in ((before[0].source, after[0].source), (before[1], after[1]))
    )


def _cut(names: tuple[str, ...], row: Expected, tensor: StoredTensor, nbytes: int) -> Iterator[_Piece]:
    for start in range(0, nbytes, _PIECE):
        yield _Piece(names, row, tensor, start, min(_PIECE, nbytes - start))


def _different(piece: _Piece, reader: Reader) -> list[str]:
    """Names in `piece` whose bytes differ (all of a run: the diagnosis looks closer)."""
    if piece.row.plain:
        for start in range(piece.start, piece.start + piece.nbytes, BLOCK):
            length = min(BLOCK, piece.start + piece.nbytes - start)
            base = reader.read(piece.row.source, start, length, "base")
            if not same_block(base, reader.read(piece.tensor, start, length, "merged"), reader.work):
                return list(piece.names)
        return []
    for wanted, found, _ in blocks(piece.row, piece.tensor, reader, piece.start, piece.nbytes):
        if not same_block(wanted.view("u1"), found, reader.work):
            return list(piece.names)
    return []
