"""Putting what was drawn in place, whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ia3_export.errors import OutputError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all; its folder is made. Raises `OutputError`."""
    target = path.resolve()  # a link stays a link
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.exists() and not target.is_file():  # /dev/stdout, a named pipe: nothing to replace
            target.write_bytes(content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}", hint="give another place") from None
