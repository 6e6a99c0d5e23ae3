"""Two folders change places in one step, where the system can do that.

``renameat2(RENAME_EXCHANGE)`` on Linux (rename(2), since Linux 3.15; not every file system has it),
``renamex_np(RENAME_SWAP)`` on macOS (rename(2) there, on APFS).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2
#: The system call of a C library that has no function for it.
_NUMBERS = {"x86_64": 316, "aarch64": 276, "armv7l": 382, "riscv64": 276}


def exchange(one: Path, other: Path) -> bool:
    """Let `one` and `other` change places at once; False where nothing was done, since the system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return int(library.renamex_np(*names, _RENAME_SWAP)) == 0
        if sys.platform != "linux":
            return False
        where = (_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
        if hasattr(library, "renameat2"):
            return int(library.renameat2(*where)) == 0
        number = _NUMBERS.get(platform.machine())
        return number is not None and int(library.syscall(number, *where)) == 0
    except (AttributeError, OSError, TypeError):  # no such function, no such library
        return False
