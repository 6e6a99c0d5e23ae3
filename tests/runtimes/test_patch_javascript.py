"""javascript/ia3patch.mjs makes the bytes that numpy makes and refuses what Python refuses.

In Node, and in a page in a real browser that switches between tasks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ia3_export
from ia3_export.checkpoint.header import write_header
from ia3_export.errors import IA3ExportError
from ia3_export.fold import Workspace
from ia3_export.patching.format import Copy, FileChange, FileState, FoldRule, Stored, read_patch, to_metadata
from ia3_export.patching.reverse import write_reverse
from ia3_export.patching.rule import fold_records
from tests.e2e.command import contents, merge, run
from tests.patching import test_patch_file as malformed
from tests.support import zoo
from tests.support.patches import edit_patch, write_merge, write_patch
from tests.support.quantized import adapter_for, source_of

pytestmark = pytest.mark.filterwarnings("ignore")

MODULE = Path(__file__).parents[2] / "javascript" / "ia3patch.mjs"
JAVASCRIPT = Path(__file__).parent / "javascript"
TASKS = ("ask", "sing", "sleep")
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def run_node(script: str, given: dict[str, Any]) -> Any:
    """What `script` says to `given`."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    done = subprocess.run(
        [node, JAVASCRIPT / script],
        input=json.dumps(given, default=str),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_node(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the module makes of `jobs`, all in one process."""
    said: list[dict[str, Any]] = run_node("patch.mjs", {"module": MODULE.as_uri(), "jobs": jobs})
    assert len(said) == len(jobs)
    return said


def in_browser(files: Path, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page's functions give for `jobs`, all in one Chromium, which has the folder `files`."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)}")
    for package in ("playwright-core", "onnxruntime-web"):
        if not (JAVASCRIPT / "node_modules" / package).is_dir():
            pytest.skip(f"{package} is not installed: npm ci --ignore-scripts --prefix {JAVASCRIPT}")
    given = {"executable": found, "module": MODULE, "files": files, "jobs": jobs}
    said: dict[str, Any] = run_node("patch_browser.mjs", given)
    assert said["complaints"] == [] and len(said["results"]) == len(jobs)
    return said


def patched(base: Path, merged: Path, folder: Path) -> None:
    """Node makes `merged` of `base` and `base` of `merged`, as folders and each file by itself."""
    path, back = folder / "task.ia3patch", folder / "back.ia3patch"
    ia3_export.patch(base, merged, path)
    read = read_patch(path)
    write_reverse(read, base, back)
    jobs: list[dict[str, Any]] = [
        {"patch": path, "folder": base, "output": folder / "new"},
        {"patch": back, "folder": merged, "output": folder / "old"},
        {"patch": path, "folder": merged},
        {"patch": back, "folder": base},
    ]
    for change in read.files:
        old = None if change.old is None else base / change.old.path
        jobs.append({"patch": path, "path": change.new.path, "old": old, "output": folder / "alone"})
    made = in_node(jobs)
    assert [result.get("code") for result in made[:4]] == [None, None, "already-patched", "already-patched"]
    assert contents(folder / "new") == contents(merged)
    assert contents(folder / "old") == contents(base)
    assert [result for result in made[4:] if "code" in result] == []
    changed = {change.new.path for change in read.files}
    files = {name: data for name, data in contents(folder / "alone").items() if data != "folder"}
    assert files == {name: contents(merged)[name] for name in changed}


def test_a_small_folder(tmp_path: Path) -> None:
    base, merged, _ = write_patch(tmp_path / "made")
    patched(base, merged, tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "bfloat16"),
        ("bert-seq-cls", "float16"),
        ("gpt2", "float32"),
        ("olmoe", "float32"),
        ("resnet-basic", "float32"),
    ],
)
def test_a_merge(tmp_path: Path, name: str, dtype: str) -> None:
    base, merged = write_merge(tmp_path, name, dtype)
    patched(base, merged, tmp_path)


@pytest.mark.parametrize("case", ["gguf-q4_k_m", "gguf-q8_0", "awq-gemm-g32", "ct-w4a16-g32-sym"])
def test_a_quantized_base_whose_codes_a_merge_keeps(tmp_path: Path, case: str) -> None:
    source, base = source_of(case), tmp_path / "base"
    adapter = adapter_for(case, tmp_path / "adapter")
    given: tuple[Path | str, ...] = ("--quantized", "keep", "--quiet", "--no-reload-check")
    merge(source, adapter, tmp_path / "merged", *given)
    base.mkdir()
    for file in [source] if source.is_file() else source.iterdir():
        shutil.copy(file, base)
    patched(base, tmp_path / "merged", tmp_path)


def test_graphs(tmp_path: Path) -> None:
    kind = zoo.by_name("llama")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    zoo.build(kind, dtype="bfloat16").save_pretrained(base)
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(adapter)
    given: tuple[Path | str, ...] = (
        "--model",
        base,
        "--output",
        tmp_path / "graphs",
        "--precision",
        "fp32,fp16,int8,int4",
    )
    assert run("onnx", *given, "--no-verify", "--quiet").code == 0
    given = ("--base", base, "--adapter", adapter, "--output", tmp_path / "folded")
    ran = run("onnx", "--onnx-base", tmp_path / "graphs", *given, "--quiet")
    assert ran.code == 0, ran.stderr
    patched(tmp_path / "graphs", tmp_path / "folded", tmp_path)


# --- numbers ---

SPECIAL = {
    "F64": [0x0, 1 << 63, 0x7FF0 << 48, 0xFFF0 << 48, 0x7FF8 << 48, 0xFFF0 << 48 | 1, 1, 0x36A0 << 48,
            0x40EFFE << 40, 0x40EFFDFFFFFFFFFF, 0x47EFF0 << 40, 0x47EFEFFFFFFFFFFF],
    "F32": [0x0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001, 1, 0x7F7FFFFF, 0x00800000],
    "F16": [0x0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFC01, 1, 0x03FF, 0x7BFF, 0x0400],
    "BF16": [0x0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFF81, 1, 0x007F, 0x7F7F, 0x0080],
}  # fmt: skip


def random_numbers(random: np.random.Generator, dtype: str, count: int) -> bytes:
    """Bits of any number, of usual ones, and of those where rounding is difficult."""
    width = WIDTH[dtype]
    bits = np.frombuffer(random.bytes(count * width), f"<u{width}").copy()
    usual = random.random(count)
    bits[usual < 0.2] = random.choice(np.array(SPECIAL[dtype], f"<u{width}"), int((usual < 0.2).sum()))
    if dtype in ("F64", "F32"):
        some = usual > 0.4
        wide = (random.standard_normal(count) * 2.0 ** random.integers(-30, 18, count)).astype(f"<f{width}")
        bits[some] = wide.view(bits.dtype)[some]
        # halfway between two bfloat16 or float16 numbers, or a little aside
        shift = np.array([13, 16] if dtype == "F32" else [29, 42, 45], bits.dtype)
        shift = random.choice(shift, count)
        one = np.ones(1, bits.dtype)
        tie = (bits >> shift << shift) | one << (shift - one)
        bits = np.where(usual > 0.7, tie + random.integers(-1, 2, count).astype(bits.dtype), bits)
    return bits.tobytes()


def random_piece(random: np.random.Generator, number: int) -> tuple[bytes, bytes, FoldRule, bytes]:
    """The old file, the new one as Python makes it, the piece, and its vector."""
    dtype, rounded, to = (str(name) for name in random.choice([*WIDTH], 3))
    width, at, stride = WIDTH[dtype], [0], WIDTH[dtype]
    if WIDTH[to] == width and random.random() < 0.4:
        at = [int(random.integers(0, 4))]
        if random.random() < 0.5:
            at.append(at[0] + width + int(random.integers(0, 4)))
        stride = at[-1] + width + int(random.integers(0, 9))
    records = int(random.choice([1, 7, 64, 1000, 8192, 9000]))
    before = int(random.integers(0, 9))
    block = bytearray(random.bytes(records * stride))
    for offset in at:
        place = np.ndarray((records, width), "u1", block, offset, (stride, 1))
        place[...] = np.frombuffer(random_numbers(random, dtype, records), "u1").reshape(records, width)
    inner = int(random.choice([1, 2, 3, 100, 10**6]))
    n = int(random.choice([1, 2, 5, 300]))
    special = np.array([1, -1, 0, -0.0, 0.5, np.inf, np.nan, 1e-40, 3e38, 1 + 2**-12], "<f4")
    vector = np.where(random.random(n) < 0.3, random.choice(special, n), random.standard_normal(n))
    wide = WIDTH[to] != width
    rule = FoldRule(
        offset=before, length=records * (WIDTH[to] if wide else stride), dtype=dtype, rounded=rounded, to=to,
        stride=stride, at=tuple(at), vector=f"v{number}", inner=inner,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        made = bytes(fold_records(bytearray(block), 0, rule, vector.astype("<f4"), Workspace()))
    return bytes(before) + bytes(block), made, rule, vector.astype("<f4").tobytes()


def state(path: str, data: bytes) -> FileState:
    return FileState(path, len(data), hashlib.sha256(data).hexdigest())


def test_any_numbers_become_the_bits_that_numpy_makes(tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    (tmp_path / "base").mkdir()
    changes, vectors, expected, kinds = [], {}, {}, set()
    for number in range(600):
        old, new, rule, vector = random_piece(random, number)
        kinds.add((rule.dtype, rule.rounded, rule.to))
        (tmp_path / "base" / f"{number}").write_bytes(old)
        changes.append(FileChange(state(f"{number}", old), state(f"{number}", new), (rule,)))
        vectors[rule.vector], expected[f"{number}"] = vector, new
    assert len(kinds) == 64
    rows = [(name, "F32", (len(data) // 4,)) for name, data in vectors.items()]
    prefix, offsets = write_header(rows, to_metadata("t", changes, [], []))
    data = b"".join(vectors[name] for name in sorted(offsets, key=offsets.__getitem__))
    patch = tmp_path / "task.ia3patch"
    patch.write_bytes(prefix + data)
    jobs = [
        {"patch": patch, "path": name, "old": tmp_path / "base" / name, "output": tmp_path / "new"}
        for name in expected
    ]
    made = in_node(jobs)
    wrong = [(result, changes[i].pieces) for i, result in enumerate(made) if "code" in result]
    assert not wrong, (len(wrong), wrong[:3])
    assert {name: (tmp_path / "new" / name).read_bytes() for name in expected} == expected


# --- what is refused ---


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    base, merged, patch = write_patch(tmp_path / "made")
    second = write_patch(tmp_path / "second", seed=1)[2]
    folders: dict[str, Path] = {}
    for name in ("changed", "shorter", "missing", "taken", "part"):
        folders[name] = tmp_path / name
        shutil.copytree(base, folders[name])
    (folders["changed"] / "sub" / "kept.bin").write_bytes(bytes(4096))
    (folders["shorter"] / "gone.txt").write_text("gone")
    (folders["missing"] / "README.md").unlink()
    (folders["taken"] / "new.json").write_text("mine")
    shutil.copy(merged / "README.md", folders["part"])
    jobs: list[dict[str, Any]] = [{"patch": patch, "folder": folder} for folder in folders.values()]
    jobs.append({"patch": second, "folder": base})
    file = base / "model.safetensors"
    jobs += [
        {"patch": patch, "path": "model.safetensors", "old": merged / "model.safetensors"},
        {"patch": second, "path": "model.safetensors", "old": file},
        {"patch": patch, "path": "model.safetensors", "old": base / "config.json"},
        {"patch": patch, "path": "model.safetensors", "old": None},
        {"patch": patch, "path": "config.json", "old": base / "config.json"},
    ]
    made = in_node(jobs)
    codes = ["other-bytes"] * 6 + ["already-patched"] + ["other-bytes"] * 4
    assert [result["code"] for result in made] == codes
    said = [result["message"] for result in made]
    for words, message in zip(
        [
            "sub/kept.bin has the SHA-256", "gone.txt has 4 bytes, not 45", "no README.md",
            "another new.json", "in part: README.md", "model.safetensors has the SHA-256",
            "already patched", "model.safetensors has the SHA-256",
            "has 2 bytes, not", "missing", "does not change config.json",
        ],
        said, strict=True,
    ):  # fmt: skip
        assert words in message, (words, message)


def container(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def damages(patch: Path, folder: Path) -> list[tuple[Path, str]]:
    """Patches that Python's tests refuse, and the code of each."""
    whole = patch.read_bytes()
    made: list[tuple[Path, str]] = []

    def add(data: bytes | None, code: str, edit: Any = None) -> None:
        path = folder / f"{len(made)}.ia3patch"
        path.write_bytes(whole if data is None else data)
        if edit is not None:
            edit_patch(path, edit)
        made.append((path, code))

    def marked(test: Any, name: str) -> list[Any]:
        return next(list(mark.args[1]) for mark in test.pytestmark if mark.args[0] == name)

    for size in range(0, len(whole), 61):
        add(whole[:size], "damaged")
    add(whole + b"x", "damaged")
    for name in [
        *marked(malformed.test_a_path_out_of_the_folder_is_refused, "name"),
        "\x1f",
        "a\ud800",
        "a" * 256,
    ]:
        add(None, "damaged", lambda d, name=name: malformed.file_of(d, "new.json").update(path=name))
    for edit in marked(malformed.test_what_contradicts_itself_is_damaged, "edit"):
        add(None, "damaged", edit)
    for edit in marked(malformed.test_another_version_is_said_to_be_one, "edit"):
        add(None, "unsupported", edit)
    long = bytes(64 << 20)
    bomb = zlib.compress(long, 9)
    for packed, length in (
        (bomb, 1000),
        (bomb, len(long) + 1),
        (bomb, 1 << 40),
        (bomb + b"junk", len(long)),
        (bomb[:-1], len(long)),
        (bomb[:-1] + b"\0", len(long)),
        (b"no stream at all", 10),
        (b"x", 10),
        (b"", 1),
    ):
        new = FileState("bomb", length, hashlib.sha256(long).hexdigest())
        document = to_metadata("t", [FileChange(None, new, (Stored("r0", length, True),))], [], [])
        add(write_header([("r0", "U8", (len(packed),))], document)[0] + packed, "damaged")
    document = to_metadata("t", [FileChange(None, state("a", b"aa"), (Stored("r0", 2, False),))], [], [])
    for offsets, size in (([0, 2], 3), ([1, 3], 3), ([0, 2], 1), ([0, 3], 3), ([2, 0], 2), ([0.5, 2.5], 3)):
        row = {"dtype": "U8", "shape": [2], "data_offsets": offsets}
        add(container({"__metadata__": document, "r0": row}) + b"a" * size, "damaged")
    row = {"dtype": "U8", "shape": [3], "data_offsets": [0, 2]}
    add(container({"__metadata__": document, "r0": row}) + b"aa", "damaged")
    one, other = (FileState(path, 2, "0" * 64) for path in ("config.json", "gone.txt"))
    swapped = [FileChange(one, other, (Copy(0, 2),)), FileChange(other, one, (Copy(0, 2),))]
    add(write_header([], to_metadata("t", swapped, [], []))[0], "damaged")
    two = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    over = {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}
    add(container({"__metadata__": document, "r0": two, "r1": over}) + b"aaa", "damaged")
    for edit in (
        lambda d: malformed.file_of(d, "README.base.md")["from"].update(sha256="0" * 64),
        lambda d: malformed.file_of(d, "README.base.md")["from"].update(size=1),
        lambda d: malformed.file_of(d, "README.md").update(path="config.json"),
        lambda d: d["removed"].append(d["removed"][0]),
        lambda d: d["kept"].append(d["kept"][0]),
    ):
        add(None, "damaged", edit)
    twice = b'"r0":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + twice + b"," + twice + b"}"
    add(len(text).to_bytes(8, "little") + text, "damaged")
    deep = b'{"r0":' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}"
    add(len(deep).to_bytes(8, "little") + deep, "damaged")
    add(b"\x02" + bytes(7) + b"{}", "unsupported")
    return made


