#!/usr/bin/env python3
"""Merge, export to ONNX, verify: the one step that the GitHub action, the GitLab component and a shell run.

Run it with the Python that has ia3-export. What to do comes in environment variables (`VARIABLES`), so that
no value ever passes through a shell. The outputs go to stdout, one ``name=value`` a line and nothing else;
what the commands say goes to stderr. The outputs also go to ``$GITHUB_OUTPUT`` and ``$IA3_DOTENV`` where
these are set::

    verdict=pass                                 pass or fail; not there when nothing could be judged
    report=ia3-export/reports/report.json        not there when a check before the report failed
    manifest-digest=sha256:9f2c...               SHA-256 of merged/ia3_export.json

Exit codes are those of ia3-export: 0 exactly with ``verdict=pass``, 1 with ``verdict=fail`` (or, without a
verdict, when `verify` crashed), 2 wrong usage, 3 an input is refused, 4 an output cannot be written.
docs/ci.md has the recipes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Every variable that is read, and what it says.
VARIABLES: Mapping[str, str] = {
    "IA3_BASE": "base model: folder, file or hub id",
    "IA3_ADAPTERS": "adapters in the order of folding: one a line, or a JSON list",
    "IA3_OUTPUT": "folder for merged/, onnx/ and reports/ (default: ia3-export)",
    "IA3_ONNX": "true, false, or auto: export where this version can (default: auto)",
    "IA3_TASK": "--task of ia3-export onnx (default: inferred)",
    "IA3_MERGE_ARGS": "more options of ia3-export merge, quoted as in a shell",
    "IA3_VERIFY_ARGS": "more options of ia3-export verify, quoted as in a shell",
    "IA3_REPORTS": "folder for the reports (default: reports/ in IA3_OUTPUT)",
    "IA3_DOTENV": "file for VERDICT, REPORT and MANIFEST_DIGEST, for GitLab (default: none)",
    "GITHUB_OUTPUT": "file for the outputs, set by GitHub",
    "GITHUB_STEP_SUMMARY": "file for the summary, set by GitHub; verify appends its report",
    "GITHUB_ACTIONS": "true in a GitHub workflow: lines of the log are no workflow commands then",
}

#: Option of verify -> file in the folder of the reports.
REPORTS: Mapping[str, str] = {
    "report": "report.json",
    "markdown": "report.md",
    "junit": "junit.xml",
    "html": "report.html",
}

_MANIFEST = "ia3_export.json"
_PASSED, _FAILED, _MISUSED, _REFUSED, _NOT_WRITTEN, _INTERRUPTED = 0, 1, 2, 3, 4, 130


class Misuse(Exception):
    """A variable that cannot be understood; ends with exit code 2."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The variables, checked. No string here holds a line break, so none can forge an output."""

    base: str
    adapters: tuple[str, ...]
    output: Path
    onnx: str
    task: str
    merge_args: tuple[str, ...]
    verify_args: tuple[str, ...]
    reports: Path
    dotenv: Path | None


