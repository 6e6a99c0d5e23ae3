"""Finding and running exported graphs: grouping by name, types of the inputs, caches."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ia3_export.errors import DamagedFile, NotFound, Unsupported
from ia3_export.onnx.exported import find_onnx
from ia3_export.onnx.runtime import open_model
from ia3_export.parity.runs.greedy import TOKENS, SpecialTokens
from ia3_export.parity.runs.inputs import Case
from ia3_export.parity.runs.run_onnx import decode_onnx, run_onnx

pytestmark = [pytest.mark.filterwarnings("ignore")]


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def _found(location: Path) -> list[tuple[str, ...]]:
    return [tuple(path.name for path in group) for group in find_onnx(location)]


@pytest.mark.parametrize(
    ("files", "groups"),
    [
        (("model.onnx",), [("model.onnx",)]),
        (
            ("model_q4.onnx", "model.onnx", "model_fp16.onnx", "model.onnx_data", "model.ort"),
            [("model.onnx",), ("model_fp16.onnx",), ("model_q4.onnx",)],
        ),
        (
            ("encoder_model.onnx", "decoder_model_merged.onnx"),
            [("encoder_model.onnx", "decoder_model_merged.onnx")],
        ),
        (
            ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"),
            [("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")],
        ),
        # optimum writes all four
        (
            (
                "encoder_model.onnx",
                "decoder_model.onnx",
                "decoder_with_past_model.onnx",
                "decoder_model_merged.onnx",
            ),
            [("encoder_model.onnx", "decoder_model_merged.onnx")],
        ),
        (
            (
                "encoder_model.onnx",
                "decoder_model_merged.onnx",
                "encoder_model_int8.onnx",
                "decoder_model_merged_int8.onnx",
            ),
            [
                ("encoder_model.onnx", "decoder_model_merged.onnx"),
                ("encoder_model_int8.onnx", "decoder_model_merged_int8.onnx"),
            ],
        ),
        # half of a model is none, and a file of another name is no part of one
        (("model.onnx", "encoder_model_q4.onnx", "modelling.onnx", "tokenizer.onnx"), [("model.onnx",)]),
    ],
    ids=["one", "precisions", "merged", "separate", "both", "encoder-decoder precisions", "others"],
)
def test_files_are_grouped_into_models(
    tmp_path: Path, files: tuple[str, ...], groups: list[tuple[str, ...]]
) -> None:
    _touch(tmp_path / "onnx", *files)
    assert _found(tmp_path) == groups
    assert _found(tmp_path / "onnx") == groups


def test_the_folder_onnx_comes_before_the_folder_itself(tmp_path: Path) -> None:
    _touch(tmp_path, "model.onnx", "onnx/model_q4.onnx")
    assert _found(tmp_path) == [("model_q4.onnx",)]


@pytest.mark.parametrize("halves", [("model",), ("encoder_model", "decoder_model_merged")])
def test_hard_links_count_once_and_copies_twice(tmp_path: Path, halves: tuple[str, ...]) -> None:
    _touch(tmp_path, *(f"{half}_int8.onnx" for half in halves))
    for half in halves:
        os.link(tmp_path / f"{half}_int8.onnx", tmp_path / f"{half}_quantized.onnx")
    assert _found(tmp_path) == [tuple(f"{half}_int8.onnx" for half in halves)]
    for half in halves:
        (tmp_path / f"{half}_quantized.onnx").unlink()
        _touch(tmp_path, f"{half}_quantized.onnx")
    assert len(_found(tmp_path)) == 2


def test_one_half_of_an_encoder_decoder_brings_the_other(tmp_path: Path) -> None:
    _touch(tmp_path, "encoder_model.onnx", "decoder_model_merged.onnx", "model_q4.onnx", "strange.onnx")
    whole = [("encoder_model.onnx", "decoder_model_merged.onnx")]
    assert _found(tmp_path / "encoder_model.onnx") == whole
    assert _found(tmp_path / "decoder_model_merged.onnx") == whole
    assert _found(tmp_path / "model_q4.onnx") == [("model_q4.onnx",)]
    assert _found(tmp_path / "strange.onnx") == [("strange.onnx",)]


def test_a_folder_without_graphs_and_a_damaged_file_are_told(tmp_path: Path) -> None:
    _touch(tmp_path, "readme.txt", "damaged.onnx")
    for location in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotFound) as caught:
            find_onnx(location)
        assert str(location) in str(caught.value) and caught.value.hint
    with pytest.raises(DamagedFile, match="damaged"):
        open_model([tmp_path / "damaged.onnx"])


# A decoder whose logits are sums over the past, so that what a step sees of it can be told from its outputs:
# the cache is a running list of ids, the logits of a token are (its own id, all ids so far, its position,
# what is attended) as one-hot scores.
_DECODER = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[batch_size, s] input_ids, int64[batch_size, t] attention_mask, int64[batch_size, s] position_ids,
   {type}[batch_size, 1, p, 1] past_key_values_0_key, {type}[batch_size, 1, p, 1] past_key_values_0_value)
=> ({type}[batch_size, s, 4] logits,
    {type}[batch_size, 1, t, 1] present_0_key, {type}[batch_size, 1, t, 1] present_0_value)
<int64[1] one = {{1}}, int64[1] two = {{2}}, int64[3] heads = {{0, 1, -1}}, int64[1] last = {{-1}}>
{{
  ids3 = Unsqueeze (input_ids, last)
  ids = Cast <to = {code}> (ids3)
  ids4 = Unsqueeze (ids, one)
  present_0_key = Concat <axis = 2> (past_key_values_0_key, ids4)
  present_0_value = Identity (present_0_key)
  all = ReduceSum <keepdims = 1> (present_0_key, two)
  all3 = Squeeze (all, one)
  zeros = Sub (ids, ids)
  sums = Add (zeros, all3)
  positions3 = Unsqueeze (position_ids, last)
  positions = Cast <to = {code}> (positions3)
  mask = Cast <to = {code}> (attention_mask)
  attended2 = ReduceSum <keepdims = 1> (mask, one)
  attended3 = Unsqueeze (attended2, one)
  attended = Add (zeros, attended3)
  logits = Concat <axis = -1> (ids, sums, positions, attended)
}}
"""


