"""Where a base or an adapter is: a local folder, a local file, or a hub id ``org/name[@revision]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path

from ia3_export.errors import NotFound

# a revision becomes part of a path in the hub cache: no "..", no "/" at the start (git allows neither)
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")


@dataclass(frozen=True, slots=True)
class Location:
    """A resolved input: the local `path`, and the hub id and commit it came from, if any."""

    given: str
    path: Path
    hub_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The hub id, or the last part of the path.

        This may be written down, since it names no place of this machine.
        """
        return self.hub_id or self.path.resolve().name

    @property
    def inputs(self) -> list[Path]:
        """The places that must not be written into: the one found, and the one given, which may lie above."""
        return [self.path] if self.hub_id is not None else [self.path, Path(self.given).expanduser()]


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id (one slash, no path-like parts) and is no local path."""
    return bool(_HUB_ID.fullmatch(text)) and not text.startswith((".", "/", "~")) and not Path(text).exists()


def locate(source: str | Path, *, ignore: Sequence[str] = ()) -> Location:
    """Find `source` on this machine, downloading it with huggingface_hub when it is a hub id.

    huggingface_hub's own cache, token and offline variables (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``)
    are honoured; `ignore` are file patterns not to download. Raises `NotFound`.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.exists():
        return Location(text, path)
    match = _HUB_ID.fullmatch(text)
    if isinstance(source, Path) or match is None or not is_hub_id(text):
        raise NotFound(
            f"{text} does not exist", hint="give a folder, a file, or a hub id such as org/name[@revision]"
        )
    return _download(text, match["repo"], match["revision"], ignore)


def lies_within(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder when links are followed.

    In a snapshot of huggingface_hub's cache files are links to the blobs beside the snapshots, which count.
    """
    real = file.resolve()
    if real.is_relative_to(folder.resolve()):
        return True
    snapshots = next((up for up in folder.absolute().parents if up.name == "snapshots"), None)
    return snapshots is not None and real.parent == snapshots.parent.resolve() / "blobs"


def _download(text: str, repo: str, revision: str | None, ignore: Sequence[str]) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class TerminalBar(tqdm):
        """A bar on a terminal only; huggingface_hub draws one into pipes, too."""

        __init__ = partialmethod(tqdm.__init__, disable=None)

    try:
        folder = Path(
            snapshot_download(repo, revision=revision, ignore_patterns=list(ignore), tqdm_class=TerminalBar)
        )
    except Exception as error:
        # also of httpx, of the parser of answers that are no hub's, of the check of names: all
        # about the input
        raise _not_fetched(text, repo, revision, error) from None
    if not folder.is_dir():
        raise NotFound(
            f"{text}: the repository holds no file of use here", hint="check the spelling and the revision"
        )
    return Location(text, folder, repo, folder.name if folder.parent.name == "snapshots" else revision)


def _not_fetched(text: str, repo: str, revision: str | None, error: Exception) -> NotFound:
    """Why `error` kept `text` from being fetched, without the error's own words: they can quote the token."""
    from huggingface_hub import errors

    # where the cache does not help out, huggingface_hub says so and keeps what the hub answered as the cause
    cause = (error.__cause__ or error) if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        what = "is neither a local path nor complete in the hub cache, and HF_HUB_OFFLINE is set"
        hint = "check the spelling and HF_HOME; run once without HF_HUB_OFFLINE; or give a folder"
    elif isinstance(cause, errors.HFValidationError):
        what = "is neither a local path nor a valid hub id"
        hint = "give a folder, a file, or org/name[@revision]"
    elif isinstance(cause, errors.RevisionNotFoundError):
        what = f"cannot be fetched: {repo} has no revision {revision or 'main'}"
        hint = "give a branch, a tag or a whole commit id of that repository"
    elif isinstance(cause, errors.GatedRepoError):
        what = f"cannot be fetched: {repo} is gated"
        hint = "accept its conditions on the hub, and set HF_TOKEN to a token of that account"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        what = "is no local path, and the hub shows no such repository"
        hint = "check the spelling; a private repository needs HF_TOKEN, a token that may read it"
    elif isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        what = f"cannot be fetched: the hub answers with HTTP status {status}"
        if status in (401, 403):
            hint = "HF_TOKEN, or the token that is logged in, is not valid there or may not read it"
        else:
            hint = "try again later; HF_HUB_OFFLINE=1 takes what is in the hub cache"
    elif isinstance(cause, OSError) and cause.filename:
        what = f"cannot be stored in the hub cache: {cause.filename}: {cause.strerror}"
        hint = "HF_HOME says where the cache is"
    else:
        what = f"cannot be fetched from the hub ({type(cause).__name__})"
        hint = (
            "check the spelling and the network, and HF_ENDPOINT and HF_TOKEN where they are "
            "set; or give a folder"
        )
    return NotFound(f"{text} {what}", hint=hint)
