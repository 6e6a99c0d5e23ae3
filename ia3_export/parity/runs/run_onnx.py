"""Running exported graphs through ONNX Runtime: one forward a case, with the cache where there is one, and greedy decoding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia3_export.errors import DamagedFile, Unsupported, first_line
from ia3_export.fold import Array
from ia3_export.onnx.exported import CACHED, ENCODER, FIRST, MERGED, plain_stem
from ia3_export.parity.runs.greedy import TOKENS, Decoded, SpecialTokens
from ia3_export.parity.runs.inputs import Case
from ia3_export.parity.runs.run_torch import attended

_PAST, _PRESENT = "past_key_values", "present"

Cache = Mapping[str, Array]


@dataclass(frozen=True, slots=True, eq=False)
class OnnxModel:
    """The open sessions of one exported model, by file name without ``.onnx`` and precision: ``model``, or an
    ``encoder_model`` with ``decoder_model_merged`` or with optimum's two decoders."""

    sessions: Mapping[str, Any]

    @property
    def decoder(self) -> Any:
        """The session that gives the outputs at the first step."""
        return next(self.sessions[stem] for stem in ("model", MERGED, FIRST) if stem in self.sessions)

    @property
    def cached(self) -> bool:
        """Whether decoding is step by step, with a cache of keys and values."""
        return CACHED in self.sessions or any(i.name.startswith(_PAST) for i in self.decoder.get_inputs())

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return str(self.decoder.get_providers()[0])


def open_model(paths: Sequence[Path], device: str = "cpu") -> OnnxModel:
    """Open the files of one model (`find_onnx`). Raises `Unsupported` without ONNX Runtime, `DamagedFile` for a file it cannot load."""
    if len(paths) == 1 and not paths[0].stem.startswith("encoder_model"):
        return OnnxModel({"model": _open(paths[0], device)})
    return OnnxModel({plain_stem(path) or path.stem: _open(path, device) for path in paths})


def _open(path: Path, device: str) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise Unsupported(
            "ONNX Runtime is not installed", hint="pip install 'ia3-export[cpu]' (or [gpu], never both)"
        ) from None
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DamagedFile(
            f"ONNX Runtime cannot load {path}: {first_line(error)}", hint="export the model again"
        ) from error


