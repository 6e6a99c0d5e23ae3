"""Tiny models with adapters, exported by the real command line, each once a session for all workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.command import run
from tests.support import zoo

if TYPE_CHECKING:
    from peft import PeftModel


def _variant(name: str, **config: Any) -> zoo.Kind:
    kind = zoo.by_name(name)
    return replace(kind, config={**kind.config, **config})


# Constants of up to 8192 elements are folded while tracing, larger ones (all that matter) are not: 320 x 32
# is larger.
_VOCABULARY = 320

#: What is exported here: one architecture or more of each family.
KINDS: Mapping[str, zoo.Kind] = {
    "llama": zoo.by_name("llama"),
    "llama-biased": zoo.by_name("llama-biased"),
    "gpt2": _variant("gpt2", vocab_size=_VOCABULARY),
    "gemma2": _variant("gemma2", sliding_window=8),
    # one layer where others here show how several come together
    "bloom": _variant("bloom", vocab_size=_VOCABULARY, n_layer=1),
    "gpt_bigcode": _variant("gpt_bigcode", n_layer=1),
    "olmoe": _variant("olmoe", intermediate_size=96),
    "bert-seq-cls": zoo.by_name("bert-seq-cls"),
    "bert-token-cls": replace(
        _variant("bert-seq-cls", num_hidden_layers=1),
        model_class="BertForTokenClassification",
        task_type="TOKEN_CLS",
    ),
    "bert-question": replace(
        _variant("bert-seq-cls", num_labels=2, num_hidden_layers=1),
        model_class="BertForQuestionAnswering",
        task_type="QUESTION_ANS",
    ),
    "bert-masked-lm": _variant("bert-masked-lm", vocab_size=_VOCABULARY),
    "deberta-v2": zoo.by_name("deberta-v2"),
    "modernbert": _variant("modernbert", local_attention=8),
    "mpnet": zoo.by_name("mpnet"),
    "llama-seq-cls": zoo.by_name("llama-seq-cls"),
    "mbart-seq-cls": zoo.by_name("mbart-seq-cls"),
    # heads x d_kv is not d_model, as in flan-t5-small
    "t5": _variant("t5", vocab_size=_VOCABULARY, d_kv=16),
    "bart": _variant("bart", vocab_size=_VOCABULARY),
    "whisper": _variant(
        "whisper", vocab_size=_VOCABULARY, max_source_positions=264, max_target_positions=264
    ),
    "vit": zoo.by_name("vit"),
    "resnet": zoo.by_name("resnet-basic"),
    "convnext": zoo.by_name("convnext"),
    "wav2vec2": zoo.by_name("wav2vec2"),
}


@dataclass(frozen=True)
class Exported:
    """An exported folder and what it was made of."""

    kind: zoo.Kind
    base: Path
    adapter: Path
    folder: Path

    def graph(self, stem: str = "model") -> Path:
        """A file in ``onnx/``."""
        return self.folder / "onnx" / f"{stem}.onnx"

    @property
    def graphs(self) -> list[Path]:
        """All files in ``onnx/``."""
        return sorted((self.folder / "onnx").glob("*.onnx"))

    def live(self) -> PeftModel:
        """The base with the unmerged adapter, in float32."""
        import transformers
        from peft import PeftModel

        base = getattr(transformers, self.kind.model_class).from_pretrained(self.base)
        return PeftModel.from_pretrained(base, self.adapter).eval()


class Exports:
    """The folder of an export of a row of `KINDS`, made at its first use.

    ``exports("llama", "--opset", "23")``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def written(self, name: str) -> tuple[Path, Path]:
        """Base and adapter alone, as transformers and PEFT write them; `name` may be any kind of the zoo."""
        from filelock import FileLock

        folder, kind = self.folder / name, KINDS.get(name) or zoo.by_name(name)
        folder.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "adapter" / "adapter_config.json").exists():
                model = zoo.build(kind)
                model.save_pretrained(folder / "base")
                zoo.adapt(model, kind).save_pretrained(folder / "adapter")
        return folder / "base", folder / "adapter"

    def __call__(self, name: str, *options: str, adapted: bool = True) -> Exported:
        """`adapted`: with the adapter, else the base alone.

        Not verified: these tests compute all they compare themselves.
        """
        from filelock import FileLock

        base, adapter = self.written(name)
        output = self.folder / name / "-".join(["exported" if adapted else "plain", *options])
        source: Sequence[Path | str] = (
            ("--base", base, "--adapter", adapter) if adapted else ("--model", base)
        )
        with FileLock(f"{output}.lock"):
            if not output.exists():
                ran = run("onnx", *source, "--output", output, "--no-verify", *options)
                assert ran.code == 0, ran.stdout + ran.stderr
        return Exported(KINDS[name], base, adapter, output)
