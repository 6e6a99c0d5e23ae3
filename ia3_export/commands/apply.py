"""``apply``: a patch put on a folder, in place or into a new one, and taken back. Needs numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3_export.arguments import check_arguments
from ia3_export.errors import UsageError
from ia3_export.patching.apply import prove, write_folder
from ia3_export.patching.folders import check_before
from ia3_export.patching.format import PatchFile, read_patch
from ia3_export.patching.in_place import patch_in_place, revert_in_place
from ia3_export.writing.execute import Progress

SCHEMA = "ia3-export/applied/1"


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply` or `revert` did to `folder`; `content` is the JSON document of the command."""

    folder: Path
    content: Mapping[str, Any]


def apply(
    patch: str | Path,
    folder: str | Path,
    *,
    output: str | Path | None = None,
    dry_run: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Applied:
    """Put the file `patch` on the deployed `folder`, every byte of which is verified before the first write.

    Args:
        patch: what `ia3_export.patch` wrote.
        folder: what it was made for, byte for byte.
        output: write a new folder with the files that the patch names; without it the folder is replaced, in
            one step, and the way back lies beside it (`revert`). Files that the patch does not name stay.
        dry_run: verify folder and patch, compute the new files, write nothing.
        on_progress: called with bytes written and in total.

    Raises `Refused` for other bytes, and says so if the folder is patched already; `NotFound`, `DamagedFile`
    for a patch that is cut short, `Unsupported` for one of another version, `OutputError`. The folder is as
    it was then.
    """
    check_arguments(apply, locals())
    read, place = read_patch(Path(patch)), Path(folder)
    if dry_run:
        if output is not None:
            raise UsageError("dry_run writes nothing", hint="give no output with it")
        check_before(read, place)
        prove(read, place)
    elif output is not None:
        write_folder(read, place, Path(output), on_progress)
    else:
        patch_in_place(read, place, on_progress)
    how = "verified" if dry_run else "new folder" if output is not None else "in place"
    return _applied(read, Path(output) if output is not None else place, how)


def revert(folder: str | Path, *, on_progress: Callable[[Progress], None] = lambda _: None) -> Applied:
    """Take the last patch that was applied in place back: every byte of `folder` is what it was.

    Raises `Refused` where no patch was applied in place or the files changed since, `OutputError`.
    """
    check_arguments(revert, locals())
    place = Path(folder)
    read = revert_in_place(place, on_progress)
    if read is None:
        return Applied(place, {"schema": SCHEMA, "how": "nothing to revert", "folder": place.name})
    return _applied(read, place, "reverted")


def _applied(patch: PatchFile, folder: Path, how: str) -> Applied:
    content = {
        "schema": SCHEMA,
        "how": how,
        "folder": folder.name,
        "files": [
            {"path": change.new.path, "bytes": change.new.size, "sha256": change.new.sha256}
            for change in patch.files
        ],
        "removed": [state.path for state in patch.removed],
        "kept": len(patch.kept),
    }
    return Applied(folder, content)
