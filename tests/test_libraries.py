"""What we use of other libraries beyond their documented interface is there, or is named when it is not."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from ia3_export import libraries
from ia3_export.errors import Unsupported
from tests.support import zoo

pytestmark = [pytest.mark.versions, pytest.mark.filterwarnings("ignore")]

_PACKAGE = Path(libraries.__file__).parent


def _release(name: str) -> str:
    library = name.partition(":")[0].partition(".")[0]
    return f"{library} {metadata.version(library)}: {name.partition(':')[2]}"


@pytest.mark.parametrize("name", libraries.PRIVATE, ids=_release)
def test_the_installed_release_has_it(name: str) -> None:
    libraries.private(name)


def test_what_a_release_has_no_longer_is_said_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        libraries, "PRIVATE", {"torch.gone_away:Thing": "the export", "torch:gone": "the merge"}
    )
    for name, use in (("torch.gone_away:Thing", "the export"), ("torch:gone", "the merge")):
        with pytest.raises(Unsupported) as caught:
            libraries.private(name)
        assert f"torch {metadata.version('torch')} has no {name.replace(':', '.')}" in str(caught.value)
        assert use in str(caught.value)
        assert "older torch" in caught.value.hint


def test_every_listed_part_is_used_and_nothing_private_is_imported_around_the_list() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in _PACKAGE.rglob("*.py")}
    used = set(re.findall(r'private\(\s*f?"([\w.]+:[\w.]+)"', "\n".join(sources.values())))
    tables = {name for name in libraries.PRIVATE if ".modeling_auto:" in name}
    assert used == set(libraries.PRIVATE) - tables
    around = re.compile(
        r"^\s*(?:from|import) "
        r"(?:torch|transformers|peft|optimum|onnxscript|onnx_ir|accelerate)(?:\.\w+)*\._\w|^\s*from "
        r"(?:torch|transformers|peft|optimum)[\w.]* import (?:.*, )?_\w|^\s*from "
        r"transformers\.(?:core_model_loading|conversion_mapping|exporters|integrations)\b",
        re.MULTILINE,
    )
    found = {str(path): match.group() for path, text in sources.items() if (match := around.search(text))}
    assert found == {}


@pytest.mark.parametrize(
    ("kind", "takes"),
    [("llama", True), ("gpt2", True), ("t5", True), ("whisper", True), ("mamba", False), ("vit", False)],
)
def test_the_cache_is_found_by_the_name_that_the_release_gives_it(kind: str, takes: bool) -> None:
    import torch

    model = zoo.build(zoo.by_name(kind)).eval()
    name = libraries.cache_argument(model)
    assert (name is not None) == takes
    if name is None or kind == "whisper":
        return
    ids = {"input_ids": torch.full((1, 3), 7)}
    first = ids | ({"decoder_input_ids": ids["input_ids"]} if model.config.is_encoder_decoder else {})
    cache = libraries.returned_cache(model(**first, use_cache=True))
    assert cache.get_seq_length() == 3
    model(**first, **{name: cache}, use_cache=True)
    assert cache.get_seq_length() == 6


def test_graphs_are_forgotten_whatever_else_lives() -> None:
    import weakref

    from ia3_export.libraries import forget_graphs, private

    class Gone:
        pass

    gone = Gone()
    proxy = weakref.proxy(gone)
    del gone
    matcher = private("onnxscript.rewriter._matcher:SimplePatternMatcher")(None)
    matcher._current_node = matcher._graph = object()
    forget_graphs()
    assert matcher._current_node is None and matcher._graph is None
    assert type(proxy) is weakref.ProxyType


def test_what_is_imported_without_the_compiler_compiles_when_it_is_called() -> None:
    import torch

    from ia3_export.libraries import compiling_later

    before = torch.compile, torch._disable_dynamo
    with compiling_later():

        @torch.compile(backend="eager", dynamic=True)
        def doubled(values: Any) -> Any:
            return 2 * values

        @torch._disable_dynamo
        def named(values: Any, *, add: int) -> Any:
            return values + add

    assert (torch.compile, torch._disable_dynamo) == before
    assert doubled.__name__ == "doubled" and doubled(torch.ones(2)).tolist() == [2, 2]
    assert named(torch.ones(1), add=3).tolist() == [4]
    assert torch.compile(lambda values: named(values, add=1) * 3, backend="eager")(
        torch.ones(1)
    ).tolist() == [6]


def test_bitsandbytes_is_imported_without_the_compiler() -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'ia3-export[bitsandbytes]'")
    program = (
        "import sys\nfrom ia3_export.libraries import compiling_later\n"
        "with compiling_later():\n    import bitsandbytes\nimport torch\n"
        "from bitsandbytes import functional\n"
        "codes, state = functional.quantize_4bit(torch.ones(4, 64), quant_type='nf4')\n"
        "assert functional.dequantize_4bit(codes, state).shape == (4, 64)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
