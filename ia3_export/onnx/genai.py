"""``genai_config.json``: onnxruntime-genai generates with the decoder graph that other runtimes load too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ia3_export.errors import Unsupported
from ia3_export.onnx.exported import file_name
from ia3_export.onnx.options import PRECISIONS

NAME = "genai_config.json"

#: Names by which configurations of transformers know the longest sequence.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
# Models without one (ALiBi) have no limit, but onnxruntime-genai insists on a number.
_NO_CONTEXT = 2048
_GRAPHS = tuple(f"onnx/{file_name('model', precision)}" for precision in PRECISIONS)
_FED = ("input_ids", "attention_mask", "position_ids")
_SEARCH = (
    "do_sample", "length_penalty", "no_repeat_ngram_size", "num_beams", "repetition_penalty", "temperature",
    "top_k", "top_p",
)  # fmt: skip


def write_genai_config(folder: Path, filename: str | None = None) -> Path:
    """Write ``genai_config.json`` into the exported `folder`, for the decoder graph ``folder / filename``.

    Returns it.

    onnxruntime-genai loads one graph a folder, of any precision: without `filename` it is the most exact one
    that there is. Layers, heads, head size, vocabulary and inputs are read from the graph, so that it does
    not matter how an architecture's configuration calls them; the special tokens, the longest sequence and
    the defaults of the search come from ``generation_config.json`` and ``config.json``.

    Raises `Unsupported` for a graph that is no decoder with a cache of equal layers: encoders, classifiers,
    encoder-decoder models, latent attention (keys and values of different sizes), hybrids with
    recurrent layers.

    Format: https://onnxruntime.ai/docs/genai/reference/config.html
    """
    import onnx

    if filename is None:
        filename = next((name for name in _GRAPHS if (folder / name).is_file()), None)
    if filename is None:
        raise Unsupported(
            "onnxruntime-genai runs decoders, and this model is exported as encoder and decoder",
            hint="leave out --target genai: optimum's ORTModel and transformers.js run this folder",
        )
    graph = onnx.load(folder / filename, load_external_data=False).graph
    defaults = {tensor.name for tensor in graph.initializer}
    inputs = {node.name: _shape(node) for node in graph.input if node.name not in defaults}
    layers, heads, head_size = _cache(inputs, filename)
    config = _read(folder / "config.json")
    config |= config.get("text_config", {})
    generation = _read(folder / "generation_config.json")
    vocabulary = next(_shape(node)[-1] for node in graph.output if node.name == "logits")
    context = next((config[key] for key in _CONTEXT if config.get(key)), _NO_CONTEXT)
    content = {
        "model": {
            # The name for any decoder. Those of architectures choose the same code, where there
            # is one at all.
            "type": "decoder",
            **_special_tokens(config | generation, int(vocabulary)),
            "context_length": context,
            "vocab_size": vocabulary,
            "decoder": {
                "filename": filename,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "num_hidden_layers": layers,
                "num_attention_heads": config.get("num_attention_heads", heads),
                "num_key_value_heads": heads,
                "head_size": head_size,
                "inputs": {
                    **{name: name for name in _FED if name in inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **_search(generation),
            "max_length": context,
            # one buffer for past and present needs operators that write into their input, such as
            # GroupQueryAttention
            "past_present_share_buffer": False,
        },
    }
    path = folder / NAME
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _cache(inputs: Mapping[str, list[int | str]], filename: str) -> tuple[int, int, int]:
    """Layers, heads and head size of the cache.

    Raises `Unsupported` where onnxruntime-genai could not make it.
    """
    caches = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
    layers = len(caches) // 2
    if not caches:
        raise Unsupported(
            f"{filename} has no key-value cache, and onnxruntime-genai only generates text",
            hint="leave out --target genai: ONNX Runtime, optimum's ORTModel and "
            "transformers.js run this folder",
        )
    wanted = {f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")}
    if unknown := sorted((inputs.keys() - wanted - set(_FED)) | (wanted - inputs.keys())):
        raise Unsupported(
            f"{filename} has inputs that onnxruntime-genai does not fill: {', '.join(unknown)}",
            hint="leave out --target genai: ONNX Runtime and optimum's ORTModelForCausalLM run this folder",
        )
    sizes = {(shape[1], shape[3]) for shape in caches.values()}
    if len(sizes) > 1 or not all(isinstance(size, int) for size in next(iter(sizes))):
        raise Unsupported(
            f"{filename} caches keys and values of (heads, head size) "
            f"{', '.join(map(str, sorted(sizes, key=str)))}; onnxruntime-genai makes them all alike",
            hint="leave out --target genai: ONNX Runtime and optimum's ORTModelForCausalLM run this folder",
        )
    heads, head_size = sizes.pop()
    return layers, int(heads), int(head_size)


def _search(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of generation that both have, under the same names and with the same meaning."""
    # 50 is transformers' own default, which its files therefore leave out
    search = {"top_k": 50, **{key: generation[key] for key in _SEARCH if key in generation}}
    if search.get("do_sample"):
        search.pop("num_beams", None)  # onnxruntime-genai does not sample beams
    return search


def _special_tokens(config: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """The ids that there are: onnxruntime-genai refuses a null, and a number that is no token."""

    def known(key: str) -> list[int]:
        given = config.get(key)
        ids = given if isinstance(given, list) else [given]
        return [token for token in ids if isinstance(token, int) and 0 <= token < vocabulary]

    found: dict[str, Any] = {}
    if bos := known("bos_token_id"):
        found["bos_token_id"] = bos[0]
    eos = known("eos_token_id")
    if eos:
        found["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    # Without one, token 0 would be cut off from the end of the prompts of a batch.
    if pad := known("pad_token_id") or eos:
        found["pad_token_id"] = pad[0]
    return found


def _shape(node: Any) -> list[int | str]:
    """The dimensions of a graph's input or output: numbers, or the names of the free ones."""
    return [dim.dim_param or dim.dim_value for dim in node.type.tensor_type.shape.dim]


def _read(path: Path) -> dict[str, Any]:
    """The settings of a configuration file; null, in transformers, is the same as leaving one out."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in content.items() if value is not None}
