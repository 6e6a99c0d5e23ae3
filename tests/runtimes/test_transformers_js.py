"""transformers.js, in Node and in a real browser, answers as the unmerged PyTorch model.

So does the sample page.

One Node process and one browser take all models; what they say is kept for the workers of pytest-xdist.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.runtimes.models import NEW_TOKENS, RECIPES, Exported

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

JAVASCRIPT = Path(__file__).parent / "javascript"
SERVER = Path(__file__).parents[2] / "samples" / "browser" / "serve.py"
# transformers.js's names of fp32, int8, q8 and int4
DTYPES = {
    "fp32": "model.onnx",
    "int8": "model_int8.onnx",
    "q8": "model_quantized.onnx",
    "q4": "model_q4.onnx",
}
QUANTIZED = ("llama", "gpt2", "bert", "masked", "vit")
# What Chromium itself asks for in spite of all switches; a page's requests are in `visited`.
BROWSERS_OWN = ("googleapis.com", "google.com", "gstatic.com", "gvt1.com")

# A template under which the llama is asked its first input, whoever types this.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] | replace('dog', 'cat') }}{% endfor %}"
_SAID_TO_CHAT = RECIPES["llama"].inputs[0].replace("cat", "dog")

Get = Callable[[str], Exported]
Answers = dict[str, Any]


def _node() -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (JAVASCRIPT / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip(f"transformers.js is not installed: npm ci --ignore-scripts --prefix {JAVASCRIPT}")
    return node


def _chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)}")
    return found


def _jobs() -> list[dict[str, Any]]:
    return [
        {
            "task": recipe.task,
            "model": f"{name}/exported",
            "dtype": dtype,
            "inputs": recipe.inputs,
            "new_tokens": NEW_TOKENS,
        }
        for name, recipe in RECIPES.items()
        for dtype in DTYPES
    ]


def _scenes() -> dict[str, dict[str, Any]]:
    """What is typed into the sample page: how many of a model's inputs."""
    typed = {"bert": 1, "llama": 1, "t5": 1, "sentence": 2, "vit": 0}
    scenes: dict[str, dict[str, Any]] = {
        name: {
            "query": {"model": f"{name}/exported", "dtype": "fp32"},
            "texts": RECIPES[name].inputs[:fields],
        }
        for name, fields in typed.items()
    }
    chat = {"query": {"model": "chat/exported", "dtype": "fp32"}, "texts": [_SAID_TO_CHAT]}
    return {**scenes, "t5 stopped": {**scenes["t5"], "stop": True}, "chat": chat}


def _once(file: Path, ask: Callable[[], Answers]) -> Answers:
    """What `ask` gives, asked by one worker and kept in `file`."""
    from filelock import FileLock

    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(ask()))
    answers: Answers = json.loads(file.read_text())
    return answers


