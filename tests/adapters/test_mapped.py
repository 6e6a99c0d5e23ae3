"""``--map``: vectors under any names, told by rules, and what the commands make of them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ia3_export import OutputOptions, Recipe
from ia3_export import merge as fold
from ia3_export.adapters import read_adapter, read_adapters
from ia3_export.adapters.mapped import parse_rules
from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.errors import DamagedFile, ShapeMismatch, Unsupported, UnusedVector, UsageError
from tests.e2e.command import Ran, contents, merge, only_complaint, run
from tests.support import zoo
from tests.support.tensors import read_folder, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

PREFIX = "base_model.model."
OUT, IN = r"(.+)\.scale=output", r"(.+)\.scale_in=input"


def numbers(*shape: int) -> np.ndarray:
    return np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def save(file: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A ``.safetensors`` or torch file, bare or, as ``.ckpt``, like Lightning's."""
    if file.suffix == ".safetensors":
        save_file(dict(tensors), file)
        return file
    import torch

    state: dict[str, Any] = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if file.suffix == ".ckpt":
        state = {"epoch": 3, "global_step": 70, "state_dict": state, "hyper_parameters": {"lr": 0.1}}
    torch.save(state, file)
    return file


def read(tmp_path: Path, tensors: Mapping[str, np.ndarray], *rules: str) -> Adapter:
    return read_adapter(save(tmp_path / "vectors.safetensors", tensors), rules=rules)


def sites(adapter: Adapter) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    return {key: (site.module, site.direction, site.shape) for key, site in adapter.sites.items()}


# --------------------------------------------------------------------------------------------------- rules
# and keys


@pytest.mark.parametrize(
    ("key", "rule", "module"),
    [
        ("model.layers.0.k_proj.scale", r"(.+)\.scale=output", "model.layers.0.k_proj"),
        ("model.layers.0.k_proj.scale", r".+\.scale=output", "model.layers.0.k_proj"),
        (
            "model.layers.0.ia3.k_proj.l",
            r"(model\.layers\.\d+)\.ia3\.(k_proj)\.l=output",
            "model.layers.0.k_proj",
        ),
        ("net/3/fc2|gate", r"net/(\d+)/(\w+)\|gate=output", "3.fc2"),
        ("wrap.enc.fc.scale", r"(?:wrap\.)?(.+)\.scale=output", "enc.fc"),
        ("enc.fc.scale", r"(wrap)?\.?(enc\.fc)\.scale=output", "enc.fc"),
        ("a=b.scale", r"a=(b)\.scale=output", "b"),
        ("(s)", r"\((s)\)=output", "s"),
    ],
    ids=["group", "none", "two", "slashes", "uncaptured", "unmatched", "equals", "lone"],
)
@pytest.mark.parametrize("side", ["output", "input"])
def test_the_groups_are_the_module_path(tmp_path: Path, key: str, rule: str, module: str, side: str) -> None:
    adapter = read(tmp_path, {key: numbers(4)}, rule.removesuffix("output") + side)
    assert sites(adapter) == {module: (module, side.removesuffix("put"), (4,))}
    assert adapter.format == "mapped" and adapter.name == "vectors"
    assert adapter.sites[module].vector.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("stored", [(4,), (4, 1), (1, 4), (1, 4, 1, 1), (1, 1, 4, 1, 1)])
@pytest.mark.parametrize(("side", "shape"), [("output", (4, 1)), ("input", (1, 4))])
def test_the_rule_says_the_side_and_never_the_shape(
    tmp_path: Path, stored: tuple[int, ...], side: str, shape: tuple[int, int]
) -> None:
    adapter = read(tmp_path, {"fc.scale": numbers(*stored)}, rf"(.+)\.scale={side}")
    wanted = {1: (4,), 2: shape, 4: (1, 4, 1, 1), 5: (1, 4, 1, 1, 1)}[len(stored)]
    assert adapter.sites["fc"].shape == wanted
    assert adapter.sites["fc"].vector.tolist() == [1, 2, 3, 4]


