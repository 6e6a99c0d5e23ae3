"""Damage to good artifacts: ``verify`` must find every one, exit 1, and name it.

Each damage is done to a merge that is proven good first. The weights proof alone must name the damaged
tensors and no others, in the right word; in float32 the forward alone must catch it too, unless the damage
changes the function by no more than rounding does.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from ia3_export.cli import cli
from tests.e2e.test_startup import modules_after
from tests.support import zoo
from tests.support.damage import DAMAGES, Broken, Damage, Merge, read_merge, traits_of
from tests.support.tensors import read_folder

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

#: Architectures with what damages may need of them (`traits_of` checks that).
BIASED = "float32, output bias, input bias, embedding"
ARCHITECTURES = {
    "llama-biased": BIASED,
    "gpt2": BIASED,
    "bert-seq-cls": f"{BIASED}, head",
    "t5": "float32, embedding",
    "opt": BIASED,
    "bloom": BIASED,
    "mixtral": "float32, embedding",
    "qwen2_moe": "float32, output bias, embedding",
    "vit": "float32, output bias, input bias",
    "whisper": BIASED,
    "resnet-basic": "float32",
    "falcon-new-decoder": "embedding",  # bfloat16
    "phi": "output bias, input bias, embedding",  # bfloat16
    "distilbert": "output bias, input bias, embedding, head",  # bfloat16
}
#: Stored modules that run under another name.
ALIASES = {"shared": {"encoder.embed_tokens", "decoder.embed_tokens"}}
CASES = [
    (name, damage)
    for name, traits in ARCHITECTURES.items()
    for damage in DAMAGES
    if damage.needs <= {*traits.split(", ")}
]


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> Iterator[None]:
    """Tiny models on several threads wait for each other most of the time.

    `verify` collects garbage after each model, which takes longer than the model where all of transformers is
    searched, so that is set aside.
    """
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    torch.set_num_threads(before)


def run(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON document of the command."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json", "-q"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # CliRunner calls a crash exit 1 too
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, json.loads(result.stdout)


def verify(folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """``verify`` with the base and the adapter in `folder`."""
    inputs = ("--base", folder / "base", "--adapter", folder / "adapter")
    return run("verify", *inputs, "--device", "cpu", *arguments)


def merge(base: Path, output: Path, *adapters: Path, options: tuple[str, ...] = ()) -> None:
    given = [word for adapter in adapters for word in ("--adapter", adapter)]
    code, _ = run("merge", "--base", base, *given, "--output", output, *options)
    assert code == 0


def make(folder: Path, name: str, dtype: str) -> None:
    """``base``, ``adapter`` and ``second`` (another adapter) of a kind of the zoo."""
    kind = zoo.by_name(name)
    zoo.build(kind, dtype=dtype).save_pretrained(folder / "base")
    zoo.adapt(zoo.build(kind, dtype=dtype), kind, seed=1).save_pretrained(folder / "adapter")
    zoo.adapt(zoo.build(kind, dtype=dtype), kind, seed=9).save_pretrained(folder / "second")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Merge]:
    """The good merge of an architecture, made when first asked for."""
    made: dict[str, Merge] = {}

    def get(name: str) -> Merge:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make(folder, name, "float32" if "float32" in ARCHITECTURES[name] else "bfloat16")
            merge(folder / "base", folder / "merged", folder / "adapter")
            merge(folder / "base", folder / "other", folder / "second")
            made[name] = read_merge(folder)
            gc.freeze()
        return made[name]

    return get


def write(good: Merge, broken: Broken, folder: Path) -> None:
    """The merged folder of `good` with `broken` in it."""
    shutil.copytree(good.folder / "merged", folder)
    tensors = good.merged | {name: tensor for name, (tensor, _) in broken.items() if tensor is not None}
    gone = {name for name, (tensor, _) in broken.items() if tensor is None}
    kept = {name: tensor.clone().contiguous() for name, tensor in tensors.items() if name not in gone}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def words(proof: dict[str, Any]) -> dict[str, str]:
    return {finding["tensor"]: finding["what"] for finding in proof["findings"]}


def test_the_matrix_is_large_enough() -> None:
    """At least 12 kinds of damage for each of at least 10 architectures, one of them a channel off by 5 %."""
    kinds = Counter(name for name, _ in CASES)
    assert len([name for name, count in kinds.items() if count >= 12]) >= 10
    assert len({damage.name for _, damage in CASES}) >= 14
    assert {name for name, damage in CASES if damage.name == "channel_off"} == {*ARCHITECTURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merge_that_is_damaged_below_is_good(good: Callable[[str], Merge], name: str) -> None:
    made = good(name)
    assert traits_of(made) == {*ARCHITECTURES[name].split(", ")}
    code, report = verify(made.folder, "--merged", made.folder / "merged")
    assert code == 0 and report["in_parity"]
    assert report["weights"][0]["findings"] == [] and report["steps"][0]["location"] is None
    assert verify(made.folder, "--merged", made.folder / "merged", "--weights-only")[0] == 0


@pytest.mark.parametrize(("name", "damage"), CASES, ids=[f"{name}-{damage.name}" for name, damage in CASES])
def test_damage_is_caught_and_named(
    good: Callable[[str], Merge], tmp_path: Path, name: str, damage: Damage
) -> None:
    made = good(name)
    broken = damage.make(made)
    expected = {tensor: word for tensor, (_, word) in broken.items()}
    assert expected
    write(made, broken, tmp_path / "bad")

    code, report = verify(made.folder, "--merged", tmp_path / "bad", "--weights-only")
    assert code == 1 and not report["in_parity"] and report["steps"] == []
    assert words(report["weights"][0]) == expected

    code, report = verify(made.folder, "--merged", tmp_path / "bad")
    assert code == 1 and not report["in_parity"]
    assert not report["weights"][0]["passed"]
    assert words(report["weights"][0]) == expected
    if "float32" not in ARCHITECTURES[name]:
        return
    (step,) = report["steps"]
    if damage.seen:
        assert not step["passed"]
    if damage.located:
        where = step["location"]
        assert where is not None
        holders = [_modules(made, tensor) for tensor in broken]
        assert any(holds(where["module"]) for holds in holders)
        assert where["site"] is None or any(holds(where["site"]) for holds in holders)
        assert any(tensor in where["weights"] for tensor in broken)  # what the weights proof says of it


def _modules(good: Merge, tensor: str) -> Callable[[str], bool]:
    """Whether a module in memory is the one that holds a stored tensor.

    Or, with heads of several layers, around it.
    """
    stored = tensor.rpartition(".")[0]
    names = {site.module for site in good.sites if site.weight.rpartition(".")[0] == stored} or {stored}
    names |= ALIASES.get(stored, set())
    if tensor in good.heads:
        names.add(stored.partition(".")[0])
    if any(site.weight != f"{site.module}.weight" for site in good.sites):  # names are converted
        return lambda module: module in names or _ending(module) in map(_ending, names)
    return names.__contains__


def _ending(module: str) -> tuple[str, ...]:
    """The numbers in a module's path, and its last part."""
    parts = module.split(".")
    return (*(part for part in parts[:-1] if part.isdigit()), parts[-1])


