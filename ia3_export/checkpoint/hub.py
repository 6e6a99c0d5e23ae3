"""Where a base or an adapter is: a local folder, a local file, or a hub id ``org/name[@revision]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ia3_export.errors import NotFound

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class Location:
    """A resolved input: the local `path`, and the hub id and commit it came from, if any."""

    given: str
    path: Path
    hub_id: str | None = None
    revision: str | None = None


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


def _download(text: str, repo: str, revision: str | None, ignore: Sequence[str]) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = Path(snapshot_download(repo, revision=revision, ignore_patterns=list(ignore)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise NotFound(
            f"{text} is neither a local path nor in the hub cache, and the hub cannot be reached",
            hint="check the spelling, the network, and HF_HUB_OFFLINE; or download the folder and give its path",
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise NotFound(
            f"{text} cannot be fetched from the hub (HTTP status {status})",
            hint="check the id and revision; private and gated repositories need HF_TOKEN",
        ) from None
    except OSError as error:
        raise NotFound(f"{text} cannot be fetched from the hub ({type(error).__name__})") from None
    return Location(text, folder, repo, folder.name if folder.parent.name == "snapshots" else revision)