def test_the_first_rule_that_matches_counts(tmp_path: Path) -> None:
    tensors = {"fc1.scale": numbers(3), "fc2.scale": numbers(3)}
    adapter = read(tmp_path, tensors, r"(fc2)\.scale=input", r"(.+)\.scale=output")
    assert {key: site.direction for key, site in adapter.sites.items()} == {"fc1": "out", "fc2": "in"}
    turned = read(tmp_path, tensors, r"(.+)\.scale=output", r"(fc2)\.scale=input")
    assert {site.direction for site in turned.sites.values()} == {"out"}


def test_a_rule_matches_whole_keys_only(tmp_path: Path) -> None:
    adapter = read(tmp_path, {"fc.scale": numbers(3), "fc.scale_log": numbers(3)}, OUT)
    assert list(adapter.sites) == ["fc"] and list(adapter.extras) == ["fc.scale_log"]


def test_a_module_may_have_vectors_on_both_sides(tmp_path: Path) -> None:
    adapter = read(tmp_path, {"fc.scale": numbers(3), "fc.scale_in": numbers(2)}, OUT, IN)
    found = {(site.module, site.direction, len(site.vector)) for site in adapter.sites.values()}
    assert found == {("fc", "out", 3), ("fc", "in", 2)}
    assert adapter.modules == {"fc"} and adapter.parameters == 5


@pytest.mark.parametrize("tensors", [{"fc.a": numbers(3), "fc.b": numbers(3)}, {"scale": numbers(3)}])
def test_two_vectors_for_one_place_or_one_for_none_are_refused(
    tmp_path: Path, tensors: Mapping[str, np.ndarray]
) -> None:
    with pytest.raises(DamagedFile, match="put vector of"):
        read(tmp_path, tensors, ".+=output")


@pytest.mark.parametrize("rule", ["(=output", "x=sideways", "x=out", "scale", "=output", "", "=", "*x=input"])
def test_a_bad_rule_is_wrong_usage(tmp_path: Path, rule: str) -> None:
    with pytest.raises(UsageError, match="--map"):
        parse_rules([rule])
    file = save(tmp_path / "vectors.safetensors", {"fc.scale": numbers(3)})
    only_complaint(run("inspect", file, "--map", rule), 2, "--map")


def test_keys_that_no_rule_matches_are_listed(tmp_path: Path) -> None:
    file = save(tmp_path / "vectors.safetensors", {f"block{i}.gate": numbers(3) for i in range(5)})
    with pytest.raises(UnusedVector) as error:
        read_adapter(file, rules=[OUT])
    assert "block0.gate, block1.gate, block2.gate, ..." in error.value.hint
    ran = run("inspect", file, "--map", OUT)
    only_complaint(ran, 3, "no --map rule")
    assert "block0.gate" in ran.stderr
    only_complaint(run("inspect", file), 3, "block0.gate")


def test_what_is_no_vector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch, match=r"\[2, 3\]"):
        read(tmp_path, {"fc.scale": numbers(2, 3)}, OUT)
    with pytest.raises(ShapeMismatch, match="no vector"):
        read(tmp_path, {"fc.scale": np.empty(0, np.float32)}, OUT)
    with pytest.raises(Unsupported, match="I64"):
        read(tmp_path, {"fc.scale": np.arange(3)}, OUT)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_every_kind_of_file_is_read_alike(tmp_path: Path, suffix: str, dtype: str) -> None:
    values = (1 + np.random.default_rng(0).normal(size=7) / 3).astype(dtype)
    file = save(tmp_path / f"run{suffix}", {"a.0.fc.scale": values, "a.1.fc.scale": values[::-1].copy()})
    adapter = read_adapter(file, rules=[OUT])
    assert adapter.name == "run" and adapter.files == (file.name,)
    assert [site.vector.tolist() for site in adapter.sites.values()] == [
        values.tolist(),
        values[::-1].tolist(),
    ]
    assert {site.dtype for site in adapter.sites.values()} == {f"F{8 * values.itemsize}"}


