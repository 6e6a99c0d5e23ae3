"""Bases and adapters by hub id.

The command line as a process, the real huggingface_hub, and a hub on this machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import Ran, command_line, contents, merge, only_complaint, run_process
from tests.e2e.conftest import Tiny
from tests.support.hub import Answer, Files, Hub, file_answer, files_of, redirect, serve

TOKEN = "hf_SECRETxyzxyzxyz"
OTHERS_TOKEN = "hf_SECRETothersxyz"
SECRET = "SECRET"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Desk:
    """A user's machine: an empty hub cache below `folder`, and a hub."""

    folder: Path
    hub: Hub

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def env(self, **more: str) -> dict[str, str]:
        return {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), **more}

    def run(self, *args: str | Path, **env: str) -> Ran:
        """Run the command line; no run may print a token or a traceback."""
        ran = run_process(*args, env=self.env(**env))
        assert SECRET not in ran.stdout + ran.stderr
        assert "Traceback" not in ran.stdout + ran.stderr
        return ran

    def merge(self, base: str | Path, adapter: str | Path, name: str, **env: str) -> dict[str, str]:
        """Digests of the files that a merge wrote into folder `name`.

        It must succeed and say nothing on stderr.
        """
        output = self.folder / name
        ran = self.run("merge", "--base", base, "--adapter", adapter, "--output", output, "--verbose", **env)
        assert (ran.code, ran.stderr) == (0, ""), ran
        return contents(output)

    def manifest(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / name / "ia3_export.json").read_text())
        return content


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with serve() as hub:
        yield Desk(tmp_path, hub)
    for path in tmp_path.rglob("*"):
        assert (
            not path.is_file()
            or path == tmp_path / "home" / "token"
            or SECRET not in path.read_text("latin-1")
        ), f"{path} holds a token"


@pytest.fixture
def adapter(tiny: Tiny) -> Files:
    return files_of(tiny.adapter)


def weights(merged: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in merged.items() if ".safetensors" in name}


def test_inspect_shows_of_an_adapter_on_the_hub_what_it_shows_of_the_folder(
    desk: Desk, tiny: Tiny, adapter: Files
) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter)
    ran = desk.run("inspect", "tiny-org/adapter", "--base", tiny.base, "--json", "--quiet")
    assert (ran.code, ran.stderr) == (0, "")
    assert json.loads(ran.stdout) == json.loads(
        desk.run("inspect", tiny.adapter, "--base", tiny.base, "--json", "--quiet").stdout
    )


def test_base_and_adapter_by_hub_id_merge_to_the_same_tensors_as_their_folders(
    desk: Desk, tiny: Tiny, adapter: Files
) -> None:
    desk.hub.add("tiny-org/base", main=files_of(tiny.base))
    desk.hub.add("tiny-org/adapter", main=adapter)
    merged = desk.merge("tiny-org/base", "tiny-org/adapter", "merged")
    assert weights(merged) == weights(contents(tiny.merged))
    assert not any(name.startswith((".", "trees")) for name in merged)
    manifest = desk.manifest("merged")
    assert manifest["base"] == {"id": "tiny-org/base", "revision": desk.hub.commit("tiny-org/base")}
    (given,) = manifest["adapters"]
    assert (given["id"], given["revision"]) == ("tiny-org/adapter", desk.hub.commit("tiny-org/adapter"))
    assert str(desk.home) not in json.dumps(manifest) + (desk.folder / "merged" / "README.md").read_text()


def test_a_revision_is_a_branch_a_tag_or_a_commit_and_the_manifest_says_which_commit(
    desk: Desk, tiny: Tiny, adapter: Files, tmp_path: Path
) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter, v1=files_of(tiny.other))
    merge(tiny.base, tiny.other, tmp_path / "expected", "--quiet")
    expected = {"main": weights(contents(tiny.merged)), "v1": weights(contents(tmp_path / "expected"))}
    assert expected["main"] != expected["v1"]
    for revision, ref in ("main", "main"), ("v1", "v1"), (desk.hub.commit("tiny-org/adapter", "v1"), "v1"):
        merged = desk.merge(tiny.base, f"tiny-org/adapter@{revision}", f"merged-{revision}")
        assert weights(merged) == expected[ref]
        (given,) = desk.manifest(f"merged-{revision}")["adapters"]
        assert given["revision"] == desk.hub.commit("tiny-org/adapter", ref)