# ---------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("name", ["llama-biased", "bert-seq-cls", "t5"])
def test_a_wrong_combination_is_caught(tmp_path: Path, name: str) -> None:
    make(tmp_path, name, "float32")
    base, adapters = tmp_path / "base", (tmp_path / "adapter", tmp_path / "second")
    if zoo.by_name(name).task_type == "SEQ_CLS":  # two heads cannot be merged
        head = {n: t for n, t in read_folder(adapters[0]).items() if not n.endswith(".ia3_l")}
        save_file(read_folder(adapters[1]) | head, adapters[1] / "adapter_model.safetensors")
    both = [word for adapter in adapters for word in ("--adapter", adapter)]

    def check(folder: str, *how: str) -> tuple[int, dict[str, Any]]:
        return run("verify", "--base", base, *both, "--merged", tmp_path / folder, "--device", "cpu", *how)

    merge(base, tmp_path / "product", *adapters)
    merge(base, tmp_path / "reversed", *adapters[::-1])
    merge(base, tmp_path / "alone", adapters[0])
    right, swapped = (("--combine", "linear", "--weights", weights) for weights in ("0.25,0.75", "0.75,0.25"))
    merge(base, tmp_path / "right", *adapters, options=right)
    merge(base, tmp_path / "swapped", *adapters, options=swapped)
    for folder, how in (("product", ()), ("right", ()), ("right", right), ("swapped", swapped)):
        assert check(folder, *how)[0] == 0, folder

    for folder, how, word in (
        ("swapped", right, "differs"),
        ("product", right, "differs"),
        ("right", ("--combine", "product"), "differs"),
        ("alone", (), "number 2 left out"),
    ):
        code, report = check(folder, *how)
        assert code == 1 and not report["steps"][0]["passed"], folder
        assert check(folder, *how, "--weights-only")[0] == 1
        assert word in {*words(report["weights"][0]).values()}, folder
    shutil.copy(tmp_path / "right" / "ia3_export.json", tmp_path / "swapped" / "ia3_export.json")
    assert check("swapped")[0] == 1  # the manifest tells other weights than were merged
    for how in ((), ("--weights-only",)):  # other bits, the same function
        code, report = check("reversed", *how)
        assert code == 1 and {*words(report["weights"][0]).values()} == {"folded in another order"}


