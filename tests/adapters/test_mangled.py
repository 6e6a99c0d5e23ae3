"""Names that PEFT damaged are restored rightly or not at all, whatever the adapter was called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ia3_export.adapters.mangled import restore_names
from ia3_export.adapters.model import Adapter, Site, TargetRules
from ia3_export.checkpoint.hub import Location
from ia3_export.errors import Refused

LLAMA = [
    f"model.layers.{i}.{m}"
    for i in range(12)
    for m in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]
BERT = [
    f"bert.encoder.layer.{i}.{m}"
    for i in range(3)
    for m in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
T5 = [
    f"{stack}.block.{i}.layer.{j}.{m}"
    for stack in ("encoder", "decoder")
    for i in range(3)
    for j, m in (
        (0, "SelfAttention.k"),
        (0, "SelfAttention.v"),
        (1, "EncDecAttention.k"),
        (2, "DenseReluDense.wo"),
    )
]
TARGETS = {
    "llama": (LLAMA, ("k_proj", "v_proj", "down_proj")),
    "bert": (BERT, ("key", "value", "output.dense")),
    "t5": (T5, ("k", "v", "wo")),
}
PREFIX = "base_model.model."
words = st.sampled_from(sorted({part for name in (*LLAMA, *BERT, *T5) for part in name.split(".")}))
names = st.one_of(
    words,
    st.builds(lambda word, end: word[: max(1, end)], words, st.integers(1, 6)),
    st.sampled_from(["base", "model", "default", "my-adapter", "m", "e", "2", "1", "10"]),
)


def saved_by_peft(path: str, name: str) -> str:
    """The module path in the key as PEFT 0.4 to 0.17 wrote it and a reader strips it."""
    return f"{PREFIX}{path}.ia3_l.{name}".replace(f".{name}", "").removesuffix(".ia3_l").removeprefix(PREFIX)


def adapter_of(sites: dict[str, Site], name: str, targets: tuple[str, ...]) -> Adapter:
    rules = TargetRules(target=targets, feedforward=())
    return Adapter(
        name=name,
        format="peft",
        location=Location(name, Path(name)),
        files=(),
        sites=sites,
        extras={},
        rules=rules,
        config={},
    )


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(TARGETS)), name=names, renamed=st.booleans())
def test_every_vector_comes_back_to_its_module_or_nothing_does(kind: str, name: str, renamed: bool) -> None:
    assume(not "ia3_l".startswith(name))  # the reader gives such keys their ending back
    modules, targets = TARGETS[kind]
    targeted = [m for m in modules if TargetRules(target=targets, feedforward=()).targets(m)]
    numbers = {module: float(i) for i, module in enumerate(targeted)}
    sites: dict[str, Site] = {}
    for module, number in numbers.items():  # a later key overwrites an equal one, as in PEFT's dict
        path = saved_by_peft(module, name)
        sites[path] = Site(path, "out", np.array([number], "<f4"), (1, 1), "F32")
    adapter = adapter_of(sites, "another" if renamed else name, targets)
    try:
        restored = restore_names(adapter, modules)
    except Refused:
        assert len(sites) < len(targeted), "refused, though every vector is in the file"
        return
    found = adapter if restored is None else restored
    placed = {s.module: float(s.vector[0]) for s in found.sites.values() if s.module in modules}
    if restored is not None or len(placed) == len(targeted):
        complete = len(placed) == len(targeted)  # what is missing is reported by the plan
        assert not complete or placed == numbers
    if not renamed and len(sites) == len(targeted):
        assert placed == numbers


def test_an_adapter_of_another_model_is_not_explained_away() -> None:
    sites = {m: Site(m, "out", np.ones(1, "<f4"), (1, 1), "F32") for m in T5}
    assert restore_names(adapter_of(sites, "t5", ("k", "v", "wo")), LLAMA) is None
    assert restore_names(adapter_of(sites, "layer", ("k", "v", "wo")), BERT) is None


def test_a_missing_prefix_is_not_taken_for_damage() -> None:
    bare = {m.removeprefix("bert."): m for m in BERT}
    sites = {m: Site(m, "out", np.ones(1, "<f4"), (1, 1), "F32") for m in bare}
    assert restore_names(adapter_of(sites, "mine", ("key", "value", "output.dense")), BERT) is None