def test_what_is_in_the_cache_needs_no_hub_and_gives_the_same_bytes(
    desk: Desk, tiny: Tiny, adapter: Files
) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter)
    first = desk.merge(tiny.base, "tiny-org/adapter", "first")
    asked = len(desk.hub.requests)
    assert desk.merge(tiny.base, "tiny-org/adapter", "offline", HF_HUB_OFFLINE="1") == first
    commit = desk.hub.commit("tiny-org/adapter")
    assert desk.merge(tiny.base, f"tiny-org/adapter@{commit}", "by commit", HF_HUB_OFFLINE="1") == first
    assert len(desk.hub.requests) == asked
    assert desk.merge(tiny.base, "tiny-org/adapter", "again") == first
    assert not any("resolve" in request.path for request in desk.hub.requests[asked:])
    desk.hub.instead("GET", "/api/", Answer(503))
    assert desk.merge(tiny.base, "tiny-org/adapter", "out of order") == first
    with serve() as gone:
        pass
    assert desk.merge(tiny.base, "tiny-org/adapter", "down", HF_ENDPOINT=gone.url) == first


def test_what_is_not_in_the_cache_is_refused_offline(desk: Desk, tiny: Tiny, adapter: Files) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter, v1=files_of(tiny.other))
    assert desk.run("inspect", "tiny-org/adapter").code == 0
    asked = len(desk.hub.requests)
    output = desk.folder / "merged"
    for name in "tiny-org/nothing", "tiny-org/adapter@v1":
        ran = desk.run(
            "merge",
            "--base",
            tiny.base,
            "--adapter",
            name,
            "--output",
            output,
            HF_HUB_OFFLINE="1",
            HF_TOKEN=TOKEN,
        )
        only_complaint(ran, 3, name, "hub cache", "HF_HUB_OFFLINE")
    assert len(desk.hub.requests) == asked
    assert not output.exists()


def test_a_cached_copy_with_a_file_missing_is_refused_offline(desk: Desk, adapter: Files) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter)
    assert desk.run("inspect", "tiny-org/adapter").code == 0
    (weight,) = desk.home.rglob(WEIGHTS)
    weight.unlink()
    only_complaint(
        desk.run("inspect", "tiny-org/adapter", HF_HUB_OFFLINE="1"), 3, "nor complete in the hub cache"
    )


def test_a_hub_that_is_not_there(desk: Desk) -> None:
    with serve() as gone:
        pass
    ran = desk.run("inspect", "tiny-org/adapter", HF_ENDPOINT=gone.url, HF_TOKEN=TOKEN)
    only_complaint(ran, 3, "tiny-org/adapter", "cannot be fetched", "ConnectError")
    assert "HF_ENDPOINT" in ran.stderr


@pytest.mark.parametrize(
    ("name", "mentions"),
    [
        ("tiny-org/nothing", ("no such repository",)),
        ("tiny-org/adapter@v9", ("tiny-org/adapter has no revision v9",)),
        ("tiny-org/adapter@" + 40 * "0", ("has no revision " + 40 * "0",)),
    ],
)
def test_what_the_hub_does_not_have(desk: Desk, adapter: Files, name: str, mentions: tuple[str, ...]) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter)
    only_complaint(desk.run("inspect", name), 3, name, *mentions)


@pytest.mark.parametrize(
    "name",
    ["a--b/c", "org/x..y", "org/name.git", "org/name@../../x", "org/name@/etc/passwd", "org/name@", "ö/ä"],
)
def test_names_that_no_repository_or_revision_can_have_are_not_asked_for(desk: Desk, name: str) -> None:
    only_complaint(desk.run("inspect", name), 3, name)
    assert desk.hub.requests == []


@pytest.mark.parametrize(
    ("token", "mention"), [("", "no such repository"), ("hf_SECRETwrong", "401"), (OTHERS_TOKEN, "no such")]
)
def test_a_private_repository_without_the_token_for_it(
    desk: Desk, tiny: Tiny, adapter: Files, token: str, mention: str
) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    desk.hub.add("tiny-org/others", token=OTHERS_TOKEN, main=adapter)
    output = desk.folder / "merged"
    args = (
        "merge",
        "--base",
        tiny.base,
        "--adapter",
        "tiny-org/private",
        "--output",
        output,
        "--verbose",
        "--json",
    )
    ran = desk.run(*args, HF_TOKEN=token)
    document = json.loads(ran.stdout)
    only_complaint(Ran(ran.code, "", ran.stderr), 3, "tiny-org/private", mention, document["error"])
    assert "HF_TOKEN" in document["hint"]
    assert not output.exists()


