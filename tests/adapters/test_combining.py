"""Combining vectors and writing them.

torch's bits, the definitions, and what PEFT makes of the written configuration.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ia3_export.adapters import read_adapter
from ia3_export.adapters.combine import (
    combine_extras,
    combine_sites,
    combine_vectors,
    linear_warnings,
)
from ia3_export.adapters.model import Adapter, Site, TargetRules
from ia3_export.adapters.writing import ConfigFacts, peft_shape, write_peft
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.checkpoint.hub import Location
from ia3_export.errors import Refused, ShapeMismatch
from ia3_export.fold import Array, Direction

quick = settings(max_examples=60, deadline=None)

TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}

values = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1.0, 2.0**-126, 2.0**-149, 3.0])
factors = st.floats(-3, 3) | st.sampled_from([0.0, 1.0, 0.1, 1 / 3, -1.0])


@st.composite
def several(draw: st.DrawFn, *, missing: bool = True) -> tuple[list[Array | None], list[float]]:
    """Vectors of one length, some missing but not all, and as many weights."""
    length, count = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    vector = st.lists(values, min_size=length, max_size=length).map(lambda some: np.array(some, "<f4"))
    found = draw(st.lists(vector | st.none() if missing else vector, min_size=count, max_size=count))
    assume(any(one is not None for one in found))
    return found, draw(st.lists(factors, min_size=count, max_size=count))


def adapter(name: str, sites: Sequence[Site], extras: dict[str, StoredTensor] | None = None) -> Adapter:
    by_module = {site.module: site for site in sites}
    location = Location(name, Path(name), None, None)
    return Adapter(
        name=name,
        format="peft",
        location=location,
        files=(),
        sites=by_module,
        extras=extras or {},
        rules=TargetRules(target=(), feedforward=()),
        config={},
    )


def site(module: str, vector: Sequence[float], direction: Direction = "out", dtype: str = "F32") -> Site:
    array = np.array(vector, "<f8" if dtype == "F64" else "<f4")
    shape = (len(array), 1) if direction == "out" else (1, len(array))
    return Site(module, direction, array, shape, dtype)


def stored(name: str, content: Array, dtype: str = "F32") -> StoredTensor:
    data = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
    return StoredTensor(
        name=name,
        dtype=dtype,
        shape=content.shape,
        file=Path("nowhere"),
        offset=0,
        nbytes=data.nbytes,
        data=data,
    )


# -------------------------------------------------------------------------------------------------------
# arithmetic


@given(several(), st.sampled_from(list(TORCH)))
@quick
def test_linear_is_pefts_loop_in_the_dtype_of_the_base(
    case: tuple[list[Array | None], list[float]], dtype: str
) -> None:
    """``IA3Model.add_weighted_adapter``.

    The new vector has the dtype of the layer's weight, and starts from zeros.
    """
    import torch

    vectors, weights = case
    total = torch.zeros(len(next(v for v in vectors if v is not None)), dtype=getattr(torch, TORCH[dtype]))
    for vector, weight in zip(vectors, weights, strict=True):
        if vector is not None:
            wide = torch.from_numpy(vector.copy())
            total += (wide.double() if dtype == "F64" else wide) * weight
    found = combine_vectors(vectors, weights, "linear", dtype)
    wanted = total.double() if dtype == "F64" else total.float()
    assert found.tobytes() == wanted.numpy().tobytes()


@given(several(missing=False))
@quick
def test_a_product_of_two_is_rounded_once(case: tuple[list[Array | None], list[float]]) -> None:
    one, other = case[0][:2]
    assert one is not None and other is not None
    assert combine_vectors([one, other], (), "product", "F32").tobytes() == (one * other).tobytes()


@given(several())
@quick
def test_a_product_is_near_the_exact_one_in_any_order(case: tuple[list[Array | None], list[float]]) -> None:
    vectors, _ = case
    found = combine_vectors(vectors, (), "product", "F64")
    turned = combine_vectors(vectors[::-1], (), "product", "F64")
    present = [vector for vector in vectors if vector is not None]
    for i, value in enumerate(found):
        exact = math.prod(Fraction(float(vector[i])) for vector in present)
        assert abs(Fraction(float(value)) - exact) <= abs(exact) * Fraction(2) ** -50 + Fraction(2) ** -1070
        assert math.isclose(value, turned[i], rel_tol=2**-50, abs_tol=1e-300)


@given(several())
@example(([np.array([1.5], "<f4"), None], [0.5, 0.5]))
@quick
def test_delta_adds_changes_and_nothing_where_a_vector_is_missing(
    case: tuple[list[Array | None], list[float]],
) -> None:
    vectors, weights = case
    found = combine_vectors(vectors, weights, "delta", "F64")
    for i, value in enumerate(found):
        pairs = [(v, w) for v, w in zip(vectors, weights, strict=True) if v is not None]
        changes = (Fraction(w) * (Fraction(float(v[i])) - 1) for v, w in pairs)
        assert abs(Fraction(float(value)) - 1 - sum(changes)) <= Fraction(2) ** -46
    ones = [vector if vector is not None else np.ones(len(found), "<f4") for vector in vectors]
    assert found.tobytes() == combine_vectors(ones, weights, "delta", "F64").tobytes()


@given(several(missing=False))
@quick
def test_the_ends_of_a_mix_are_the_adapters_themselves(case: tuple[list[Array | None], list[float]]) -> None:
    vectors, _ = case
    for i, vector in enumerate(vectors):
        assert vector is not None
        weights = [float(i == j) for j in range(len(vectors))]
        assert (combine_vectors(vectors, weights, "linear", "F32") == vector).all()
        # 1 + (l - 1) in float64, rounded to float32 once
        assert (
            combine_vectors(vectors, weights, "delta", "F32")
            == (1 + (vector.astype("<f8") - 1)).astype("<f4")
        ).all()
    ones: list[Array | None] = [np.ones(3, "<f4")] * len(vectors)
    assert (combine_vectors(ones, case[1], "delta", "F32") == 1).all()
    assert (combine_vectors(ones, (), "product", "F32") == 1).all()


# ------------------------------------------------------------------------------------------------------------
# sites


names = st.sampled_from(["a.k", "a.v", "b.k", "b.v"])


@given(
    st.lists(st.sets(names, min_size=1), min_size=2, max_size=4),
    st.sampled_from(["product", "delta", "linear"]),
)
@quick
def test_every_module_of_any_adapter_gets_its_vector(held: list[set[str]], how: Any) -> None:
    adapters = [
        adapter(f"adapter{i}", [site(name, [i + 2.0, 0.5]) for name in sorted(some)])
        for i, some in enumerate(held)
    ]
    weights = [] if how == "product" else [1.0 / (i + 1) for i in range(len(held))]
    found = combine_sites(adapters, weights, how)
    assert set(found) == set().union(*held)
    for name, combined in found.items():
        vectors = [one.sites[name].vector if name in one.sites else None for one in adapters]
        assert combined.module == name and combined.direction == "out" and combined.shape == (2, 1)
        assert combined.vector.tobytes() == combine_vectors(vectors, weights, how, "F32").tobytes()
    said = linear_warnings(adapters, weights or [1.0 / len(held)] * len(held))
    missing = [one.name for one in adapters if one.sites.keys() != found.keys()]
    assert [name for name in missing if not any(f"{name} has no vector" in text for text in said)] == []
    assert sum("has no vector" in text for text in said) == len(missing)


@given(st.lists(factors, min_size=2, max_size=4))
@example([0.1] * 2 + [0.8])
@example([0.5, 0.5])
@quick
def test_a_sum_that_is_not_one_is_said(weights: list[float]) -> None:
    adapters = [adapter(f"a{i}", [site("m", [1.0])]) for i in range(len(weights))]
    assume(not 0.5e-6 < abs(sum(weights) - 1) < 2e-6)
    assert len(linear_warnings(adapters, weights)) == (abs(sum(weights) - 1) > 1e-6)


def test_the_widest_dtype_and_the_most_telling_shape_win() -> None:
    narrow, wide = site("m", [1.5, 2]), site("m", [1.5, 2], dtype="F64")
    found = combine_sites([adapter("a", [narrow]), adapter("b", [wide])], (), "product")["m"]
    assert (
        found.dtype == "F64" and found.vector.dtype == np.dtype("<f8") and found.vector.tolist() == [2.25, 4]
    )
    conv = Site("m", "out", narrow.vector, (1, 2, 1, 1), "F16")
    flat = Site("m", "out", narrow.vector, (2,), "BF16")
    for order in ([conv, flat], [flat, conv]):
        found = combine_sites([adapter(str(i), [one]) for i, one in enumerate(order)], (), "product")["m"]
        assert found.shape == (1, 2, 1, 1) and found.dtype == "F32"


def test_what_does_not_fit_together_is_refused() -> None:
    first = adapter("a", [site("m", [1, 2])])
    with pytest.raises(Refused, match="input of m"):
        combine_sites([first, adapter("b", [site("m", [1, 2], "in")])], (), "product")
    with pytest.raises(ShapeMismatch, match="2 and 3"):
        combine_sites([first, adapter("b", [site("m", [1, 2, 3])])], (), "product")


def test_equal_heads_are_kept_and_others_refused() -> None:
    head = np.arange(6, dtype="<f4").reshape(2, 3)
    one = adapter("a", [], {"head.weight": stored("head.weight", head)})
    other = adapter(
        "b", [], {"head.weight": stored("head.weight", head.copy()), "norm": stored("norm", head[0])}
    )
    assert set(combine_extras([one, other])) == {"head.weight", "norm"}
    for changed in (stored("head.weight", head + 1), stored("head.weight", head.reshape(3, 2))):
        with pytest.raises(Refused, match=r"head\.weight"):
            combine_extras([one, other, adapter("c", [], {"head.weight": changed})])


# ----------------------------------------------------------------------------------------------------
# what is written


parts = st.sampled_from(["0", "1", "11", "layers", "k_proj", "xk_proj", "fc", "größe", "a+b", "ia3", "w"])
paths = st.lists(parts, min_size=1, max_size=4).map(".".join)
#: Modules of a model, none of which ends in another: `feedforward_modules` are matched by their ends.
modules = st.lists(paths, min_size=1, max_size=5, unique=True).filter(
    lambda some: not any(a != b and a.endswith(b) for a in some for b in some)
)


@st.composite
def written(draw: st.DrawFn) -> list[Site]:
    sites = []
    for module in draw(modules):
        direction: Direction = draw(st.sampled_from(["out", "in"]))
        dtype = draw(st.sampled_from(["F64", "F32", "F16"]))
        vector = draw(st.lists(values, min_size=2, max_size=4))
        array = np.array(vector, STORED[dtype]).astype("<f8" if dtype == "F64" else "<f4")
        n = len(array)
        shape = draw(
            st.sampled_from([(n,), (n, 1) if direction == "out" else (1, n), (1, n, 1, 1), (1, n, 1, 1, 1)])
        )
        sites.append(Site(module, direction, array, shape, dtype))
    return sites


@given(written())
@quick
def test_what_is_written_is_read_back_as_it_was(sites: list[Site]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_peft(folder, sites, {}, None, ConfigFacts(task_type="CAUSAL_LM"))
        first = {file.name: file.read_bytes() for file in folder.iterdir()}
        write_peft(folder, sites[::-1], {}, None, ConfigFacts(task_type="CAUSAL_LM"))
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == first
        read = read_adapter(folder)
        assert read.task_type == "CAUSAL_LM" and set(read.sites) == {site.module for site in sites}
        for before in sites:
            after = read.sites[before.module]
            assert (after.direction, after.dtype, after.shape) == (
                before.direction,
                before.dtype,
                peft_shape(before),
            )
            assert after.vector.tobytes() == before.vector.tobytes()


@given(written(), st.lists(paths, max_size=5))
@quick
def test_peft_finds_the_written_modules(sites: list[Site], others: list[str]) -> None:
    """Whole paths match themselves and, as list entries do in PEFT, paths that end in them after a dot."""
    from peft import IA3Config
    from peft.tuners.ia3 import IA3Model
    from peft.tuners.tuners_utils import check_target_module_exists

    with tempfile.TemporaryDirectory() as place:
        write_peft(Path(place), sites, {}, None, ConfigFacts(base_model="org/model", to_save=["head"]))
        config = IA3Config.from_pretrained(place)
        plain = json.loads((Path(place) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config.base_model_name_or_path == "org/model" and config.modules_to_save == ["head"]
    assert plain["target_modules"] == sorted(site.module for site in sites)
    held = {site.module: site.direction for site in sites}
    for path in [*held, *others]:
        wanted = path in held or any(path.endswith(f".{module}") for module in held)
        assert bool(check_target_module_exists(config, path)) == wanted
    for module, direction in held.items():
        assert bool(IA3Model._check_target_module_feedforward(config, module)) == (direction == "in")


def test_a_module_that_ends_in_another_keeps_its_side(tmp_path: Path) -> None:
    sites = [site("1", [1, 2], "in"), site("11", [3, 4], "out")]
    write_peft(tmp_path, sites, {}, None, ConfigFacts())
    assert {name: one.direction for name, one in read_adapter(tmp_path).sites.items()} == {
        "1": "in",
        "11": "out",
    }
