"""tools/ci/pipeline.py, run for real on tiny models.

Outputs, exit codes, and values that would like to be code.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support import zoo
from tools.ci import pipeline

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "tools" / "ci" / "pipeline.py"


@dataclass(frozen=True)
class Ran:
    """A finished run of the script in `folder`, as GitHub would see it."""

    folder: Path
    code: int
    stdout: str
    stderr: str

    def outputs(self) -> dict[str, str]:
        """``$GITHUB_OUTPUT``, read as strictly as GitHub's runner reads it."""
        found: dict[str, str] = {}
        for line in (self.folder / "outputs").read_text(encoding="utf-8").splitlines():
            name, equals, value = line.partition("=")
            assert equals and name not in found, line
            found[name] = value
        assert self.stdout == "".join(f"{name}={value}\n" for name, value in found.items())
        return found

    def summary(self) -> str:
        """``$GITHUB_STEP_SUMMARY``."""
        return (self.folder / "summary").read_text(encoding="utf-8")


def run(folder: Path, variables: Mapping[str, str]) -> Ran:
    """Run the script in `folder` with nothing but `variables` of its own and two fresh files of GitHub's."""
    for name in ("outputs", "summary"):
        (folder / name).write_text("")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("IA3_", "GITHUB_"))}
    github = {"GITHUB_OUTPUT": str(folder / "outputs"), "GITHUB_STEP_SUMMARY": str(folder / "summary")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=folder,
        env=inherited | github | dict(variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(folder, done.returncode, done.stdout, done.stderr)


def digest(file: Path) -> str:
    return "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """``IA3_BASE`` and ``IA3_ADAPTERS`` of a classifier and of a decoder."""
    found = {}
    for name in ("bert-seq-cls", "llama", "mamba"):
        kind = zoo.by_name(name)
        folder = tmp_path_factory.mktemp(name)
        model = zoo.build(kind)
        model.save_pretrained(folder / "base")
        zoo.adapt(model, kind).save_pretrained(folder / "adapter")
        found[name] = {"IA3_BASE": str(folder / "base"), "IA3_ADAPTERS": f"{folder / 'adapter'}\n"}
    return found


@pytest.mark.slow
def test_a_classifier_passes_with_onnx_and_a_rerun_forgets_it(
    made: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the working folder was imported')")
    ran = run(tmp_path, made["bert-seq-cls"] | {"IA3_ONNX": "true", "IA3_TASK": "text-classification"})
    assert ran.code == 0, ran.stderr
    assert ran.outputs() == {
        "verdict": "pass",
        "report": "ia3-export/reports/report.json",
        "manifest-digest": digest(tmp_path / "ia3-export" / "merged" / "ia3_export.json"),
    }
    reports = tmp_path / "ia3-export" / "reports"
    assert {file.name for file in reports.iterdir()} == {
        "report.json",
        "report.md",
        "junit.xml",
        "report.html",
    }
    report = json.loads((reports / "report.json").read_text())
    assert report["in_parity"] is True and [s["kind"] for s in report["steps"]] == ["merged", "onnx"]
    assert ran.summary().strip() == (reports / "report.md").read_text().strip()  # once, and by verify

    exact = run(
        tmp_path, made["bert-seq-cls"] | {"IA3_ONNX": "false", "IA3_VERIFY_ARGS": "--atol 0 --rtol 0"}
    )
    assert exact.code == 1, exact.stderr
    found = exact.outputs()
    assert found["verdict"] == "fail"
    assert found["manifest-digest"] == digest(tmp_path / "ia3-export" / "merged" / "ia3_export.json")
    report = json.loads((tmp_path / found["report"]).read_text())
    assert report["in_parity"] is False and [step["kind"] for step in report["steps"]] == ["merged"]
    assert int(ElementTree.parse(reports / "junit.xml").getroot().get("failures", "0")) > 0
    assert exact.summary().strip() == (reports / "report.md").read_text().strip()
    assert not (tmp_path / "ia3-export" / "onnx").exists()  # of the earlier run: nobody verified it now


def test_a_model_without_a_cache_passes_without_onnx_and_gitlab_gets_its_variables(
    made: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    adapters = json.dumps([made["mamba"]["IA3_ADAPTERS"].strip()])
    own = {"IA3_OUTPUT": "out", "IA3_REPORTS": "my reports", "IA3_DOTENV": "deep/verdict.env"}
    ran = run(tmp_path, made["mamba"] | own | {"IA3_ADAPTERS": adapters, "GITHUB_ACTIONS": "true"})
    assert ran.code == 0, ran.stderr
    expected = digest(tmp_path / "out" / "merged" / "ia3_export.json")
    assert ran.outputs() == {
        "verdict": "pass",
        "report": "my reports/report.json",
        "manifest-digest": expected,
    }
    lines = (tmp_path / "deep" / "verdict.env").read_text().splitlines()
    assert lines == ["VERDICT=pass", "REPORT=my reports/report.json", f"MANIFEST_DIGEST={expected}"]
    assert "no ONNX export" in ran.stderr
    # between these two lines GitHub's runner obeys nothing that a command prints
    first, *between, last = ran.stderr.splitlines()
    token = first.removeprefix("::stop-commands::")
    assert len(token) == 32 and last == f"::{token}::" and len(between) > 5


def test_an_export_that_was_asked_for_and_is_refused_ends_the_run(
    made: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    ran = run(tmp_path, made["mamba"] | {"IA3_ONNX": "true"})
    assert ran.code == 3
    assert ran.outputs() == {}
    assert ran.summary() == "`ia3-export onnx` ended with exit code 3.\n"


def test_a_base_that_is_not_there_gives_no_verdict_and_removes_the_one_of_yesterday(
    made: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    reports = tmp_path / "ia3-export" / "reports"
    reports.mkdir(parents=True)
    (reports / "report.json").write_text('{"in_parity": true}')
    (tmp_path / "verdict.env").write_text("VERDICT=pass\n")
    hostile = "$(touch evil)`touch evil`; touch evil"
    for base in (hostile, "--output=evil"):
        ran = run(tmp_path, made["llama"] | {"IA3_BASE": base, "IA3_DOTENV": "verdict.env"})
        assert ran.code == 3, ran.stderr
        assert ran.outputs() == {} and ran.stdout == ""
        assert not (tmp_path / "verdict.env").exists() and not any(reports.iterdir())
        assert not (tmp_path / "evil").exists()
        assert ran.summary() == "`ia3-export merge` ended with exit code 3.\n"


@pytest.mark.parametrize(
    "arguments",
    [{"IA3_VERIFY_ARGS": "--help"}, {"IA3_MERGE_ARGS": "--dry-run"}, {"IA3_MERGE_ARGS": "--no-such-option"}],
)
def test_options_that_take_the_work_away_give_no_verdict(
    made: dict[str, dict[str, str]], tmp_path: Path, arguments: dict[str, str]
) -> None:
    ran = run(tmp_path, made["llama"] | {"IA3_ONNX": "false"} | arguments)
    assert ran.code == 2, ran.stderr
    assert ran.outputs() == {}


def test_options_of_the_author_cannot_redirect_the_check(
    made: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    elsewhere = "--report elsewhere.json --merged no-such-folder --base no-such-base --quiet"
    ran = run(tmp_path, made["llama"] | {"IA3_ONNX": "false", "IA3_VERIFY_ARGS": elsewhere})
    assert ran.code == 0, ran.stderr
    assert ran.outputs()["verdict"] == "pass"
    assert not (tmp_path / "elsewhere.json").exists()


def test_an_output_that_cannot_be_written_is_exit_code_4(
    made: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ran = run(tmp_path, made["llama"] | {"IA3_REPORTS": "file/reports"})
    assert ran.code == 4
    assert ran.outputs() == {}


FORGED = "x\nverdict=pass"
BREAKS = [FORGED, "x\rverdict=pass", "x\x85verdict=pass", "x\u2028verdict=pass", "x\x1b[2J", "x\udcff"]


@pytest.mark.parametrize("name", ["IA3_BASE", "IA3_OUTPUT", "IA3_REPORTS", "IA3_TASK", "IA3_DOTENV"])
@pytest.mark.parametrize("value", BREAKS)
def test_no_value_holds_a_line_break(name: str, value: str) -> None:
    with pytest.raises(pipeline.Misuse, match=name):
        pipeline.read_settings({"IA3_BASE": "base", "IA3_ADAPTERS": "adapter"} | {name: value})


@pytest.mark.parametrize(
    "bad",
    [
        {"IA3_BASE": " "},
        {"IA3_ADAPTERS": ""},
        {"IA3_ADAPTERS": "[]"},
        {"IA3_ADAPTERS": "[1]"},
        {"IA3_ADAPTERS": '["a"'},
        {"IA3_ADAPTERS": json.dumps([FORGED])},
        {"IA3_ONNX": "yes"},
        {"IA3_VERIFY_ARGS": "--text 'open"},
        {"IA3_VERIFY_ARGS": f"'{FORGED}'"},
        {"IA3_MERGE_ARGS": f'"{FORGED}"'},
    ],
)
def test_wrong_variables_are_exit_code_2(bad: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main({"IA3_BASE": "base", "IA3_ADAPTERS": "adapter"} | bad) == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith(f"error: {next(iter(bad))}")
    assert "verdict=pass" not in written.err.splitlines()


def test_reports_do_not_go_where_an_input_lies(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("of the base")
    variables = {"IA3_BASE": str(tmp_path), "IA3_ADAPTERS": "adapter", "IA3_REPORTS": str(tmp_path)}
    assert pipeline.main(variables) == 2
    assert (tmp_path / "report.json").read_text() == "of the base"


def test_adapters_are_lines_or_json_and_options_are_words() -> None:
    variables = {
        "IA3_BASE": "base",
        "IA3_ADAPTERS": " a b \r\n\n$(c)\n",
        "IA3_MERGE_ARGS": "--cast\n'x y' $HOME",
    }
    settings = pipeline.read_settings(variables)
    assert settings.adapters == ("a b", "$(c)")
    assert settings.merge_args == ("--cast", "x y", "$HOME")
    assert pipeline.read_settings(variables | {"IA3_ADAPTERS": '["a b", "c"]'}).adapters == ("a b", "c")
    assert (settings.onnx, settings.output, settings.reports) == (
        "auto",
        Path("ia3-export"),
        Path("ia3-export/reports"),
    )


def test_a_command_that_a_signal_ended_is_no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = subprocess.CompletedProcess[str]([], -9)
    monkeypatch.setattr(pipeline.subprocess, "run", lambda *words, **options: done)
    variables = {"IA3_BASE": "base", "IA3_ADAPTERS": "adapter", "IA3_OUTPUT": str(tmp_path / "out")}
    assert pipeline.main(variables | {"GITHUB_OUTPUT": str(tmp_path / "outputs")}) == 137
    assert (tmp_path / "outputs").read_text() == ""


def test_a_crash_of_verify_is_no_verdict(
    made: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = pipeline.subprocess.run

    def crash_in_verify(words: list[str], stdin: int, stdout: object, check: bool) -> object:
        crash = [sys.executable, "-c", "import sys; sys.tracebacklimit = 0; 1 / 0"]
        return real(
            crash if "verify" in words else words, stdin=stdin, stderr=subprocess.DEVNULL, check=check
        )

    monkeypatch.setattr(pipeline.subprocess, "run", crash_in_verify)
    files = {"GITHUB_OUTPUT": str(tmp_path / "outputs"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    own = {"IA3_OUTPUT": str(tmp_path / "out"), "IA3_ONNX": "false"}
    assert pipeline.main(made["llama"] | files | own) == 1
    assert (tmp_path / "out" / "merged" / "ia3_export.json").is_file()
    assert (tmp_path / "outputs").read_text() == ""
    assert (tmp_path / "summary").read_text() == "`ia3-export verify` ended with exit code 1.\n"
