"""action.yml, templates/verify.yml, docs/ci.md and install.sh.

Well formed, of one mind with the script, and safe.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ia3_export.cli import cli
from tests.ci.test_pipeline import ROOT
from tools.ci import pipeline

ACTION = (ROOT / "action.yml").read_text(encoding="utf-8")
TEMPLATE = (ROOT / "templates" / "verify.yml").read_text(encoding="utf-8")
DOCS = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
OUTPUTS = {"verdict", "report", "manifest-digest"}


def tool(*words: str, text: str = "") -> None:
    """Run a program of the environment; its complaints are the failure of the test."""
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def action() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(ACTION)
    return loaded


def template() -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and job of the component as it stands."""
    header, jobs = yaml.safe_load_all(TEMPLATE)
    (job,) = jobs.values()
    return header["spec"]["inputs"], job


def interpolated(values: dict[str, Any]) -> dict[str, Any]:
    """The job with `values` put in as GitLab does: into the text, strings as they are, all else as JSON."""
    defaults = {name: spec.get("default", "") for name, spec in template()[0].items()}

    def value(match: re.Match[str]) -> str:
        found = (defaults | values)[match[1]]
        return found if isinstance(found, str) else json.dumps(found)

    text = re.sub(r"\$\[\[ inputs\.([a-z-]+) \]\]", value, TEMPLATE.split("\n---\n")[1])
    assert "$[[" not in text
    (job,) = yaml.safe_load(text).values()
    return dict(job)