def run_onnx(model: OnnxModel, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Outputs of every case (no cache among them); past tokens of a case run first. Raises `Unsupported` when a graph wants other
    inputs."""
    results = []
    for case in cases:
        tensors = {name: value.numpy() for name, value in case.tensors.items()}
        try:
            output = _forward(model, tensors, case.past)
        except Exception as error:  # as above
            wanted = sorted(i.name for i in model.decoder.get_inputs() if not i.name.startswith(_PAST))
            raise Unsupported(
                f"the graph does not run on these inputs ({case.name}): {first_line(error)}",
                hint=f"it wants {', '.join(wanted)}; give them with --inputs",
            ) from None
        results.append(attended(case, output))
    return results


def decode_onnx(model: OnnxModel, cases: Sequence[Case], special: SpecialTokens) -> list[Decoded] | None:
    """Greedy decoding of `TOKENS` tokens after each of `cases`, step by step with the cache, as
    `parity.greedy.decode` does it in PyTorch; None if the graphs have no cache."""
    if not model.cached:
        return None
    results = []
    for case in cases:
        tensors = {
            n: v.numpy() for n, v in case.tensors.items() if n not in ("decoder_input_ids", "position_ids")
        }
        whole = ENCODER in model.sessions
        states = _encode(model, tensors) if whole else None
        batch = next(iter(tensors.values())).shape[0]
        ids = np.full((batch, 1), special.start, np.int64) if whole else tensors["input_ids"]
        mask = tensors.get("attention_mask", np.ones(ids.shape, np.int64))
        cache: Cache = {}
        tokens, logits = [], []
        for _ in range(TOKENS):
            if whole:
                output, cache = _cross_step(model, ids, states, tensors.get("attention_mask"), cache)
            else:
                positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
                output, cache = _step(model.decoder, ids, mask, positions, cache)
                mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)
            last = output["logits"][:, -1].astype("<f8")
            logits.append(last)
            allowed = last.copy()
            allowed[:, list(special.ends)] = -np.inf
            ids = allowed.argmax(-1)[:, None]
            tokens.append(ids)
        results.append(Decoded(np.concatenate(tokens, axis=1), np.stack(logits, axis=1)))
    return results


def _forward(model: OnnxModel, tensors: Mapping[str, Array], past: int) -> dict[str, Array]:
    if ENCODER in model.sessions:
        states, ids = _encode(model, tensors), tensors["decoder_input_ids"]
        mask = tensors.get("attention_mask")
        before: Cache = {}
        if past:
            _, before = _cross_step(model, ids[:, :past], states, mask, {})
        return _cross_step(model, ids[:, past:], states, mask, before)[0]
    if not model.cached:
        return _call(model.decoder, tensors)
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask", np.ones(ids.shape, np.int64))
    positions = tensors.get("position_ids", np.maximum(mask.cumsum(-1) - 1, 0))
    cache: Cache = {}
    if past:
        _, cache = _step(model.decoder, ids[:, :past], mask[:, :past], positions[:, :past], {})
    return _step(model.decoder, ids[:, past:], mask, positions[:, past:], cache)[0]


def _encode(model: OnnxModel, tensors: Mapping[str, Array]) -> Array:
    encoder = model.sessions[ENCODER]
    return next(iter(_call(encoder, tensors).values()))


def _step(
    session: Any, ids: Array, mask: Array, positions: Array, cache: Cache
) -> tuple[dict[str, Array], dict[str, Array]]:
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return _split(_call(session, feeds | dict(cache or _no_cache(session, len(ids)))))


def _cross_step(
    model: OnnxModel, ids: Array, states: Array | None, mask: Array | None, cache: Cache
) -> tuple[dict[str, Array], dict[str, Array]]:
    merged = model.sessions.get(MERGED)
    session = merged or model.sessions[CACHED if cache and CACHED in model.sessions else FIRST]
    feeds = {"input_ids": ids, "encoder_hidden_states": states, "use_cache_branch": np.array([bool(cache)])}
    if mask is not None:
        feeds["encoder_attention_mask"] = mask
    output, new = _split(_call(session, feeds | dict(cache or _no_cache(session, len(ids)))))
    return output, {**cache, **new}


def _split(values: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Outputs, and the cache under the names of the next step's inputs."""
    outputs = {name: value for name, value in values.items() if not name.startswith(f"{_PRESENT}.")}
    cache = {n.replace(_PRESENT, _PAST, 1): v for n, v in values.items() if n.startswith(f"{_PRESENT}.")}
    return outputs, cache


def _no_cache(session: Any, batch: int) -> dict[str, Array]:
    """Past keys and values of length 0."""
    return {
        i.name: np.zeros([batch if axis == "batch_size" else axis if isinstance(axis, int) else 0 for axis in i.shape], _dtype(i))
        for i in session.get_inputs()
        if i.name.startswith(_PAST)
    }  # fmt: skip


def _dtype(port: Any) -> str:
    return {"tensor(float16)": "<f2", "tensor(double)": "<f8"}.get(port.type, "<f4")


def _call(session: Any, tensors: Mapping[str, Any]) -> dict[str, Array]:
    wanted = {port.name: port for port in session.get_inputs()}
    feeds = {name: value for name, value in tensors.items() if name in wanted and value is not None}
    if "token_type_ids" in wanted and "token_type_ids" not in feeds:
        feeds["token_type_ids"] = feeds["input_ids"] * 0
    for name, value in feeds.items():
        if re.fullmatch(r"tensor\((float\d*|double)\)", wanted[name].type):
            feeds[name] = value.astype(_dtype(wanted[name]), copy=False)
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))