def test_what_python_refuses_is_refused(tmp_path: Path) -> None:
    base, _, patch = write_patch(tmp_path / "made")
    (tmp_path / "bad").mkdir()
    bad = damages(patch, tmp_path / "bad")
    assert len(bad) > 100
    for path, _ in bad:
        with pytest.raises(IA3ExportError):
            ia3_export.apply(path, base, output=tmp_path / "out")
    jobs = [{"patch": path, "folder": base, "output": tmp_path / "out"} for path, _ in bad]
    made = in_node(jobs)
    assert [(path, result.get("code")) for (path, _), result in zip(bad, made, strict=True)] == bad
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    base, _, patch = write_patch(tmp_path / "made")
    whole, random = patch.read_bytes(), np.random.default_rng(0)
    jobs = []
    for number, place in enumerate(random.integers(0, len(whole), 200)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.integers(0, 8)
        path = tmp_path / f"{number}.ia3patch"
        path.write_bytes(damaged)
        jobs.append({"patch": path, "folder": base})
    assert {result.get("code") for result in in_node(jobs)} <= {"damaged", "unsupported"}


# --- in a browser ---


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of a base, ``base``, and of three tasks; a patch for each, and one back from the first."""
    folder = tmp_path_factory.mktemp("tasks")
    kind = zoo.by_name("bert-seq-cls")
    zoo.build(kind).save_pretrained(folder / "model")
    given: tuple[Path | str, ...] = ("--model", folder / "model", "--output", folder / "base")
    ran = run("onnx", *given, "--precision", "fp32,int8", "--no-verify", "--quiet")
    assert ran.code == 0, ran.stderr
    for seed, task in enumerate(TASKS, start=1):
        zoo.adapt(zoo.build(kind), kind, seed=seed).save_pretrained(folder / f"adapter-{task}")
        given = ("--adapter", folder / f"adapter-{task}", "--output", folder / task)
        ran = run(
            "onnx",
            "--onnx-base",
            folder / "base",
            "--base",
            folder / "model",
            *given,
            "--quiet",
            "--no-verify",
        )
        assert ran.code == 0, ran.stderr
        ia3_export.patch(folder / "base", folder / task, folder / f"{task}.ia3patch")
    write_reverse(read_patch(folder / f"{TASKS[0]}.ia3patch"), folder / "base", folder / "back.ia3patch")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "tolerance"), [("model.onnx", 3e-5), ("model_int8.onnx", 0.04)])
def test_a_page_switches_between_three_tasks_and_back(tasks: Path, graph: str, tolerance: float) -> None:
    import onnxruntime

    path = f"onnx/{graph}"
    ids = np.arange(1, 13).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    given = {name: values.tolist() for name, values in inputs.items()}
    order = ["", *TASKS, "", *reversed(TASKS), ""]
    jobs = [{"call": "switchTo", "task": task, "path": path, "inputs": given} for task in order]
    jobs.append({**jobs[1], "back": "back"})
    said = in_browser(tasks, jobs)
    answers = {}
    for task in ("", *TASKS):
        file = tasks / (task or "base") / path
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        feeds = {port.name: inputs[port.name] for port in session.get_inputs()}
        answers[task] = hashlib.sha256(file.read_bytes()).hexdigest(), session.run(["logits"], feeds)[0]
    for task, result in zip([*order, ""], said["results"], strict=True):
        digest, logits = answers[task]
        assert result["sha256"] == digest
        made = np.reshape(result["logits"], result["shape"])
        np.testing.assert_allclose(made, logits, rtol=0, atol=tolerance * np.abs(logits).max())
        others = [other for name, (_, other) in answers.items() if name != task]
        assert all(np.abs(made - other).max() > np.abs(made - logits).max() for other in others)
    assert said["asked"].count(f"/files/base/{path}") == 1  # then the browser has it


@pytest.mark.slow
def test_a_browser_refuses_what_python_refuses(tmp_path: Path) -> None:
    base, _, patch = write_patch(tmp_path / "made")
    (tmp_path / "bad").mkdir()
    shutil.copytree(base, tmp_path / "base")
    bad = damages(patch, tmp_path / "bad")
    paths = [file.relative_to(base).as_posix() for file in base.rglob("*.*")]
    jobs = [
        {"call": "refuse", "patch": f"bad/{path.name}", "folder": "base", "paths": paths} for path, _ in bad
    ]
    made = in_browser(tmp_path, jobs)["results"]
    assert [(path, code) for (path, _), code in zip(bad, made, strict=True)] == bad
