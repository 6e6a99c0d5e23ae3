"""A small Hugging Face Hub on this machine.

What ``snapshot_download`` of huggingface_hub 1.x and 2.x asks of the real one.

``GET /api/models/{repo}/revision/{revision}``, ``GET /api/models/{repo}/tree/{commit}``, ``HEAD`` and ``GET``
``/{repo}/resolve/{commit}/{file}``, with the headers and error codes of the Hub.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Every file below `folder`, by its path there, after `prefix`."""
    return {
        prefix + path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Request:
    """What a client asked, and the ``Authorization`` it sent."""

    method: str
    path: str
    authorization: str | None


@dataclass(frozen=True)
class Answer:
    """A response. `breaks_after`: the connection is closed after so many bytes of the body."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    breaks_after: int | None = None


@dataclass(frozen=True)
class Repository:
    """`commits` by id; `refs` are branches and tags.

    Without `token` nothing shows, except that a `gated` one is there.
    """

    commits: Mapping[str, Files]
    refs: Mapping[str, str]
    token: str | None
    gated: bool


class Hub:
    """The server's contents, `requests` so far, and answers that tests put in place of the right ones."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []
        self._repositories: dict[str, Repository] = {}
        self._instead: list[tuple[str, str, Answer, int]] = []
        self._held = ("", "", threading.Event())

    def add(self, repo: str, token: str | None = None, gated: bool = False, **refs: Files) -> None:
        """A repository with a commit for each of `refs` (``main``, a tag)."""
        commits = {_commit(files): files for files in refs.values()}
        ids = {name: _commit(files) for name, files in refs.items()}
        self._repositories[repo] = Repository(commits, ids, token, gated)

    def commit(self, repo: str, ref: str = "main") -> str:
        """The commit that a branch or tag points at."""
        return self._repositories[repo].refs[ref]

    def instead(self, method: str, part: str, answer: Answer, times: int = 1_000_000) -> None:
        """Give `answer` to the next `times` requests whose path holds `part`."""
        self._instead.append((method, part, answer, times))

    @contextmanager
    def held(self, method: str, part: str) -> Iterator[None]:
        """Within the block, requests whose path holds `part` wait for their answer."""
        free = threading.Event()
        self._held = (method, part, free)
        try:
            yield
        finally:
            free.set()

    def answer(self, request: Request) -> Answer:
        """The Hub's answer to a request."""
        self.requests.append(request)
        method, part, free = self._held
        if method == request.method and part in request.path:
            free.wait(60)
        for i, (method, part, answer, times) in enumerate(self._instead):
            if method == request.method and part in request.path and times > 0:
                self._instead[i] = (method, part, answer, times - 1)
                return answer
        parts = urlsplit(request.path).path.strip("/").split("/")
        # huggingface_hub 2.x asks for names to put into its User-Agent
        if parts == ["api", "agent-harnesses"]:
            return _json({"standardEnvVars": [], "harnesses": {}})
        if parts[:2] == ["api", "models"] and len(parts) == 6:
            repo, kind, revision = "/".join(parts[2:4]), parts[4], unquote(parts[5])
            return self._about(request, repo, kind, revision)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file(request, "/".join(parts[:2]), parts[3], unquote("/".join(parts[4:])))
        return Answer(404)

    def _find(self, request: Request, repo: str, revision: str) -> tuple[str, Files] | Answer:
        found = self._repositories.get(repo)
        known = {f"Bearer {repository.token}" for repository in self._repositories.values()}
        if request.authorization is not None and request.authorization not in known:
            return Answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        allowed = found is not None and found.token in (None, (request.authorization or "")[len("Bearer ") :])
        if found is not None and found.gated and not allowed:
            return _error(403, "GatedRepo", f"Access to model {repo} is restricted")
        if found is None or not allowed:
            # the real one, too, does not tell strangers whether the repository is private or not there
            return _error(
                401 if request.authorization is None else 404, "RepoNotFound", "Repository not found"
            )
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, found.commits[commit]

    def _about(self, request: Request, repo: str, kind: str, revision: str) -> Answer:
        found = self._find(request, repo, revision)
        if isinstance(found, Answer):
            return found
        commit, files = found
        if kind == "tree":
            return _json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                    for path, data in files.items()
                ]
            )
        siblings = [{"rfilename": path} for path in files]
        return _json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})

    def _file(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        found = self._find(request, repo, revision)
        if isinstance(found, Answer):
            return found
        commit, files = found
        if path not in files:
            return _error(404, "EntryNotFound", "Entry not found", commit)
        return file_answer(files[path], commit)


def file_answer(data: bytes, commit: str) -> Answer:
    """What ``resolve`` says of a file that lies on the Hub itself."""
    return Answer(headers={"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"'}, body=data)


def redirect(url: str, data: bytes, commit: str) -> Answer:
    """What ``resolve`` says of a file that lies elsewhere."""
    return Answer(
        302,
        {
            "Location": url,
            "X-Repo-Commit": commit,
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
        },
    )


@contextmanager
def serve() -> Iterator[Hub]:
    """A running, empty hub; it is down after the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            request = Request(self.command, self.path, self.headers["Authorization"])
            self._send(hub.answer(request))

        do_HEAD = do_GET

        def _send(self, answer: Answer) -> None:
            body, status, headers = answer.body, answer.status, dict(answer.headers)
            wanted = self.headers["Range"]
            if wanted and status == 200:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body, status = body[start:], 206
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if answer.breaks_after is not None:
                body, self.close_connection = body[: answer.breaks_after], True
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _commit(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _json(value: Any) -> Answer:
    return Answer(headers={"Content-Type": "application/json"}, body=json.dumps(value).encode())


def _error(status: int, code: str, message: str, commit: str | None = None) -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    if commit is not None:
        headers["X-Repo-Commit"] = commit
    return Answer(status, headers, json.dumps({"error": message}).encode())
