"""Codes of 4 bits that give the nearest products, not the nearest weights.

What a product loses by codes is ``(w - q) H (w - q)`` for each row w of the weight, where H are the second
moments of the activations that it multiplies (GPTQ, https://arxiv.org/abs/2210.17323, starts from the same
sum). Ranges of blocks are searched and codes rounded up or down to make it small; no code leaves the two
neighbours of its weight, so that every code can still be compared with the weight that it stands for.
"""

from __future__ import annotations

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.blocks import BLOCK, Codes, blocks_of, half, half_up, pack

_TOP, _MIDDLE = 15, 8
#: Ranges that are tried, in steps of a code beyond or within the block's own.
_STRETCHES = np.array([0.0, -1.0, -0.7, -0.4, -0.2, 0.2, 0.4, 0.7, 1.0], np.float32)
#: Sweeps over all codes; a third changes next to nothing.
_SWEEPS = 2
#: Share of the mean moment that is added to each: few tokens say nothing sure about how inputs go together.
_DAMPING = 0.05
#: Rows that are worked on at a time: their errors stay in the processor's cache.
_ROWS = 1024


def encode_nearest(matrix: Array, moments: Array | None) -> Codes:
    """Codes of 4 bits of a float32 `matrix` (rows, columns) for inputs with second `moments` (columns,
    columns), or inputs of which nothing is known.
    """
    columns = matrix.shape[1]
    width = -(-columns // BLOCK) * BLOCK
    if moments is None:
        whole, importance = None, np.ones(width, np.float32)
    else:
        whole = np.zeros((width, width), np.float32)
        whole[:columns, :columns] = moments
        whole[np.diag_indices(width)] += _DAMPING * max(float(np.trace(moments)) / columns, 1e-30)
        importance = np.ascontiguousarray(np.diagonal(whole))
    parts = [_encode(matrix[i : i + _ROWS], whole, importance) for i in range(0, len(matrix), _ROWS)]
    return pack(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _encode(matrix: Array, moments: Array | None, importance: Array) -> tuple[Array, Array, Array]:
    """Codes (rows, blocks, 32), scales and offsets (rows, blocks), all float32."""
    values = blocks_of(matrix, BLOCK)
    scales, offsets = _ranges(values, importance.reshape(-1, BLOCK))
    exact = (values - offsets[..., None]) / scales[..., None] + _MIDDLE
    if moments is None:
        return np.clip(np.rint(exact), 0, _TOP), scales, offsets
    turned = np.ascontiguousarray(exact.reshape(len(matrix), -1).T)
    steps = np.repeat(np.ascontiguousarray(scales.T), BLOCK, axis=0)
    codes = np.ascontiguousarray(_settled(turned, steps, moments).T).reshape(exact.shape)
    return codes, scales, offsets


def _ranges(values: Array, importance: Array) -> tuple[Array, Array]:
    """The scale and offset of each block that bring its weights nearest, each error counted by the
    `importance` (blocks, 32) of its input. None cuts a weight off by more than a step.
    """
    low, high = values.min(-1), values.max(-1)
    total = np.maximum(importance.sum(-1), np.finfo(np.float32).tiny)
    best = np.full(low.shape, np.inf, np.float32)
    scales, offsets = np.ones_like(low), np.zeros_like(low)
    for stretch in _STRETCHES:
        scale = half_up((high - low) / (_TOP + stretch))
        offset = half((low + high) / 2 + (_MIDDLE - _TOP / 2) * scale)
        codes = np.clip(np.rint((values - offset[..., None]) / scale[..., None]), -_MIDDLE, _TOP - _MIDDLE)
        rest = values - codes * scale[..., None]
        offset = half(np.einsum("rbi,bi->rb", rest, importance) / total)
        error = rest - offset[..., None]
        loss = np.einsum("rbi,bi->rb", error * error, importance)
        better = (loss < best) & (np.abs(error).max(-1) <= scale)
        best = np.where(better, loss, best)
        scales, offsets = np.where(better, scale, scales), np.where(better, offset, offsets)
    return scales, offsets


def _settled(exact: Array, steps: Array, moments: Array) -> Array:
    """`exact` codes (columns, rows) rounded up or down, each to what makes up best for the errors of the
    others: one column after the other, those of a block with the products of all others already made.

    `steps` are the scales in the same shape.
    """
    lower, upper = (np.clip(way(exact), 0, _TOP) for way in (np.floor, np.ceil))
    middle, codes = (lower + upper) / 2, np.clip(np.rint(exact), 0, _TOP)
    errors = (codes - exact) * steps
    curvature = np.diagonal(moments)
    for _ in range(_SWEEPS):
        for start in range(0, len(exact), BLOCK):
            block = slice(start, start + BLOCK)
            inner = moments[block, block]
            slopes = moments[block] @ errors
            for i, column in enumerate(range(start, start + BLOCK)):
                wanted = exact[column] + (errors[column] - slopes[i] / curvature[column]) / steps[column]
                code = np.where(wanted > middle[column], upper[column], lower[column])
                change = (code - codes[column]) * steps[column]
                codes[column] = code
                errors[column] += change
                slopes[i + 1 :] += inner[i + 1 :, i, None] * change
    return codes
