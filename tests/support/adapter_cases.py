"""Adapters that other libraries wrote, with the outputs of those libraries' own unmerged forwards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent.parent / "fixtures"


@dataclass(frozen=True)
class AdapterCase:
    """One adapter of one fixture.

    `output` is the tensor of ``expected.safetensors`` that the merged model must give, `field` the attribute
    of the model's output. `refuse` says why it cannot be folded, where it cannot.
    """

    name: str
    adapter: Path
    base: Path
    class_name: str
    expected: Path
    output: str
    field: str
    refuse: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def unplaced(self) -> bool:
        """Whether it has a head that no class of transformers has."""
        return bool(self.options.get("allow_unused"))

    @property
    def two_sides(self) -> bool:
        """Whether modules have vectors on their input and their output."""
        return self.name.endswith("a_and_b")

    @property
    def changes(self) -> bool:
        """Whether the library's own merge forgets a bias."""
        return not self.refuse and not self.name.startswith(("t5", "llama", "mistral"))

    def labels(self, converted: Path) -> int:
        """Labels of the classification head in a converted adapter, 0 without one."""
        from safetensors.torch import load_file

        names = ("model.classifier.bias", "out_proj.bias", "model.score.weight")
        weights = load_file(converted / "adapter_model.safetensors")
        return next(
            (len(value) for name, value in weights.items() if name.endswith(names) and "attn" not in name), 0
        )

    def inputs(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        names = ("input_ids", "attention_mask", "decoder_input_ids", "token_type_ids")
        return {name: value for name, value in load_file(self.expected).items() if name in names}

    def wanted(self) -> Any:
        from safetensors.torch import load_file

        return load_file(self.expected)[self.output]


def adapterhub() -> list[AdapterCase]:
    """AdapterHub's library, 1.3.0."""
    found = []
    for folder in sorted((FIXTURES / "adapterhub").glob("*/case.json")):
        case, folder = json.loads(folder.read_text()), folder.parent
        head = case["hf_class"] is not None
        names = case["adapter_names"] if (folder / "adapter" / case["adapter_names"][0]).is_dir() else [""]
        for name in names:
            prefix = f"{name}." if name else ""
            has_logits = head and case["hf_class"] not in ("BertModel",)
            logits = "start_logits" if case["hf_class"] == "BertForQuestionAnswering" else "logits"
            found.append(
                AdapterCase(
                    f"{folder.name}{'-' if name else ''}{name}",
                    folder / "adapter" / name,
                    FIXTURES / "adapterhub" / case["base"],
                    case["hf_class"] or case["base_class"],
                    folder / "expected.safetensors",
                    f"{prefix}unmerged.{logits if has_logits else 'last_hidden_state'}",
                    logits if has_logits else "last_hidden_state",
                    case["refuse"],
                    {} if head else {"allow_unused": True},
                )
            )
    return found


def research() -> list[AdapterCase]:
    """T-Few, MaTS, MTTL and Tango."""
    found = []
    for folder in sorted((FIXTURES / "research").glob("*/case.json")):
        case, folder = json.loads(folder.read_text()), folder.parent
        found.append(
            AdapterCase(
                folder.name,
                folder / case["checkpoint"],
                (folder / case["base"]).resolve(),
                case["model_class"],
                folder / "expected.safetensors",
                "logits",
                "logits",
                None if case["is_ia3"] else "not (IA)3",
            )
        )
    return found


def old_peft() -> list[AdapterCase]:
    """PEFT 0.4 to 0.21, and ms-swift."""
    found = []
    for folder in sorted((FIXTURES / "old_peft").glob("*/case.json")):
        case, folder = json.loads(folder.read_text()), folder.parent
        for name, place in case["adapters"].items():
            found.append(
                AdapterCase(
                    f"{folder.name}-{name}",
                    folder / place,
                    (folder / case["base"]).resolve(),
                    case["hf_class"],
                    folder / "expected.safetensors",
                    f"logits.{name}",
                    "logits",
                    None,
                    case,
                )
            )
    return found
