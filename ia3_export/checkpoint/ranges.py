"""Moving byte ranges between files, as fast as the platform allows.

Linux copies inside the kernel (``copy_file_range``; ``FICLONE`` shares blocks on btrfs and xfs). Elsewhere,
and with ``IA3_EXPORT_PLAIN_IO=1``, plain reads and writes do the same work.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ia3_export.errors import DamagedFile

#: Bytes that the kernel moves between two progress reports, and the unit in which it is fast.
STEP = 16 << 20
PAGE = 4096
_FICLONE = 0x40049409


class ReadError(Exception):
    """The system cannot read an input; an `OSError` here would not say that it was no output."""


@contextmanager
def reading(file: Path, tensor: str) -> Iterator[None]:
    """What stops a read of `tensor` in `file` as a `DamagedFile`: its end, and what the system says."""
    try:
        yield
    except EOFError:
        raise DamagedFile(
            f"{file} became shorter while it was read, at tensor {tensor}",
            hint="something else writes to the inputs; run again when it is done",
        ) from None
    except ReadError as error:
        raise DamagedFile(
            f"{file} cannot be read at tensor {tensor}: {error}",
            hint="check the disk that the input is on, or fetch the file again",
        ) from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def worker_count(tasks: int = 8) -> int:
    """Threads that so many `tasks` of reading and writing gain from: as many as cores, eight at most."""
    return max(1, min(os.cpu_count() or 1, 8, tasks))


def fast_paths() -> bool:
    """Whether kernel-side copying may be tried here."""
    return hasattr(os, "copy_file_range") and os.environ.get("IA3_EXPORT_PLAIN_IO", "0") in ("", "0")


def clone(source: Path, target: Path) -> bool:
    """Make `target` a copy-on-write clone of `source`; False where the file system cannot."""
    if not fast_paths():
        return False
    import fcntl

    with source.open("rb") as src, target.open("wb") as dst:
        try:
            fcntl.ioctl(dst.fileno(), _FICLONE, src.fileno())
        except OSError:
            return False
    return True


def copy_range(
    source: int,
    offset: int,
    target: int,
    position: int,
    count: int,
    report: Callable[[int], None],
    buffer: memoryview,
) -> None:
    """Copy `count` bytes between two open descriptors through `buffer`, telling `report` every portion.

    Whole pages that keep their place in the file move inside the kernel, in aligned steps; it is
    slow at anything else (on ext4 and Linux 6.18 unaligned ``copy_file_range`` took 2.5 times as
    long as reading and writing).
    """
    fast = fast_paths() and offset % PAGE == position % PAGE
    while count:
        moved = 0
        ahead = -offset % PAGE
        if fast and ahead == 0 and count >= PAGE:
            moved = _kernel_copy(
                source, offset, target, position, min(count // PAGE * PAGE, STEP - offset % STEP)
            )
            fast = moved > 0
        if moved == 0:
            portion = min(count, ahead) if fast and ahead else min(count, len(buffer))
            moved = read_into(source, buffer[:portion], offset)
            write_all(target, buffer[:moved], position)
        offset, position, count = offset + moved, position + moved, count - moved
        report(moved)


def read_into(source: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; returns its length.

    Raises `EOFError` when the file ends before, and `ReadError`.
    """
    done = 0
    while done < len(buffer):
        try:
            got = _preadv(source, [buffer[done:]], offset + done)
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from error
        if got == 0:
            raise EOFError(f"file ends at byte {offset + done}")
        done += got
    return done


def write_all(target: int, data: memoryview, position: int) -> None:
    """Write all of `data` at `position`."""
    while data:
        written = _pwrite(target, data, position)
        data, position = data[written:], position + written


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link `target` to the file behind `source` (symbolic links followed); copy where links fail.

    Returns whether it is a link.
    """
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True


def _kernel_copy(source: int, offset: int, target: int, position: int, count: int) -> int:
    try:
        return os.copy_file_range(source, target, count, offset, position)
    except OSError:  # plain reading and writing then says whether it cannot, and which of the two
        return 0


def _seek_and_read(fd: int, buffers: list[memoryview], offset: int, /) -> int:
    os.lseek(fd, offset, os.SEEK_SET)
    data = os.read(fd, len(buffers[0]))
    buffers[0][: len(data)] = data
    return len(data)


def _seek_and_write(fd: int, data: memoryview, offset: int, /) -> int:
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, data)


# Windows has no positional reads and writes; every thread has descriptors of its own, so seeking is safe
_preadv = getattr(os, "preadv", _seek_and_read)
_pwrite = getattr(os, "pwrite", _seek_and_write)