class Trap:
    """Pickled, it runs code when a trusting reader loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("how", ["pickle", "torch", "lightning"])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, how: str) -> None:
    import torch

    mark, file = tmp_path / "executed", tmp_path / "vectors.pt"
    state = {"fc.scale": torch.ones(3), "fc2.scale": Trap(mark)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save({"state_dict": state} if how == "lightning" else state, file)
    only_complaint(run("inspect", file, "--map", OUT), 3, "vectors.pt")
    only_complaint(run("convert", file, "--map", OUT, "--output", tmp_path / "out"), 3, "vectors.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.pt"]


# ---------------------------------------------------------------------------------------------- merging what
# was mapped


class Llama:
    """A tiny Llama, its PEFT adapter, and the same vectors in one file under other names."""

    def __init__(self, folder: Path) -> None:
        kind = zoo.by_name("llama")
        self.base, self.adapter, self.file = folder / "base", folder / "adapter", folder / "vectors.pt"
        zoo.build(kind).save_pretrained(self.base)
        zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(self.adapter)
        merge(self.base, self.adapter, folder / "merged")
        self.merged = folder / "merged"
        self.vectors = load_file(self.adapter / "adapter_model.safetensors")
        save(self.file, {renamed(name): value.reshape(-1) for name, value in self.vectors.items()})

    rules = ("--map", r"(.+)\.mlp/(.+)\.ia3_scale=input", "--map", r"(.+)\.ia3_scale=output")


def renamed(name: str) -> str:
    module = name.removeprefix(PREFIX).removesuffix(".ia3_l")
    return module.replace(".mlp.down_proj", ".mlp/mlp.down_proj") + ".ia3_scale"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(tmp_path_factory.mktemp("mapped"))


def same_model(one: Path, other: Path) -> bool:
    mine, others = read_folder(one), read_folder(other)
    return set(mine) == set(others) and all(same(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_merging_mapped_vectors_gives_the_bits_of_the_peft_adapter(
    llama: Llama, tmp_path: Path, suffix: str
) -> None:
    tensors = {renamed(name): value for name, value in llama.vectors.items()}
    file = save(tmp_path / f"vectors{suffix}", tensors)
    merge(llama.base, file, tmp_path / "merged", *llama.rules)
    assert same_model(tmp_path / "merged", llama.merged)


def test_verify_proves_the_merge_of_mapped_vectors(llama: Llama) -> None:
    words = ["verify", "--base", llama.base, "--adapter", llama.file, "--merged", llama.merged]
    ran = run(*words, *llama.rules, "--weights-only")
    assert ran.code == 0, ran
    turned = ["--map", r"(.+)\.mlp/(.+)\.ia3_scale=input", "--map", r"(.+(?:k|v)_proj)\.ia3_scale=output"]
    assert run(*words, *turned).code == 0


def test_a_wrong_side_is_refused_by_the_base(llama: Llama, tmp_path: Path) -> None:
    rules = ["--map", r"(.+)\.mlp/(.+)\.ia3_scale=output", "--map", r"(.+)\.ia3_scale=output"]
    ran = run("merge", "--base", llama.base, "--adapter", llama.file, *rules, "--output", tmp_path / "out")
    only_complaint(ran, 3, "down_proj", "48")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_without_its_vector_is_refused(llama: Llama, tmp_path: Path) -> None:
    tensors = {renamed(name): value for name, value in llama.vectors.items()}
    del tensors["model.layers.1.self_attn.v_proj.ia3_scale"]
    file = save(tmp_path / "vectors.safetensors", tensors)
    words = ["merge", "--base", llama.base, "--adapter", file, *llama.rules, "--output", tmp_path / "out"]
    only_complaint(run(*words), 3, "model.layers.1.self_attn.v_proj")
    assert run(*words, "--allow-missing").code == 0


def test_other_keys_replace_the_bases_tensors_or_are_refused(llama: Llama, tmp_path: Path) -> None:
    tensors = {renamed(name): value for name, value in llama.vectors.items()}
    tensors["model.norm.weight"] = np.full(32, 3, np.float32)
    file = save(tmp_path / "vectors.safetensors", tensors)
    merge(llama.base, file, tmp_path / "merged", *llama.rules)
    assert read_folder(tmp_path / "merged")["model.norm.weight"].tolist() == [3] * 32
    tensors["optimizer.step"] = np.zeros(1, np.float32)
    file = save(tmp_path / "vectors.safetensors", tensors)
    words = ["merge", "--base", llama.base, "--adapter", file, *llama.rules, "--output", tmp_path / "out"]
    only_complaint(run(*words), 3, "optimizer.step")
    assert run(*words, "--allow-unused").code == 0


def test_both_sides_of_a_module_are_folded_and_divided_out(llama: Llama, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for layer in (0, 1):
        module = f"model.layers.{layer}.mlp.down_proj"
        tensors[f"{module}.scale"] = (1 + generator.random(32) / 2).astype(np.float32)
        tensors[f"{module}.scale_in"] = (1 + generator.random(48) / 2).astype(np.float32)
    file, rules = save(tmp_path / "vectors.pt", tensors), ("--map", OUT, "--map", IN)
    merge(llama.base, file, tmp_path / "merged", *rules)
    base, merged = read_folder(llama.base), read_folder(tmp_path / "merged")
    for layer in (0, 1):
        module = f"model.layers.{layer}.mlp.down_proj"
        weight = base[f"{module}.weight"].numpy().astype(np.float64)
        wanted = tensors[f"{module}.scale"][:, None] * weight * tensors[f"{module}.scale_in"][None]
        np.testing.assert_allclose(merged[f"{module}.weight"].numpy(), wanted, rtol=2**-22)
    words = ["--adapter", file, *rules]
    ran = run("verify", "--base", llama.base, "--merged", tmp_path / "merged", *words)
    assert ran.code == 0, ran
    again = ["--model", tmp_path / "merged", "--base", llama.base, "--output", tmp_path / "again", "--json"]
    undone = run("unmerge", *again, *words)
    assert undone.code == 0, undone
    assert {row["distance"] for row in json.loads(undone.stdout)["exactness"]} <= {0, 1, 2, 3}
    only_complaint(run("convert", file, *rules, "--output", tmp_path / "peft"), 3, "both sides")
    assert not (tmp_path / "peft").exists()


def test_convert_makes_the_peft_adapter_of_mapped_vectors(llama: Llama, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = ["convert", llama.file, *llama.rules, "--task-type", "CAUSAL_LM", "--output", tmp_path / "peft"]
    before = contents(llama.file.parent)
    assert run(*words).code == 0
    assert contents(llama.file.parent) == before
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in llama.vectors.items()
    }
    assert all(found[name].tobytes() == value.tobytes() for name, value in llama.vectors.items())
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama.base, dtype="float32"), tmp_path / "peft"
    )
    merged = model.merge_and_unload().state_dict()
    wanted = read_folder(llama.merged)
    assert all(same(merged[name], wanted[name]) for name in wanted)


def test_convert_never_replaces_its_base(llama: Llama, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base, tmp_path / "base"))
    before = contents(base)
    run("convert", llama.file, *llama.rules, "--base", base, "--output", base, "--overwrite")
    assert contents(base) == before


def test_convert_writes_beside_the_file_it_reads(llama: Llama, tmp_path: Path, monkeypatch: Any) -> None:
    """As in the command's own example."""
    shutil.copyfile(llama.file, tmp_path / "vectors.pt")
    monkeypatch.chdir(tmp_path)
    assert run("convert", "vectors.pt", *llama.rules, "--output", "mine").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "vectors.pt"]