def test_a_gated_repository(desk: Desk, adapter: Files) -> None:
    desk.hub.add("tiny-org/gated", token=TOKEN, gated=True, main=adapter)
    ran = desk.run("inspect", "tiny-org/gated")
    only_complaint(ran, 3, "tiny-org/gated is gated")
    assert "HF_TOKEN" in ran.stderr
    assert desk.run("inspect", "tiny-org/gated", HF_TOKEN=TOKEN).code == 0


def test_a_private_repository_with_its_token(desk: Desk, tiny: Tiny, adapter: Files) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    merged = desk.merge(tiny.base, "tiny-org/private", "merged", HF_TOKEN=TOKEN)
    assert weights(merged) == weights(contents(tiny.merged))


def test_a_private_repository_with_the_token_of_the_login(desk: Desk, tiny: Tiny, adapter: Files) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    desk.home.mkdir()
    (desk.home / "token").write_text(TOKEN + "\n")
    merged = desk.merge(tiny.base, "tiny-org/private", "merged")
    assert weights(merged) == weights(contents(tiny.merged))
    assert any(request.authorization == f"Bearer {TOKEN}" for request in desk.hub.requests)


def test_a_login_whose_file_is_no_text(desk: Desk, adapter: Files) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    desk.home.mkdir()
    (desk.home / "token").write_text(TOKEN, encoding="utf-16")
    only_complaint(desk.run("inspect", "tiny-org/private"), 3, "tiny-org/private")


def test_huggingface_hub_in_debug_mode_shows_no_token_either(desk: Desk, adapter: Files) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    ran = desk.run("inspect", "tiny-org/private", HF_TOKEN=TOKEN, HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
    assert ran.code == 0
    assert "authorization" in ran.stderr.lower()


@pytest.mark.parametrize("token", [f"{TOKEN}\x0cx", f"{TOKEN}ö"], ids=ascii)
def test_a_token_that_no_header_can_hold(desk: Desk, adapter: Files, token: str) -> None:
    """httpx quotes the header in one of its errors."""
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    ran = desk.run("inspect", "tiny-org/private", "--verbose", HF_TOKEN=token)
    only_complaint(ran, 3, "tiny-org/private")
    assert "HF_TOKEN" in ran.stderr


@pytest.mark.parametrize(
    "answer",
    [
        Answer(401, {"X-Error-Message": f"bad token {TOKEN}"}, json.dumps({"error": TOKEN}).encode()),
        Answer(403, {"X-Error-Message": TOKEN}),
        Answer(500, body=f"Authorization: Bearer {TOKEN}".encode()),
        Answer(429, {"Retry-After": "1"}),
        Answer(200, body=b"<html>please log in to the hotel's network</html>"),
        Answer(200, body=b"\xff\xfe\x00"),
        Answer(200, body=b"[]"),
        Answer(200, body=b'{"id": "tiny-org/private"}'),
        Answer(200, {"Content-Encoding": "gzip"}, b"no gzip"),
        Answer(200, body=b'{"id": "tiny-org/private"', breaks_after=9),
        Answer(302, {"Location": "/api/models/tiny-org/private/revision/main"}),
        Answer(302, {"Location": "gopher://example.invalid/"}),
    ],
    ids=[
        "401",
        "403",
        "500",
        "429",
        "page",
        "bytes",
        "list",
        "no-commit",
        "no-gzip",
        "break",
        "loop",
        "gopher",
    ],
)
def test_answers_that_no_hub_gives_end_in_an_error_without_the_token(
    desk: Desk, tiny: Tiny, adapter: Files, answer: Answer
) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    desk.hub.instead("GET", "/api/models", answer)
    output = desk.folder / "merged"
    args = ("--base", tiny.base, "--adapter", "tiny-org/private", "--output", output, "--verbose")
    only_complaint(desk.run("merge", *args, HF_TOKEN=TOKEN), 3, "tiny-org/private")
    assert not output.exists()


@pytest.mark.parametrize(
    ("answer", "mention"),
    [
        (Answer(401, {"X-Error-Message": TOKEN}), "401"),
        (Answer(403), "403"),
        (Answer(404, {"X-Error-Code": "EntryNotFound"}), "404"),
        (Answer(200), "FileMetadataError"),
    ],
    ids=["401", "403", "404", "no-commit"],
)
def test_a_file_that_the_hub_lists_and_does_not_give(
    desk: Desk, adapter: Files, answer: Answer, mention: str
) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    desk.hub.instead("HEAD", WEIGHTS, answer)
    only_complaint(desk.run("inspect", "tiny-org/private", HF_TOKEN=TOKEN), 3, "tiny-org/private", mention)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_files_that_lie_on_another_host_are_fetched_without_the_token(
    desk: Desk, adapter: Files, method: str
) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    commit = desk.hub.commit("tiny-org/private")
    with serve() as elsewhere:
        elsewhere.instead("GET", "/blob", file_answer(adapter[WEIGHTS], commit))
        away = redirect(f"{elsewhere.url}/blob?signature=1", adapter[WEIGHTS], commit)
        desk.hub.instead(method, WEIGHTS, away)
        assert desk.run("inspect", "tiny-org/private", HF_TOKEN=TOKEN).code == 0
        assert [request.authorization for request in elsewhere.requests] == [None]


def test_a_hub_that_sends_the_question_to_another_host_gives_it_no_token(desk: Desk, adapter: Files) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    with serve() as elsewhere:
        desk.hub.instead(
            "GET", "/api/models", Answer(307, {"Location": f"{elsewhere.url}/api/models/a/b/revision/main"})
        )
        only_complaint(desk.run("inspect", "tiny-org/private", HF_TOKEN=TOKEN), 3, "tiny-org/private")
        assert [request.authorization for request in elsewhere.requests] == [None]


def test_a_file_that_comes_short_is_not_taken_and_not_kept(desk: Desk, tiny: Tiny, adapter: Files) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter)
    short = file_answer(adapter[WEIGHTS][:500], desk.hub.commit("tiny-org/adapter"))
    desk.hub.instead("GET", WEIGHTS, short, times=1)
    output = desk.folder / "merged"
    ran = desk.run("merge", "--base", tiny.base, "--adapter", "tiny-org/adapter", "--output", output)
    only_complaint(ran, 3, "tiny-org/adapter")
    assert not output.exists()
    assert not list(desk.home.rglob("*.incomplete"))
    assert weights(desk.merge(tiny.base, "tiny-org/adapter", "merged")) == weights(contents(tiny.merged))