def test_damage_is_found_without_torch(good: Callable[[str], Merge], tmp_path: Path) -> None:
    made = good("llama-biased")
    damage = next(damage for damage in DAMAGES if damage.name == "channel_off")
    write(made, damage.make(made), tmp_path / "bad")
    args = ("verify", "--base", made.folder / "base", "--adapter", made.folder / "adapter", "--weights-only")
    modules = modules_after(*args, "--merged", tmp_path / "bad")
    assert modules.isdisjoint({"torch", "transformers", "peft", "onnxruntime"})


# ---------------------------------------------------------------------------------------- ONNX

#: By damage: the words of which the weights proof must use one, where the weights alone tell it.
GRAPHS = {
    "the base's own export": ("left out",),
    "the adapter live in the graph": ("adapter node",),
    "the adapter live under neutral names": ("adapter vector",),
    "a channel off by 5 %": ("differs",),
    "a vector applied twice": ("differs", "applied twice"),
    "a bias forgotten": ("left out", "bias forgotten"),
    "biases of two layers swapped": ("differs", "swapped"),
    "norms of two layers swapped": ("differs", "swapped"),
    "a bias of another layer": ("differs", "swapped"),
    "a weight of another layer": ("differs", "missing", "swapped"),
    "the classifier's bias zeroed": ("differs",),
    "embedding rows zeroed": ("differs",),
    "one weight in the last place": ("differs",),
    # nameless and of equal shape: only the forward can tell which is where; and scalars are no weights
    "weights of two layers swapped": (),
    "attention scaled otherwise": (),
}