def _run(node: str, script: str, given: Answers, jobs: list[dict[str, Any]]) -> Answers:
    """What `script` says to `jobs`, by the model's name and the precision."""
    done = subprocess.run(
        [node, JAVASCRIPT / script],
        input=json.dumps({**given, "jobs": jobs}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: Answers = json.loads(done.stdout)
    names = [f"{job['model'].split('/')[0]} {job['dtype']}" for job in jobs]
    return {**said, "results": dict(zip(names, said["results"], strict=True))}


@contextmanager
def _serve(*folders: Path, cwd: Path) -> Iterator[str]:
    """The sample's server as a process of its own; its address."""
    command = [sys.executable, SERVER, *folders, "--port", "0", "--node-modules", JAVASCRIPT / "node_modules"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def in_node(exported: Get, runtimes_folder: Path) -> Answers:
    """What transformers.js says in Node."""
    node = _node()

    def ask() -> Answers:
        for name in RECIPES:
            exported(name)
        return _run(node, "node.mjs", {"models": f"{runtimes_folder}/"}, _jobs())

    return _once(runtimes_folder / "node.json", ask)


@pytest.fixture(scope="session")
def in_browser(exported: Get, runtimes_folder: Path) -> Answers:
    """What transformers.js says in Chromium, and what the sample page shows there."""
    node, chromium = _node(), _chromium()

    def ask() -> Answers:
        # from the other end than `in_node`: two workers meet in the middle
        folders = [exported(name).folder.relative_to(runtimes_folder) for name in reversed(RECIPES)]
        chat = runtimes_folder / "chat" / "exported"
        shutil.copytree(exported("llama").folder, chat)
        (chat / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
        folders.append(chat.relative_to(runtimes_folder))
        with _serve(*folders, cwd=runtimes_folder) as origin:
            given = {"executable": chromium, "origin": origin, "scenes": list(_scenes().values())}
            said = _run(node, "browser.mjs", given, _jobs())
        acted = dict(zip(_scenes(), said["acted"], strict=True))
        return {**said, "acted": acted, "origin": origin}

    return _once(runtimes_folder / "browser.json", ask)


@pytest.fixture(params=["in_node", "in_browser"])
def said(request: pytest.FixtureRequest) -> Answers:
    answers: Answers = request.getfixturevalue(request.param)
    return answers


@pytest.mark.parametrize("name", RECIPES)
def test_float32_gives_the_answers_of_the_unmerged_pytorch_model(
    said: Answers, exported: Get, name: str
) -> None:
    model, result = exported(name), said["results"][f"{name} fp32"]
    assert "error" not in result, result
    answers = result["answers"]
    for given, expected in zip(answers, model.expected, strict=True):
        if "tokens" in given:
            assert given["tokens"] == expected
        else:
            # float32 on both sides, sums in another order
            np.testing.assert_allclose(given["output"], expected, rtol=0, atol=3e-5 * np.abs(expected).max())
    if model.input_ids:
        assert [tuple(given["ids"]) for given in answers] == list(model.input_ids)


@pytest.mark.versions
def test_files_of_these_releases_answer_in_node(exported: Get, runtimes_folder: Path) -> None:
    """The same for two models alone.

    Quick enough to be run with other releases of the libraries that export.
    """
    names = ("llama", "bert")
    jobs = [job for job in _jobs() if job["model"].split("/")[0] in names and job["dtype"] in ("fp32", "q8")]
    models = {name: exported(name) for name in names}
    results = _run(_node(), "node.mjs", {"models": f"{runtimes_folder}/"}, jobs)["results"]
    assert [given["tokens"] for given in results["llama fp32"]["answers"]] == list(models["llama"].expected)
    answers = [given["output"] for given in results["bert fp32"]["answers"]]
    np.testing.assert_allclose(answers, models["bert"].expected, rtol=0, atol=1e-4)
    for name in names:
        assert "error" not in results[f"{name} q8"], results[f"{name} q8"]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_pipeline_names_labels_with_their_probabilities(said: Answers, exported: Get, name: str) -> None:
    model = exported(name)
    labels = json.loads((model.folder / "config.json").read_text())["id2label"]
    for given, logits in zip(said["results"][f"{name} fp32"]["answers"], model.expected, strict=True):
        expected = sorted(zip(_softmax(logits), labels.values(), strict=True), reverse=True)
        assert [row["label"] for row in given["said"]] == [label for _, label in expected]
        assert [row["score"] for row in given["said"]] == pytest.approx([p for p, _ in expected], abs=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_the_pipeline_says_the_text_of_the_tokens(said: Answers, exported: Get, name: str) -> None:
    model = exported(name)
    for given, tokens in zip(said["results"][f"{name} fp32"]["answers"], model.expected, strict=True):
        assert given["said"].strip() == _decode(model, tokens).strip()


@pytest.mark.parametrize("dtype", ["int8", "q8", "q4"])
@pytest.mark.parametrize("name", RECIPES)
def test_quantized_files_load_and_answer(said: Answers, exported: Get, name: str, dtype: str) -> None:
    result = said["results"][f"{name} {dtype}"]
    assert "error" not in result, result
    for given, expected in zip(result["answers"], exported(name).expected, strict=True):
        got = given.get("tokens", given.get("output"))
        assert np.shape(got) == np.shape(expected)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("dtype", ["int8", "q8", "q4"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_files_compute_what_they_compute_in_python(
    said: Answers, exported: Get, name: str, dtype: str
) -> None:
    model = exported(name)
    for i, given in enumerate(said["results"][f"{name} {dtype}"]["answers"]):
        expected = _in_python(model, DTYPES[dtype], i)
        # kernels of other builds round activations to 8 bits at other places
        # MatMulNBits rounds activations to 8 bits, and not every build in the same way
        np.testing.assert_allclose(given["output"], expected, rtol=0, atol=0.04 * np.abs(expected).max())


def test_nothing_asks_for_another_machine(in_node: Answers, in_browser: Answers) -> None:
    assert in_node["requests"] == []
    assert in_browser["visited"] == [urlsplit(in_browser["origin"]).netloc]
    hosts = {urlsplit(url if "//" in url else f"//{url}").hostname for url in in_browser["requests"]}
    assert not [host for host in hosts if host is None or not host.endswith(BROWSERS_OWN)]


def test_the_page_shows_the_label_of_a_typed_sentence(in_browser: Answers, exported: Get) -> None:
    model, seen = exported("bert"), in_browser["acted"]["bert"]
    labels = json.loads((model.folder / "config.json").read_text())["id2label"].values()
    rows = sorted(zip(_softmax(model.expected[0]), labels, strict=True), reverse=True)
    assert seen["bars"] == [[label, f"{100 * p:.1f}%"] for p, label in rows]
    assert (seen["state"], seen["complaints"]) == ("ready", [])
    assert seen["traffic"].startswith("0 requests left this machine")


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_page_writes_on(in_browser: Answers, exported: Get, name: str) -> None:
    model, seen = exported(name), in_browser["acted"][name]
    said = _decode(model, model.expected[0])
    # the page writes on after these tokens, and the last of them may be half a character
    start = (model.inputs[0] if name == "llama" else "") + said.rstrip("\N{REPLACEMENT CHARACTER}\x05")
    assert len(said) >= NEW_TOKENS
    assert seen["text"].startswith(start)
    assert (seen["state"], seen["complaints"]) == ("ready", [])


def test_the_page_puts_a_question_into_the_chat_template(in_browser: Answers, exported: Get) -> None:
    model, seen = exported("llama"), in_browser["acted"]["chat"]
    assert model.inputs[0] != _SAID_TO_CHAT
    said = _decode(model, model.expected[0]).rstrip("\N{REPLACEMENT CHARACTER}\x05")
    assert len(said) >= NEW_TOKENS
    assert seen["text"].lstrip().startswith(said.lstrip())
    assert (seen["state"], seen["complaints"]) == ("ready", [])


def test_the_page_stops_writing_when_asked_to(in_browser: Answers) -> None:
    whole, stopped = in_browser["acted"]["t5"], in_browser["acted"]["t5 stopped"]
    assert stopped["state"] == "ready"
    assert 0 < len(stopped["text"]) < len(whole["text"]) / 2
    assert whole["text"].startswith(stopped["text"])


def test_the_page_compares_two_sentences(in_browser: Answers, exported: Get) -> None:
    one, other = (np.array(vector) / np.linalg.norm(vector) for vector in exported("sentence").expected[:2])
    assert in_browser["acted"]["sentence"]["bars"] == [["similarity", f"{one @ other:.3f}"]]


def test_the_page_says_when_it_has_no_form_for_a_task(in_browser: Answers) -> None:
    seen = in_browser["acted"]["vit"]
    assert seen["state"] == "error"
    assert "no form for image-classification" in seen["text"] and "text-classification" in seen["text"]


def test_the_server_gives_the_page_models_and_libraries_and_nothing_else(
    exported: Get, runtimes_folder: Path
) -> None:
    _node()
    with _serve(exported("bert").folder, cwd=runtimes_folder) as origin:
        host = urlsplit(origin)

        def get(path: str, name: str | None = None) -> tuple[int, str | None]:
            connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=10)
            connection.request("GET", path, headers={"Host": name or host.netloc})
            answer = connection.getresponse()
            connection.close()
            return answer.status, answer.getheader("Content-Type")

        model = "/models/bert/exported"
        assert get("/") == (200, "text/html")
        assert get("/main.js") == (200, "text/javascript")
        assert get(f"{model}/config.json") == (200, "application/json")
        wasm = "/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded"
        assert get(f"{wasm}.wasm") == (200, "application/wasm")
        assert get(f"{wasm}.mjs") == (200, "text/javascript")
        for path in (
            f"{model}/../base/config.json",
            f"{model}/%2e%2e/base/config.json",
            f"{model}/..%2fbase/config.json",
            f"{model}//etc/passwd",
            f"{model}/",
            "/models/",
            "//etc/passwd",
            "/serve.py",
            "/package.json",
            "/node_modules/playwright-core/package.json",
            "/node_modules/onnxruntime-web/../playwright-core/package.json",
        ):
            assert get(path)[0] == 404, path
        assert get("/", "evil.example")[0] == get("/models.json", "127.0.0.1.evil.example")[0] == 403


def test_the_page_has_the_transformers_js_that_is_tested_here() -> None:
    tested, sample = (
        json.loads((folder / "package-lock.json").read_text())["packages"]
        for folder in (JAVASCRIPT, SERVER.parent)
    )
    for package in ("@huggingface/transformers", "onnxruntime-web"):
        entry = f"node_modules/{package}"
        assert sample[entry]["integrity"] == tested[entry]["integrity"]


def test_the_server_says_what_is_missing(tmp_path: Path) -> None:
    for arguments, hint in (([tmp_path], "ia3-export onnx"), (["--node-modules", tmp_path], "npm ci")):
        if hint == "npm ci":
            (tmp_path / "onnx").mkdir()
            (tmp_path / "ia3_export.json").write_text("{}")
            arguments = [tmp_path, *arguments]
        done = subprocess.run(
            [sys.executable, SERVER, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and hint in done.stderr


def _softmax(logits: Any) -> Any:
    powers = np.exp(np.asarray(logits) - np.max(logits))
    return powers / powers.sum()


def _decode(model: Exported, tokens: list[int]) -> str:
    from transformers import AutoTokenizer

    text: str = AutoTokenizer.from_pretrained(model.folder).decode(tokens, skip_special_tokens=True)
    return text


def _session(model: Exported, file: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(model.folder / "onnx" / file), providers=["CPUExecutionProvider"])


def _in_python(model: Exported, file: str, i: int) -> Any:
    """The first output of `file` for input `i` by Python's ONNX Runtime, in the form of `answers.mjs`."""
    session = _session(model, file)
    if model.task == "image-classification":
        pixels = np.asarray(model.inputs[i], dtype=np.float32).transpose(2, 0, 1)[None]
        return session.run(["logits"], {"pixel_values": (pixels / 255 - 0.5) / 0.5})[0][0]
    ids = np.array([model.input_ids[i]])
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.arange(ids.size)[None],
    }
    logits = session.run(
        ["logits"], {x.name: known[x.name] if x.name in known else _empty(x) for x in session.get_inputs()}
    )
    if model.task == "text-generation":
        return logits[0][0, -1]
    if model.task == "fill-mask":
        return logits[0][0, list(ids[0]).index(_mask(model))]
    return logits[0][0]


def _empty(node: Any) -> Any:
    """The keys or values of no token: (batch, heads, past length, head size)."""
    _, heads, _, size = node.shape
    return np.zeros((1, heads, 0, size), dtype=np.float32)


def _mask(model: Exported) -> int:
    from transformers import AutoTokenizer

    token: int = AutoTokenizer.from_pretrained(model.folder).mask_token_id
    return token