def test_a_download_that_breaks_off_goes_on_where_it_was(desk: Desk, tiny: Tiny, adapter: Files) -> None:
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    whole = file_answer(adapter[WEIGHTS], desk.hub.commit("tiny-org/private"))
    broken = Answer(whole.status, whole.headers, whole.body, breaks_after=500)
    desk.hub.instead("GET", WEIGHTS, broken, times=1)
    output = desk.folder / "merged"
    ran = desk.run(
        "merge", "--base", tiny.base, "--adapter", "tiny-org/private", "--output", output, HF_TOKEN=TOKEN
    )
    assert ran.code == 0, ran
    assert weights(contents(output)) == weights(contents(tiny.merged))


@pytest.mark.slow
def test_a_download_that_goes_on_breaking_off_leaves_nothing(desk: Desk, tiny: Tiny, adapter: Files) -> None:
    """huggingface_hub tries six times, a second apart."""
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    whole = file_answer(adapter[WEIGHTS], desk.hub.commit("tiny-org/private"))
    desk.hub.instead("GET", WEIGHTS, Answer(whole.status, whole.headers, whole.body, breaks_after=0))
    output = desk.folder / "merged"
    ran = desk.run(
        "merge", "--base", tiny.base, "--adapter", "tiny-org/private", "--output", output, HF_TOKEN=TOKEN
    )
    assert ran.code == 3, ran
    assert "error: tiny-org/private cannot be fetched" in ran.stderr
    assert not output.exists()
    assert not list(desk.home.rglob("*.incomplete"))