# ----------------------------------------------------------------------------------------------------
# convolutions


def test_flat_vectors_of_convolutions_are_folded_as_pefts(tmp_path: Path) -> None:
    """Flat, nothing says that a module is a convolution.

    The base does, and `convert --base` gives PEFT's shape.
    """
    kind = zoo.by_name("resnet-basic")
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    inputs = {name for name in stored if name.endswith("layer.1.convolution.ia3_l")}
    assert inputs and inputs < set(stored) and {value.ndim for value in stored.values()} == {4}
    flat = {
        name.removeprefix(PREFIX).replace("ia3_l", "scale_in" if name in inputs else "scale"): value.reshape(
            -1
        )
        for name, value in stored.items()
    }
    file, rules = save(tmp_path / "flat.pt", flat), ("--map", OUT, "--map", IN)
    merge(tmp_path / "base", file, tmp_path / "mapped", *rules)
    assert same_model(tmp_path / "mapped", tmp_path / "merged")
    ran = run("convert", file, *rules, "--base", tmp_path / "base", "--output", tmp_path / "peft")
    assert ran.code == 0, ran
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in stored.items()
    }
    merge(tmp_path / "base", tmp_path / "peft", tmp_path / "again")
    assert same_model(tmp_path / "again", tmp_path / "merged")


