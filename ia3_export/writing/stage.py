"""Writing a whole folder at once: stage beside the target, then rename.

Interrupted at any moment, the target is absent or complete (with ``overwrite``: absent, old or new). What a
killed run left behind is removed by the next run to the same target. The lock keeps two runs apart.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from ia3_export.checkpoint.manifest import MANIFEST, read_record
from ia3_export.errors import IA3ExportError, InputError, OutputError, Refused

_SCRATCH = "ia3-export-"
_NEXT_TO_NOTHING = 16 << 20
_TMPDIR = (
    "free some space there, or set TMPDIR to a folder on another disk: models are merged into it for a while"
)
#: What file managers leave in every folder.
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
#: What huggingface_hub remembers of an upload.
_UPLOAD = ".cache/huggingface/"


def check_target(target: Path, inputs: list[Path], *, overwrite: bool) -> None:
    """Refuse a target that lies in an input, holds one, or exists (unless empty, or `overwrite` and ours).

    Raises `Refused` (exit 3) for the first two and `OutputError` (exit 4) for the last.
    """
    resolved = target.resolve()
    try:
        target.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, a file where a folder should be
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}", hint="give another --output"
        ) from error
    for path in inputs:
        source = path.resolve()
        folder = source if source.is_dir() else source.parent
        if resolved == folder or (source.is_dir() and resolved.is_relative_to(folder)):
            raise Refused(
                f"the output {target} lies inside the input folder {folder}", hint="give a folder of its own"
            )
        if source.is_relative_to(resolved):
            raise Refused(
                f"the output {target} is a folder that holds the input {source}",
                hint="give a folder of its own",
            )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} exists and is no folder", hint="give another --output")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"{target} already exists", hint="give another --output, or --overwrite")
        if any(place.resolve().is_relative_to(resolved) for place in (Path.cwd(), Path.home())):
            raise OutputError(
                f"{target} holds the working or home directory and is not replaced",
                hint="give another --output",
            )
        _check_ours(target)


@contextmanager
def staged(target: Path, *, overwrite: bool = False, flush: bool = False) -> Iterator[Path]:
    """A new empty folder beside `target` that takes its place when the block ends without an error.

    `flush` syncs every file to disk before the rename, so that the result also survives a power cut.
    Folders above it that had to be made disappear again after an error. Raises `OutputError`; disk-full and
    permission errors of the block are turned into it as well, and `InputError` those of other files.
    """
    target = target.absolute()
    stage, old = places_beside(target)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            recover(target)
            if not overwrite and target.is_dir() and any(target.iterdir()):
                raise OutputError(f"{target} already exists", hint="give another --output, or --overwrite")
            stage.mkdir()
            try:
                yield stage
                if flush:
                    sync_tree(stage)
                _swap(stage, target, old)
                if flush:
                    sync_file(target.parent)
            except OSError as error:  # before the stage goes: then no disk is full any more
                raise _blamed(error, target, stage) from error
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        _remove_empty(made)
        raise OutputError(
            f"cannot write {error.filename or target}: {error.strerror or error}",
            hint=space_hint(target)
            if is_full(error)
            else "check that the folder can be made there and written to",
        ) from error
    except BaseException:
        _remove_empty(made)
        raise


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder. Raises `OutputError` where none can be made, or when it runs full."""
    with ExitStack() as stack:
        try:
            folder = Path(
                stack.enter_context(TemporaryDirectory(prefix=_SCRATCH, ignore_cleanup_errors=True))
            )
        except OSError as error:
            raise OutputError(
                f"cannot make a temporary folder: {error.strerror or error}", hint=_TMPDIR
            ) from error
        try:
            yield folder
        except OSError as error:
            if not is_full(error):
                raise
            raise OutputError(
                f"cannot write to the temporary folder {folder}: {error.strerror}", hint=_TMPDIR
            ) from error


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit of file sizes leaves no more space."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def space_hint(target: Path) -> str:
    """What helps where there is no space for `target`, which may be a temporary folder of ours."""
    if any(folder.name.startswith(_SCRATCH) for folder in target.parents):
        return _TMPDIR
    return "free some space, or give an --output on another disk"