def test_an_interrupted_download_leaves_nothing(desk: Desk, tiny: Tiny, adapter: Files) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter)
    output = desk.folder / "merged"
    args = ("merge", "--base", tiny.base, "--adapter", "tiny-org/adapter", "--output", output)
    with desk.hub.held("GET", WEIGHTS):
        process = subprocess.Popen(
            command_line(*args),
            env=os.environ | desk.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(1000):
            if any(request.method == "GET" and WEIGHTS in request.path for request in desk.hub.requests):
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    assert weights(desk.merge(tiny.base, "tiny-org/adapter", "merged")) == weights(contents(tiny.merged))


def test_of_several_adapters_in_a_repository_the_hint_names_one(
    desk: Desk, tiny: Tiny, adapter: Files
) -> None:
    desk.hub.add("tiny-org/both", main={**files_of(tiny.adapter, "one/"), **files_of(tiny.other, "two/")})
    ran = desk.run("inspect", "tiny-org/both")
    only_complaint(ran, 3, "several adapters: one, two")
    named = re.search(r"--adapter (\S+)", ran.stderr)
    assert named is not None
    assert weights(desk.merge(tiny.base, named[1], "merged")) == weights(contents(tiny.merged))


def test_what_training_left_behind_is_not_downloaded(desk: Desk, adapter: Files) -> None:
    left = (
        "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "runs/today/events.out",
        "checkpoint-100/adapter_model.safetensors", "checkpoint-100/optimizer.pt", "model.safetensors",
    )  # fmt: skip
    desk.hub.add("tiny-org/adapter", main={**adapter, **dict.fromkeys(left, b"left by training")})
    assert desk.run("inspect", "tiny-org/adapter").code == 0
    fetched = {
        r.path.rpartition("/resolve/")[2].partition("/")[2]
        for r in desk.hub.requests
        if "/resolve/" in r.path
    }
    assert fetched == set(adapter)


@pytest.mark.parametrize("files", [{}, {"adapter_model.gguf": b"GGUF"}], ids=["none", "of another kind"])
def test_a_repository_without_a_file_of_use(desk: Desk, files: Files) -> None:
    desk.hub.add("tiny-org/empty", main=files)
    ran = desk.run("inspect", "tiny-org/empty")
    assert ran.code == 3
    assert "error: tiny-org/empty: the repository holds no file of use here\nhint: " in ran.stderr


@pytest.mark.slow
def test_verify_takes_both_from_the_cache(desk: Desk, tiny: Tiny, adapter: Files) -> None:
    """Neither transformers nor PEFT asks the hub on its own."""
    desk.hub.add("tiny-org/base", main=files_of(tiny.single))
    desk.hub.add("tiny-org/private", token=TOKEN, main=adapter)
    desk.merge("tiny-org/base", "tiny-org/private", "merged", HF_TOKEN=TOKEN)
    asked = len(desk.hub.requests)
    args = ("--base", "tiny-org/base", "--adapter", "tiny-org/private", "--merged", desk.folder / "merged")
    report = ("--report", desk.folder / "report.json", "--html", desk.folder / "report.html")
    ran = desk.run("verify", *args, *report, "--verbose", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert (ran.code, ran.stderr) == (0, "")
    assert len(desk.hub.requests) == asked


@pytest.mark.parametrize("path", ["../../../../evil", "a/../../../evil", "/evil", "..\\evil", "\0evil"])
def test_a_listing_that_points_outside_writes_nothing_there(desk: Desk, adapter: Files, path: str) -> None:
    desk.hub.add("tiny-org/evil", main={**adapter, path: b"evil"})
    absolute = Path("/evil")
    assert not absolute.exists()
    ran = desk.run("inspect", "tiny-org/evil")
    assert ran.code in (0, 3)
    if ran.code == 3:
        only_complaint(ran, 3, "tiny-org/evil")
    assert not absolute.exists()
    assert [found.name for found in desk.folder.iterdir()] == ["home"]
    commit = desk.hub.commit("tiny-org/evil")
    snapshot = desk.home / "hub" / "models--tiny-org--evil" / "snapshots" / commit
    for found in desk.home.rglob("*evil*"):
        assert found.is_relative_to(snapshot) or found.name == "models--tiny-org--evil", found


def test_a_cache_that_cannot_be_written(desk: Desk, adapter: Files) -> None:
    desk.hub.add("tiny-org/adapter", main=adapter)
    desk.home.write_text("a file")
    ran = desk.run("inspect", "tiny-org/adapter")
    only_complaint(ran, 3, "tiny-org/adapter", "hub cache", str(desk.home))
    assert "HF_HOME" in ran.stderr