def _decoder(folder: Path, dtype: str = "float") -> Path:
    import onnx

    text = _DECODER.format(type=dtype, code={"float": 1, "float16": 10, "double": 11}[dtype])
    model = onnx.parser.parse_model(text)
    # the text form knows no names with dots
    for names in (*(node.input for node in model.graph.node), *(node.output for node in model.graph.node)):
        names[:] = [name.replace("_0_", ".0.") for name in names]
    for port in (*model.graph.input, *model.graph.output):
        port.name = port.name.replace("_0_", ".0.")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _case(rows: list[list[int]], *, padded: int = 0, past: int = 0) -> Case:
    import torch

    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[-1, :padded] = 0
    return Case("a case", {"input_ids": ids, "attention_mask": mask}, past)


@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
def test_a_case_with_past_gives_the_rest_with_the_cache_of_the_first_tokens(
    tmp_path: Path, dtype: str
) -> None:
    model = open_model([_decoder(tmp_path, dtype)])
    assert model.cached and model.provider == "CPUExecutionProvider"
    rows = [[3, 5, 7, 9], [2, 4, 6, 8]]
    (whole,) = run_onnx(model, [_case(rows)])
    (after,) = run_onnx(model, [_case(rows, past=3)])
    assert set(whole) == set(after) == {"logits"}
    got = np.asarray(after["logits"], np.float64).reshape(-1, 4)
    # of the last token: its id, the sum with the three in the cache, position 3, four attended
    assert got.tolist() == [[9, 24, 3, 4], [8, 20, 3, 4]]
    assert np.asarray(whole["logits"]).reshape(-1, 4)[:, 1].tolist() == [24] * 4 + [20] * 4


def test_positions_are_counted_from_the_first_attended_token(tmp_path: Path) -> None:
    model = open_model([_decoder(tmp_path)])
    (got,) = run_onnx(model, [_case([[3, 5, 7], [9, 4, 6]], padded=1)])
    ids, positions = (np.asarray(got["logits"])[:, :, column].tolist() for column in (0, 2))
    assert positions == [[0, 1, 2], [0, 0, 1]]
    assert ids == [[3, 5, 7], [0, 4, 6]], "what a padded place gives is not compared"


def test_greedy_decoding_grows_cache_mask_and_positions_and_never_ends_early(tmp_path: Path) -> None:
    model = open_model([_decoder(tmp_path)])
    (decoded,) = decode_onnx(model, [_case([[1, 2], [0, 3]], padded=1)], SpecialTokens(-1, (1,))) or [None]
    assert decoded is not None and decoded.tokens.shape == (2, TOKENS)
    # 1 (the sum, always the largest) would end the text; the next best are attended (3) and position (2)
    assert 1 not in decoded.tokens
    positions, attended = decoded.logits[:, :, 2], decoded.logits[:, :, 3]
    assert positions.tolist() == [list(range(1, 1 + TOKENS)), list(range(TOKENS))]
    assert attended.tolist() == [list(range(2, 2 + TOKENS)), list(range(1, 1 + TOKENS))]
    sums = np.cumsum(np.concatenate([[[3], [3]], decoded.tokens[:, :-1]], axis=1), axis=1)
    assert decoded.logits[:, :, 1].tolist() == sums.tolist()


def _encoder(folder: Path, port: str, dtype: str) -> Path:
    import onnx

    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    g ({dtype}[batch_size, n] {port}) => ({dtype}[batch_size, n] logits) {{ logits = Add ({port}, {port}) }}
    """
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    "dtype",
    [
        "float",
        "float16",
        "double",
    ],
)
def test_inputs_are_given_in_the_type_that_the_graph_wants(tmp_path: Path, dtype: str) -> None:
    import torch

    model = open_model([_encoder(tmp_path, "pixel_values", dtype)])
    assert not model.cached
    (got,) = run_onnx(model, [Case("a case", {"pixel_values": torch.tensor([[0.5, 2.0]])})])
    assert np.asarray(got["logits"]).tolist() == [[1.0, 4.0]]
    assert decode_onnx(model, [_case([[1]])], SpecialTokens(-1, ())) is None


def test_a_graph_that_wants_other_inputs_is_told_with_what_it_wants(tmp_path: Path) -> None:
    model = open_model([_encoder(tmp_path, "spectrogram", "float")])
    with pytest.raises(Unsupported, match="a case") as caught:
        run_onnx(model, [_case([[1]])])
    assert "spectrogram" in caught.value.hint