@dataclass(frozen=True, slots=True)
class Result:
    """Where the steps ended, and with which exit code.

    `manifest` is that of the merge, once it is written.
    """

    command: str
    code: int
    manifest: Path | None = None


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ`. Raises `Misuse`."""
    output = Path(_line(environ, "IA3_OUTPUT") or "ia3-export")
    base = _line(environ, "IA3_BASE")
    if not base:
        raise Misuse("IA3_BASE is not set")
    onnx = _line(environ, "IA3_ONNX") or "auto"
    if onnx not in ("true", "false", "auto"):
        raise Misuse(f"IA3_ONNX is {onnx!r}, not true, false or auto")
    adapters = _adapters(environ)
    reports = Path(_line(environ, "IA3_REPORTS") or output / "reports")
    for source in map(Path, (base, *adapters)):
        # reports of an earlier run are removed, which must not reach a file of an input
        if source.is_dir() and reports.resolve().is_relative_to(source.resolve()):
            raise Misuse(f"the folder for the reports, {reports}, lies in {source}")
    dotenv = _line(environ, "IA3_DOTENV")
    return Settings(
        base=base,
        adapters=adapters,
        output=output,
        onnx=onnx,
        task=_line(environ, "IA3_TASK"),
        merge_args=_words(environ, "IA3_MERGE_ARGS"),
        verify_args=_words(environ, "IA3_VERIFY_ARGS"),
        reports=reports,
        dotenv=Path(dotenv) if dotenv else None,
    )


def run_steps(settings: Settings) -> Result:
    """Merge, export, verify; stops at the first command that does not end well."""
    merged, onnx = settings.output / "merged", settings.output / "onnx"
    # what an earlier run left must not be taken for this one's
    stale = [settings.reports / name for name in REPORTS.values()]
    for path in [*stale, settings.dotenv]:
        if path is not None:
            path.unlink(missing_ok=True)
    if (onnx / _MANIFEST).is_file():
        shutil.rmtree(onnx)
    # "--name=value" holds for values that begin with a dash; the last of two equal options counts, so ours
    # are last
    trained = [f"--base={settings.base}", *(f"--adapter={adapter}" for adapter in settings.adapters)]
    code = _ia3_export("merge", *settings.merge_args, *trained, f"--output={merged}", "--overwrite")
    if code != _PASSED:
        return Result("merge", code)
    manifest = merged / _MANIFEST
    if not manifest.is_file():
        raise Misuse("merge wrote nothing: IA3_MERGE_ARGS must leave the merge as it is")
    artifacts = [f"--merged={merged}"]
    if settings.onnx != "false":
        task = [f"--task={settings.task}"] if settings.task else []
        code = _ia3_export("onnx", f"--model={merged}", *task, f"--output={onnx}", "--overwrite")
        if code == _PASSED:
            artifacts.append(f"--onnx={onnx}")
        elif code == _REFUSED and settings.onnx == "auto":
            _say("no ONNX export of this model, so none is verified; IA3_ONNX=true makes that an error")
        else:
            return Result("onnx", code, manifest)
    targets = [f"--{option}={settings.reports / name}" for option, name in REPORTS.items()]
    code = _ia3_export("verify", *settings.verify_args, *trained, *artifacts, *targets)
    if code == _PASSED and not _in_parity(settings.reports / REPORTS["report"]):
        raise Misuse("verify judged nothing: IA3_VERIFY_ARGS must leave the verification as it is")
    return Result("verify", code, manifest)


def outputs(settings: Settings, result: Result) -> dict[str, str]:
    """The outputs of a finished run: none when nothing was judged."""
    report = settings.reports / REPORTS["report"]
    # Python's own exit code after a traceback is 1 too; only a report makes that of verify a verdict
    judged = result.command != "verify" or report.is_file()
    if result.code not in (_PASSED, _FAILED) or not judged:
        return {}
    found = {"verdict": "pass" if result.code == _PASSED else "fail"}
    if report.is_file():
        found["report"] = str(report)
    if result.manifest is not None:
        digest = hashlib.sha256(result.manifest.read_bytes()).hexdigest()
        found["manifest-digest"] = f"sha256:{digest}"
    return found


def write_outputs(settings: Settings, found: Mapping[str, str], environ: Mapping[str, str]) -> None:
    """To stdout and to the files that ask for them."""
    lines = [f"{name}={value}\n" for name, value in found.items()]
    sys.stdout.writelines(lines)
    if environ.get("GITHUB_OUTPUT"):
        with Path(environ["GITHUB_OUTPUT"]).open("a", encoding="utf-8") as file:
            file.writelines(lines)
    if settings.dotenv is not None and found:
        settings.dotenv.parent.mkdir(parents=True, exist_ok=True)
        names = [f"{name.upper().replace('-', '_')}={value}\n" for name, value in found.items()]
        settings.dotenv.write_text("".join(names), encoding="utf-8")


def main(environ: Mapping[str, str]) -> int:
    """Run everything; returns the exit code."""
    try:
        settings = read_settings(environ)
        with _no_workflow_commands(environ):
            result = run_steps(settings)
        found = outputs(settings, result)
        if result.code != _PASSED and "report" not in found:
            _summarize(f"`ia3-export {result.command}` ended with exit code {result.code}.", environ)
        write_outputs(settings, found, environ)
        return result.code
    except Misuse as error:
        _say(f"error: {error}")
        return _MISUSED
    except OSError as error:
        _say(f"error: {error.filename or 'an output'} cannot be written: {error.strerror}")
        return _NOT_WRITTEN
    except KeyboardInterrupt:
        return _INTERRUPTED


def _line(environ: Mapping[str, str], name: str) -> str:
    return _without_control(name, environ.get(name, "").strip())


def _words(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    try:
        words = shlex.split(environ.get(name, ""))
    except ValueError as error:
        raise Misuse(f"{name} is not quoted as in a shell: {error}") from None
    return tuple(_without_control(name, word) for word in words)


def _adapters(environ: Mapping[str, str]) -> tuple[str, ...]:
    text = environ.get("IA3_ADAPTERS", "").strip()
    entries: list[object] = list(text.splitlines())
    if text.startswith("["):
        try:
            entries = json.loads(text)
        except ValueError:
            raise Misuse("IA3_ADAPTERS begins with [ and is no JSON list") from None
    names = [entry.strip() for entry in entries if isinstance(entry, str)]
    if len(names) < len(entries) or not any(names):
        raise Misuse("IA3_ADAPTERS names no adapter; give one a line, or a JSON list of strings")
    return tuple(_without_control("IA3_ADAPTERS", name) for name in names if name)


def _without_control(name: str, value: str) -> str:
    """`value`, unless it holds line breaks, other control characters or bytes that are no UTF-8."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
        raise Misuse(f"{name} holds a line break or another control character")
    return value


def _ia3_export(command: str, *words: str) -> int:
    """Run a command of ia3-export; its exit code, or 128 + the signal that ended it."""
    _say(f"$ ia3-export {shlex.join([command, *words])}")
    # -P: no file of the working folder, say a torch.py, is imported. stdout is for the outputs alone
    argv = [sys.executable, "-P", "-m", "ia3_export", command, *words]
    code = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode
    return code if code >= 0 else 128 - code


def _in_parity(report: Path) -> bool:
    """Whether the report is there and says so: ``--help`` among the arguments also exits with 0."""
    return report.is_file() and json.loads(report.read_text(encoding="utf-8"))["in_parity"] is True


@contextmanager
def _no_workflow_commands(environ: Mapping[str, str]) -> Iterator[None]:
    """GitHub runs lines like ``::set-output name=verdict::pass`` of a log, which an adapter's names reach."""
    if environ.get("GITHUB_ACTIONS") != "true":
        yield
        return
    token = secrets.token_hex(16)
    _say(f"::stop-commands::{token}")
    try:
        yield
    finally:
        _say(f"::{token}::")


def _summarize(text: str, environ: Mapping[str, str]) -> None:
    """The step's summary where `verify` has not written its own."""
    if environ.get("GITHUB_STEP_SUMMARY"):
        with Path(environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(os.environ))
