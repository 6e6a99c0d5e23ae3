"""The model card of a merged folder: ``README.md`` with metadata as the Hub specifies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ia3_export.checkpoint.hub import is_hub_id
from ia3_export.planning.plan import Plan

#: The base's own card keeps its text under this name.
BASE_CARD = "README.base.md"
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "ForImageClassification": "image-classification",
}
_CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
_FENCE = "---"
#: Characters of a card that are read. The longest front matters, with results of benchmarks in them, have
#: some 300,000.
_READ = 1_000_000


def make_card(plan: Plan) -> str:
    """The card of a merge, in Markdown."""
    import yaml

    base_id = _base_id(plan)
    front = yaml.safe_dump(_front_matter(plan, base_id), sort_keys=False)
    location = plan.base.stored.location
    title = f"{location.name} + {' + '.join(a.name for a in plan.adapters)}"
    lines = [
        "---",
        front.strip(),
        "---",
        "",
        f"# {title}",
        "",
        "(IA)3 vectors folded into the weights of "
        + (f"`{base_id}`" if base_id else "a local base model")
        + " with ia3-export. The model runs without PEFT and at the base's speed.",
        "",
        "| adapter | format | task | vectors | parameters |",
        "| --- | --- | --- | --- | --- |",
    ]
    for adapter in plan.adapters:
        shown = adapter.location.hub_id or adapter.name
        lines.append(
            f"| {_cell(shown)} | {adapter.format} | {_cell(adapter.task_type or '')} | {len(adapter.sites)} "
            f"| {adapter.parameters:,} |"
        )
    changed = sum(change.nbytes for change in plan.changes.values())
    lines += [
        "",
        (
            f"{len(plan.changes)} of {len(plan.base.stored.tensors)} tensors changed ({changed:,} bytes); "
            f"combined by `{plan.recipe.combine}`"
        )
        + (f" with weights {', '.join(f'{w:g}' for w in plan.recipe.weights)}" if plan.recipe.weights else "")
        + (
            f", cast `{plan.recipe.cast}`, dtype `{plan.recipe.dtype}`. {_quantization(plan)}Every other "
            "tensor is byte for byte the base's."
        ),
        "",
        "`ia3_export.json` lists every changed tensor and the digests of all files."
        + (f" The base's own card is `{BASE_CARD}`." if "README.md" in plan.base.stored.side_files else ""),
        "",
    ]
    return "\n".join(lines)


def _front_matter(plan: Plan, base_id: str | None) -> dict[str, Any]:
    """The Hub's metadata of the merged model: the base's where they stay true, and what it is a merge of.

    ``base_model`` holds hub ids or is left out: a local path would be a broken link.
    """
    stored = plan.base.stored
    base_card = stored.folder / "README.md"
    base_front = _read_front_matter(base_card) if "README.md" in stored.side_files else {}
    front: dict[str, Any] = {key: base_front[key] for key in _CARRIED_OVER if key in base_front}
    stated = stored.config or {}
    if plan.config is not None and plan.config.get("architectures") != stated.get("architectures"):
        # the head is another one, so the base's pipeline and library are no longer the model's
        front.pop("library_name", None)
        front.pop("pipeline_tag", None)
        pipeline = next(
            (tag for end, tag in _PIPELINES.items() if (plan.model_class or "").endswith(end)), None
        )
        front |= {"pipeline_tag": pipeline} if pipeline else {}
    if not stored.is_gguf:
        front.setdefault("library_name", "transformers")
    if base_id is not None:
        front["base_model"] = [base_id]
        front["base_model_relation"] = "merge"
    front["tags"] = ["ia3", "merge"]
    return front


def _quantization(plan: Plan) -> str:
    if not plan.base.is_quantized:
        return ""
    formats = ", ".join(f"{count} {name}" for name, count in plan.base.quantization.formats.items())
    if plan.dequantizes:
        return f"The base's quantized weights ({formats}) were dequantized. "
    dense = sum(outcome.kind == "dense" for outcome in plan.outcomes)
    return f"The base stays quantized ({formats}), the vectors are in its scales and no code was touched" + (
        f"; {dense} weights that could not take theirs became dense. " if dense else ". "
    )


def _base_id(plan: Plan) -> str | None:
    if plan.base.stored.location.hub_id is not None:
        return plan.base.stored.location.hub_id
    named = {adapter.config.get("base_model_name_or_path") for adapter in plan.adapters}
    name = named.pop() if len(named) == 1 else None
    return name if isinstance(name, str) and is_hub_id(name) else None


def _read_front_matter(path: Path) -> dict[str, Any]:
    """The metadata of a card, ``{}`` where they cannot be read.

    They are a courtesy, and whatever is in them stops no merge.
    """
    import yaml

    with path.open(encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip() for line in file.read(_READ).split("\n")]
    if lines[0] != _FENCE or _FENCE not in lines[1:]:
        return {}
    try:
        # not libyaml's loader: it runs out of stack where this one runs out of recursion
        front = yaml.safe_load("\n".join(lines[1 : lines.index(_FENCE, 1)]))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return {}  # of all but the first: a date that is none, a number without digits, nesting without end
    return front if isinstance(front, dict) else {}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