def fenced(language: str) -> list[str]:
    """The code blocks of docs/ci.md in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


def options(command: str) -> set[str]:
    return {name for parameter in cli.commands[command].params for name in parameter.opts}


# ---------------------------------------------------------------------------------------------- action.yml


def test_the_action_fits_githubs_schema() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.github-actions", str(ROOT / "action.yml"))


def test_the_action_has_the_outputs_of_the_script() -> None:
    steps = {step["id"]: step for step in action()["runs"]["steps"] if "id" in step}
    assert set(action()["outputs"]) == OUTPUTS
    for name, output in action()["outputs"].items():
        assert output["value"] == f"${{{{ steps.pipeline.outputs.{name} }}}}"
    assert "tools/ci/pipeline.py" in steps["pipeline"]["run"]
    assert set(re.findall(r"steps\.(\w+)\.", ACTION)) == set(steps)


def test_no_expression_stands_in_a_script_of_the_action() -> None:
    scripts = [step["run"] for step in action()["runs"]["steps"] if "run" in step]
    assert len(scripts) == 2
    for step in action()["runs"]["steps"]:
        assert "${{" not in step.get("run", "") and "${{" not in step.get("shell", "")
        assert "GITHUB_STEP_SUMMARY" not in step.get(
            "run", ""
        )  # verify writes it; twice would be once too often


def test_the_action_uses_all_its_inputs_and_no_others() -> None:
    used = set(re.findall(r"inputs\.([a-z-]+)", ACTION))
    assert used == set(action()["inputs"])
    for name, spec in action()["inputs"].items():
        assert spec["description"] and ("default" in spec) != spec.get("required", False), name


def test_the_action_sets_variables_that_the_scripts_read() -> None:
    install = (ROOT / "tools" / "ci" / "install.sh").read_text()
    for step in action()["runs"]["steps"]:
        for name in step.get("env", {}):
            here = f"${name}" in step["run"]
            installs = "install.sh" in step["run"] and f"${{{name}" in install
            assert here or installs or name in pipeline.VARIABLES, name


def test_files_that_the_action_and_the_component_name_exist() -> None:
    named = re.findall(r"(?:\$GITHUB_ACTION_PATH|\$tool/source)/([\w./-]+)", ACTION + TEMPLATE)
    assert sorted(set(named)) == ["tools/ci/install.sh", "tools/ci/pipeline.py"]
    assert all((ROOT / name).is_file() for name in named)


def test_actions_of_others_are_pinned_to_a_commit() -> None:
    used = re.findall(r"uses: (\S+)(.*)", ACTION)
    assert len(used) == 2
    for name, comment in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name)
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)


def test_reports_are_uploaded_whatever_the_verdict() -> None:
    upload = action()["runs"]["steps"][-1]
    assert upload["uses"].startswith("actions/upload-artifact@")
    assert upload["if"].startswith("always()")


# ---------------------------------------------------------------------------------------------- GitLab


@pytest.mark.parametrize("part", [0, 1])
def test_the_component_fits_gitlabs_schema(part: int, tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    file.write_text(json.dumps(list(yaml.safe_load_all(TEMPLATE))[part]))
    words = ["--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci", str(file)]
    tool("check-jsonschema", *words)


def test_the_component_uses_all_its_inputs_and_keeps_them_out_of_scripts() -> None:
    inputs, job = template()
    body = TEMPLATE.split("\n---\n")[1]
    assert set(re.findall(r"inputs\.([a-z-]+)", body)) == set(inputs)
    assert not any("$[[" in line for line in job["script"])
    script = "\n".join(job["script"])
    install = (ROOT / "tools" / "ci" / "install.sh").read_text()
    for name in job["variables"]:
        assert f"${name}" in script or f"${{{name}" in install or name in pipeline.VARIABLES, name
    for name, spec in inputs.items():
        closed = "options" in spec or spec.get("type") == "array"
        assert closed or re.search(spec["regex"].replace(r"\z", r"\Z"), "a\nb") is None, name


def test_the_component_hands_over_junit_and_outputs_whatever_the_verdict() -> None:
    job = interpolated({"output": "out", "adapters": ["a"]})
    assert job["artifacts"] == {
        "when": "always",
        "paths": ["out/reports"],
        "reports": {"junit": "out/reports/junit.xml", "dotenv": "out/verdict.env"},
    }
    assert job["variables"]["IA3_DOTENV"] == "out/verdict.env"
    settings = pipeline.read_settings(job["variables"] | {"IA3_BASE": "base"})
    assert str(settings.reports / "junit.xml") == job["artifacts"]["reports"]["junit"]


@pytest.mark.parametrize(
    "value", ["a: 'b' \"c\" # d", "{x}", "*y", "true", "1.0", "$(touch evil)", "- z", "|"]
)
def test_values_arrive_as_they_are_through_gitlabs_text_interpolation(value: str) -> None:
    texts = ["source", "ref", "base", "output", "task", "merge-args", "verify-args", "image", "torch-index"]
    given = dict.fromkeys(texts, value)
    job = interpolated(given | {"adapters": [value, "x\nvariables: {}", 'a"b']})
    found = job["variables"]
    for name in ("SOURCE", "REF", "BASE", "TASK", "MERGE_ARGS", "VERIFY_ARGS"):
        assert found[f"IA3_{name}"] == value
    assert json.loads(found["IA3_ADAPTERS"]) == [value, "x\nvariables: {}", 'a"b']
    assert job["image"] == value and job["artifacts"]["paths"] == [f"{value}/reports"]


def test_scripts_are_clean() -> None:
    tool("shellcheck", str(ROOT / "tools" / "ci" / "install.sh"))
    scripts = [step["run"] for step in action()["runs"]["steps"] if "run" in step]
    for script in [*scripts, "\n".join(template()[1]["script"])]:
        tool("shellcheck", "--shell=bash", "-", text=script)


# ---------------------------------------------------------------------------------------------- installing


@pytest.mark.parametrize(("index", "expected"), [(None, "https://download.pytorch.org/whl/cpu"), ("", "")])
def test_torch_is_installed_first_and_under_the_constraints(
    tmp_path: Path, index: str | None, expected: str
) -> None:
    log = tmp_path / "log"
    stub = tmp_path / "python"
    # writes down how it was called, and makes a "virtual environment" that does the same
    stub.write_text(
        "#!/bin/sh\n"
        'for word; do printf "%s\\t" "$word"; done >>"$LOG"; echo >>"$LOG"\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi\n'
    )
    stub.chmod(0o755)
    folder = tmp_path / "my venv"
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "LOG": str(log)}
    env |= {} if index is None else {"TORCH_INDEX": index}
    subprocess.run(["bash", str(ROOT / "tools" / "ci" / "install.sh"), str(folder)], env=env, check=True)
    venv, torch, package = [line.rstrip("\t").split("\t") for line in log.read_text().splitlines()]
    pip = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    assert venv == ["-m", "venv", str(folder)]
    assert torch == [*pip, *(["--index-url", expected] if expected else []), "torch"]
    assert package == [*pip, f"{ROOT}[cpu]"]


# ---------------------------------------------------------------------------------------------- docs/ci.md


def test_the_page_names_every_variable_input_and_output_and_no_others() -> None:
    ours = {name for name in pipeline.VARIABLES if name.startswith("IA3_")}
    assert set(re.findall(r"IA3_[A-Z_]+", DOCS)) == ours
    table = DOCS.split("| input |")[1].split("\n\n")[0]
    assert set(
        re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)))
    ) == set(action()["inputs"])
    for name in OUTPUTS:
        assert f"| `{name}` | `{name.upper().replace('-', '_')}` |" in DOCS
    for name in pipeline.REPORTS.values():
        assert f"| `{name}` |" in DOCS
    only_gitlab = set(template()[0]) - set(action()["inputs"])
    assert only_gitlab == {"source", "ref", "job-name", "stage", "image"}
    assert set(action()["inputs"]) - set(template()[0]) == {"install", "python-version", "artifact-name"}


def test_examples_of_the_page_are_yaml_with_inputs_that_exist() -> None:
    github, gitlab = map(yaml.safe_load, fenced("yaml"))
    for own in ("parity", "release"):
        assert "${{" not in "".join(step.get("run", "") for step in github["jobs"][own]["steps"])
    (step,) = [s for s in github["jobs"]["parity"]["steps"] if "ia3-export" in s.get("uses", "")]
    required = {name for name, spec in action()["inputs"].items() if spec.get("required")}
    assert required <= set(step["with"]) <= set(action()["inputs"])
    given = gitlab["include"][0]["inputs"]
    required = {name for name, spec in template()[0].items() if "default" not in spec}
    assert required <= set(given) <= set(template()[0])
    assert template()[0]["job-name"]["default"] in gitlab
    assert set(re.findall(r"outputs\.([a-z-]+)", fenced("yaml")[0])) <= OUTPUTS | {"digest"}


def test_the_workflow_of_the_page_fits_githubs_schema(tmp_path: Path) -> None:
    file = tmp_path / "parity.yml"
    file.write_text(fenced("yaml")[0])
    tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(file))


def test_commands_of_the_page_are_commands_with_options_that_exist() -> None:
    lines = "\n".join(fenced("sh")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("ia3-export ")]
    assert [words[1] for words in commands] == ["merge", "onnx", "verify"]
    for words in commands:
        command = cli.commands[words[1]]
        assert isinstance(command, click.Command)
        command.make_parser(click.Context(command, help_option_names=["-h", "--help"])).parse_args(words[2:])
    assert set(re.findall(r"`[a-z-]+: (--[a-z-]+)`", DOCS)) <= options("verify")
    for script in fenced("sh"):
        tool("shellcheck", "--shell=bash", "-", text=script)


def test_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", DOCS):
        assert (ROOT / "docs" / target).exists(), target