# -------------------------------------------------------------------------------------------------- where
# rules apply


@pytest.mark.parametrize("command", ["inspect", "merge", "convert", "verify", "combine", "unmerge"])
def test_rules_are_wrong_usage_for_a_peft_adapter(llama: Llama, tmp_path: Path, command: str) -> None:
    adapter, base, out = ("--adapter", llama.adapter), ("--base", llama.base), ("--output", tmp_path / "out")
    copy = shutil.copytree(llama.adapter, tmp_path / "copy") if command == "combine" else tmp_path
    words: dict[str, tuple[Any, ...]] = {
        "inspect": (llama.adapter,),
        "merge": (*base, *adapter, *out),
        "convert": (llama.adapter, *out),
        "verify": (*base, *adapter, "--merged", llama.merged),
        "combine": (*adapter, "--adapter", copy, *out),
        "unmerge": ("--model", llama.merged, *adapter, *out),
    }
    ran: Ran = run(command, *words[command], "--map", OUT)
    only_complaint(ran, 2, "--map is for files whose configuration names no format", "peft")
    assert not (tmp_path / "out").exists()


def test_rules_go_to_the_adapters_that_need_them(llama: Llama, tmp_path: Path) -> None:
    read_both = read_adapters([llama.adapter, llama.file], [rule for rule in llama.rules if rule != "--map"])
    assert [adapter.format for adapter in read_both] == ["peft", "mapped"]
    ran = run(
        "combine",
        "--adapter",
        llama.adapter,
        "--adapter",
        llama.file,
        *llama.rules,
        "--output",
        tmp_path / "out",
    )
    assert ran.code == 0, ran
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(found[name].tobytes() == (value * value).tobytes() for name, value in llama.vectors.items())


@pytest.mark.parametrize("case", ["bnb-nf4", "gptq-4bit-g32", "gguf-q4_k"])
@pytest.mark.parametrize("quantized", ["dequantize", "keep-or-dense"])
def test_a_quantized_base_takes_bare_vectors_as_it_takes_pefts(
    case: str, quantized: Any, tmp_path: Path
) -> None:
    import torch

    from tests.support.quantized import source_of, write_adapter

    base = source_of(case)
    config = read_checkpoint(base).config
    assert config is not None
    adapter = write_adapter(tmp_path / "peft", {"architectures": ["LlamaForCausalLM"], **config})
    saved = load_file(adapter / "adapter_model.safetensors")
    bare = {
        key.removeprefix(PREFIX).replace(
            ".ia3_l", ".out" if value.shape[1] == 1 else ".in"
        ): torch.from_numpy(value.ravel())
        for key, value in saved.items()
    }
    (tmp_path / "bare").mkdir()
    torch.save(bare, tmp_path / "bare" / "vectors.pt")
    read = read_adapter(tmp_path / "bare" / "vectors.pt", rules=[r"(.+)\.out=output", r"(.+)\.in=input"])
    for name, source in (("one", adapter), ("other", read)):
        fold(base, [source], tmp_path / name, Recipe(quantized=quantized), OutputOptions(reload_check="none"))
    files = [f.name for f in (tmp_path / "one").iterdir() if f.suffix in (".safetensors", ".gguf")]
    assert files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