def _blamed(error: OSError, target: Path, stage: Path) -> IA3ExportError:
    """The error for what failed while `stage` was filled: an input, a temporary folder, or the output."""
    file = Path(error.filename).absolute() if isinstance(error.filename, str) else None
    said = error.strerror or str(error)
    if is_full(error):
        temporary = Path(gettempdir())
        if free_space(temporary) < min(_NEXT_TO_NOTHING, free_space(stage)):
            return OutputError(f"cannot write to the temporary folder {temporary}: {said}", hint=_TMPDIR)
        return OutputError(f"cannot write {target}: {said}", hint=space_hint(target))
    beside = f".{target.name}.ia3-export"
    written = file is not None and (
        file.is_relative_to(stage) or target.is_relative_to(file) or file.name.startswith(beside)
    )
    if file is None or written or any(folder.name.startswith(_SCRATCH) for folder in file.parents):
        return OutputError(
            f"cannot write {file or target}: {said}",
            hint="check that the folder can be made there and written to",
        )
    return unreadable(file, said)


def unreadable(file: Path, said: str) -> InputError:
    """The error for an input that the system does not let us read."""
    return InputError(
        f"cannot read {file}: {said}",
        hint="check that the file is there, that it may be read, and the disk that it is on",
    )


def free_space(folder: Path) -> int:
    """Free bytes where `folder` is."""
    return shutil.disk_usage(folder).free


def copy_file(source: Path, target: Path) -> None:
    """Copy one file, making the folders above `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def set_aside(stage: Path, target: Path) -> Path:
    """Rename a stage that failed its check to ``<target>.failed``, for a look at it.

    Where that exists, to ``.failed-2``, and so on.
    """
    places = [f"{target.name}.failed", *(f"{target.name}.failed-{i}" for i in range(2, 1000))]
    place = next(p for p in (target.absolute().with_name(name) for name in places) if not p.exists())
    stage.rename(place)
    return place


def _check_ours(target: Path) -> None:
    """Refuse to replace a folder without our manifest, or with a file that the manifest does not list."""
    record = read_record(target)
    if record is None:
        raise OutputError(
            f"{target} is no folder that ia3-export wrote (it holds no {MANIFEST}), and is not replaced",
            hint="give another --output, or empty that folder yourself",
        )
    files = record.get("files")
    listed = {MANIFEST, *(files if isinstance(files, dict) else ())}
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and name not in listed and path.name not in _LITTER and not name.startswith(_UPLOAD):
            raise OutputError(
                f"{target} also holds {name}, which ia3-export did not write, and is not replaced",
                hint="move that file elsewhere, or give another --output",
            )


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def places_beside(target: Path) -> tuple[Path, Path]:
    """Where a new folder is staged, and where the one that it replaces is put for a moment."""
    return (
        target.with_name(f".{target.name}.ia3-export-stage"),
        target.with_name(f".{target.name}.ia3-export-old"),
    )


def recover(target: Path) -> None:
    """Undo what a killed run left: its stage goes; the folder it was about to replace comes back.

    The caller has `locked` the target.
    """
    stage, old = places_beside(target)
    shutil.rmtree(stage, ignore_errors=True)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _swap(stage: Path, target: Path, old: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        target.rename(old)
    elif target.is_dir():
        target.rmdir()
    stage.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Nobody else of ours writes `target` meanwhile. Raises `OutputError` if somebody does, and `OSError`."""
    path = target.with_name(f".{target.name}.ia3-export-lock")
    with path.open("w") as file:
        try:
            _lock_file(file.fileno())
            ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError:
            ours = False
        if not ours:  # locked by another run, or removed by one that was just finishing
            raise OutputError(
                f"another ia3-export is writing {target}", hint="wait for it, or give another --output"
            )
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file: there it stays behind, empty and harmless
                path.unlink()


def _lock_file(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_tree(folder: Path) -> None:
    """Everything in `folder` to disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync_file(path)
    sync_file(folder)


def sync_file(path: Path) -> None:
    """One file, or the entries of one folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no directory handles to sync
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