@pytest.mark.parametrize("name", ["bert-seq-cls", "distilbert"])
def test_damage_to_a_graph_is_caught(tmp_path: Path, name: str) -> None:
    """One test an architecture, because tracing costs more than all the comparisons."""
    import onnx

    gc.freeze()
    make(tmp_path, name, "float32")
    merge(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    shutil.copytree(tmp_path / "merged", tmp_path / "other")
    made = read_merge(tmp_path)
    assert run("onnx", "--model", tmp_path / "merged", "--output", tmp_path / "good", "--no-verify")[0] == 0
    file = tmp_path / "good" / "onnx" / "model.onnx"
    for artifact in (tmp_path / "good", file):
        assert verify(tmp_path, "--onnx", artifact)[0] == 0
        assert verify(tmp_path, "--onnx", artifact, "--weights-only")[0] == 0

    live = live_graph(made, name)
    for damage, accepted in GRAPHS.items():
        proto = broken_graph(made, damage, onnx.load(file), live)
        bad = tmp_path / f"{damage.replace(' ', '-')}.onnx"
        onnx.save(proto, bad)
        code, report = verify(tmp_path, "--onnx", bad)
        assert code == 1 and not report["in_parity"], damage
        found = {*words(report["weights"][0]).values()}
        assert not accepted or found & {*accepted}, (damage, report["weights"])
        if damage in ("the adapter live in the graph", "the adapter live under neutral names"):
            assert report["steps"][0]["passed"]  # it does compute the same
        elif damage != "one weight in the last place":
            assert not report["steps"][0]["passed"], damage
        if accepted:
            assert verify(tmp_path, "--onnx", bad, "--weights-only")[0] == 1, damage


def broken_graph(good: Merge, damage: str, proto: Any, live: Any) -> Any:
    """`proto`, the graph of the good merge, with `damage`; `live` is the unmerged model's."""
    import torch
    from onnx import numpy_helper

    from tests.support.damage import times

    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in proto.graph.initializer}

    def nameless(weight: torch.Tensor) -> str:
        return next(n for n, t in held.items() if t.shape == weight.T.shape and torch.equal(t, weight.T))

    def put(changed: dict[str, torch.Tensor]) -> Any:
        for tensor in proto.graph.initializer:
            if tensor.name in changed:
                values = changed.pop(tensor.name)
                tensor.CopyFrom(numpy_helper.from_array(values.contiguous().numpy(), tensor.name))
        assert not changed
        return proto

    site = good.pick(lambda site: site.biased)
    assert site.bias is not None
    twins = [s for s in good.sites if s.module.rpartition(".")[2] == site.module.rpartition(".")[2]]
    one, other = (nameless(good.merged[s.weight]) for s in twins[:2])
    match damage:
        case "the base's own export":
            folder = good.folder / "plain"
            assert run("onnx", "--model", good.folder / "base", "--output", folder, "--no-verify")[0] == 0
            return _load(folder / "onnx" / "model.onnx")
        case "the adapter live in the graph":
            return live
        case "the adapter live under neutral names":
            return neutral(live)
        case "a channel off by 5 %":
            factors = torch.ones(held[other].shape[1])
            factors[7] = 1.05
            return put({other: times(held[other], factors, 1)})
        case "a vector applied twice":
            return put({one: times(held[one], twins[0].vector, 1)})
        case "a bias forgotten":
            return put({site.bias: good.base[site.bias]})
        case "biases of two layers swapped":
            first, second = (f"{s.module}.bias" for s in twins[:2])
            return put({first: held[second], second: held[first]})
        case "norms of two layers swapped":
            first, second = sorted(n for n in held if n.lower().endswith("norm.weight") and ".layer." in n)[
                ::2
            ]
            return put({first: held[second], second: held[first]})
        case "a bias of another layer":
            first, second = (f"{s.module}.bias" for s in twins[:2])
            return put({first: held[second]})
        case "a weight of another layer":
            return put({one: held[other]})
        case "the classifier's bias zeroed":
            bias = max(n for n in held if n.startswith("classifier") and n.endswith("bias"))
            return put({bias: torch.zeros_like(held[bias])})
        case "embedding rows zeroed":
            table = next(n for n in held if n.endswith("word_embeddings.weight"))
            held[table][40:80] = 0
            return put({table: held[table]})
        case "one weight in the last place":
            held[one].view(torch.int32)[-1, -1] += 1
            return put({one: held[one]})
        case "weights of two layers swapped":
            return put({one: held[other], other: held[one]})
        case "attention scaled otherwise":
            scale = next(n for n, t in held.items() if t.dim() == 0 and 0 < t.item() < 1)
            return put({scale: held[scale] * 1.05})
    raise AssertionError(damage)


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def live_graph(good: Merge, name: str) -> Any:
    """The unmerged model as a graph: PEFT's layers, traced."""
    import onnx_ir
    import torch
    import transformers
    from peft import PeftModel

    from ia3_export.onnx.contract import plan_graphs
    from ia3_export.onnx.tasks import TASKS
    from ia3_export.onnx.trace import trace

    inner = getattr(transformers, zoo.by_name(name).model_class).from_pretrained(good.folder / "base")
    live = PeftModel.from_pretrained(inner, good.folder / "adapter").eval().get_base_model()
    sample = {"input_ids": torch.ones(2, 11, dtype=torch.int64)}
    (spec,) = plan_graphs(live, TASKS["text-classification"], sample, "merged", None)
    return onnx_ir.to_proto(trace(live, spec, 20))


def neutral(live: Any) -> Any:
    """`live` with every name that tells of an adapter replaced, as optimizers and exporters do."""
    proto = copy.deepcopy(live)
    new: dict[str, str] = {"": ""}

    def name(old: str) -> str:
        telling = ("ia3_l", "base_layer", "modules_to_save")
        return new.setdefault(old, f"value_{len(new)}" if any(word in old for word in telling) else old)

    for tensor in proto.graph.initializer:
        tensor.name = name(tensor.name)
    for node in proto.graph.node:
        node.name = name(node.name)
        for names in (node.input, node.output):
            for i, old in enumerate(names):
                names[i] = name(old)
    return proto
