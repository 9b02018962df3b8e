"""Softmax cross-entropy with class indices as targets.

    nll = log total - (x_y - top)      loss = w_y nll      dlogits = dloss w_y (p - onehot(y)),  p = exp(x - top) / total

One visit to the logits going forward, one coming back; all else happens on [N] vectors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..groups import Rows
from .launch import device_of, launch
from .math import _exp, _wide
from .plan import backward_rows, class_stride, forward_rows, has_long_rows, power_of_two_from, reading_tiles, tiles, view
from .rows import _blocks_of, _body_of, _edges_of, _lanes_at, _merge, _no_statistics, _row_of, _row_statistics, _see, _tile_of, _weight_of


def cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, rows: Rows) -> None:
    row_weight, _, top, total = rows
    v = view(logits.shape, logits.stride())
    numbers = (target, ignore_index, weight, class_stride(weight.stride(0)), loss, row_weight, top, total)
    if not has_long_rows(v):
        t = reading_tiles(v, device_of(logits))
        launch(
            _cross_entropy_forward_tiles, t.programs, t.num_warps, logits,
            logits, v.strides[0], *numbers, v.classes, v.positions, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
        )  # fmt: skip
        return
    r = forward_rows(v, logits.element_size(), device_of(logits))
    if r.splits == 1:
        launch(
            _cross_entropy_forward_rows, r.programs, r.num_warps, logits,
            logits, v.strides[0], *numbers, v.classes, v.positions, VEC=r.VEC, BLOCK_C=r.BLOCK_C,
        )  # fmt: skip
        return
    parts = torch.empty(2, r.programs, dtype=top.dtype, device=top.device)
    launch(
        _statistics_of_parts, r.programs, r.num_warps, logits,
        logits, v.strides[0], target, ignore_index, parts[0], parts[1], v.classes, v.positions, r.splits, r.chunk,
        VEC=r.VEC, BLOCK_C=r.BLOCK_C,
    )  # fmt: skip
    launch(
        _cross_entropy_forward_parts, r.rows, 1, logits,
        logits, v.strides[0], parts[0], parts[1], *numbers, v.classes, v.positions, r.splits, SPLITS=power_of_two_from(r.splits),
    )  # fmt: skip


def cross_entropy_backward(logits: Tensor, target: Tensor, ignore_index: int, rows: Rows, dloss: Tensor, dlogits: Tensor) -> None:
    row_weight, _, top, total = rows
    v = view(logits.shape, logits.stride(), dlogits.stride())
    numbers = (target, ignore_index, row_weight, top, total, dloss, dloss.stride(0))
    if has_long_rows(v):
        r = backward_rows(v, logits.element_size(), device_of(logits))
        launch(
            _cross_entropy_backward_rows, r.programs, r.num_warps, logits,
            logits, v.strides[0], *numbers, dlogits, v.strides[1], v.classes, v.positions, r.splits, r.chunk, VEC=r.VEC, BLOCK_C=r.BLOCK_C,
        )  # fmt: skip
    else:
        t = tiles(v, device_of(logits))
        launch(
            _cross_entropy_backward_tiles, t.elementwise_programs, t.num_warps, logits,
            logits, v.strides[0], *numbers, dlogits, v.strides[1], v.classes, v.positions, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
        )  # fmt: skip


@triton.jit
def _write_loss(
    x_ptr, class_stride, row, inside, y, ignore_index, weight_ptr, weight_stride, top, total,
    loss_ptr, row_weight_ptr, top_ptr, total_ptr, C,
):  # fmt: skip
    """The numbers of rows whose first classes x_ptr points to."""
    is_row = y != ignore_index
    is_class = inside & is_row & (y >= 0) & (y < C)
    # target logit and class weight
    x_y = _wide(tl.load(x_ptr + y * class_stride, mask=is_class, other=0.0))
    w_y = _weight_of(weight_ptr, weight_stride, y, is_class)
    # loss
    nll = tl.log(total) - (x_y - top)
    tl.store(loss_ptr + row, tl.where(is_row, w_y * nll, 0.0), mask=inside)
    tl.store(row_weight_ptr + row, tl.where(is_row, w_y, 0.0), mask=inside)
    tl.store(top_ptr + row, tl.where(is_row, top, 0.0), mask=inside)
    tl.store(total_ptr + row, tl.where(is_row, total, 1.0), mask=inside)


@triton.jit
def _cross_entropy_forward_rows(
    logits_ptr, strides, target_ptr, ignore_index, weight_ptr, weight_stride, loss_ptr, row_weight_ptr, top_ptr, total_ptr, C, P,
    VEC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits [B, C, P] with class stride 1; target, loss, row_weight, top, total [B * P]; weight [C]. One program: one row."""
    row = tl.program_id(0)
    y = tl.load(target_ptr + row)
    start = _row_of(row, P, strides)
    # statistics
    top, total = _row_statistics(logits_ptr, start, tl.where(y == ignore_index, 0, C), VEC, BLOCK_C)
    _write_loss(
        logits_ptr + start, 1, row, row >= 0, y, ignore_index, weight_ptr, weight_stride, top, total,
        loss_ptr, row_weight_ptr, top_ptr, total_ptr, C,
    )  # fmt: skip


@triton.jit
def _statistics_of_parts(
    logits_ptr, strides, target_ptr, ignore_index, tops_ptr, totals_ptr, C, P, splits, chunk, VEC: tl.constexpr, BLOCK_C: tl.constexpr
):
    """logits [B, C, P] with class stride 1; target [B * P]; tops, totals [B * P, splits]. One program: `chunk` classes of a row."""
    number = tl.program_id(0)
    row, first = number // splits, number % splits * chunk
    count = tl.where(tl.load(target_ptr + row) == ignore_index, 0, tl.minimum(chunk, C - first))
    top, total = _row_statistics(logits_ptr, _row_of(row, P, strides) + first, count, VEC, BLOCK_C)
    tl.store(tops_ptr + number, top)
    tl.store(totals_ptr + number, total)


@triton.jit
def _cross_entropy_forward_parts(
    logits_ptr, strides, tops_ptr, totals_ptr, target_ptr, ignore_index, weight_ptr, weight_stride,
    loss_ptr, row_weight_ptr, top_ptr, total_ptr, C, P, splits, SPLITS: tl.constexpr,
):  # fmt: skip
    """tops, totals [B * P, splits] from `_statistics_of_parts`; the others as there. One program: one row, merging its parts."""
    row = tl.program_id(0)
    y = tl.load(target_ptr + row)
    part = tl.arange(0, SPLITS)
    # statistics
    tops = tl.load(tops_ptr + row * splits + part, mask=part < splits, other=float("-inf"))
    top, total = _merge(tops, tl.load(totals_ptr + row * splits + part, mask=part < splits, other=0.0), 0)
    _write_loss(
        logits_ptr + _row_of(row, P, strides), 1, row, row >= 0, y, ignore_index, weight_ptr, weight_stride, top, total,
        loss_ptr, row_weight_ptr, top_ptr, total_ptr, C,
    )  # fmt: skip


@triton.jit
def _cross_entropy_forward_tiles(
    logits_ptr, strides, target_ptr, ignore_index, weight_ptr, weight_stride, loss_ptr, row_weight_ptr, top_ptr, total_ptr, C, P,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits [B, C, P]; target, loss, row_weight, top, total [B * P]; weight [C]. One program: all classes of BLOCK_N positions."""
    b, p, row, inside = _tile_of(tl.program_id(0), P, BLOCK_N)
    y = tl.load(target_ptr + row, mask=inside, other=0)
    # statistics
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], top_ptr.dtype.element_ty)
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        x = tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=inside[:, None] & (c < C)[None, :], other=float("-inf"))
        tops, totals = _see(tops, totals, _wide(x))
    top, total = _merge(tops, totals, 1)
    _write_loss(
        logits_ptr + b * strides.batch + p * strides.position, strides.class_, row, inside, y, ignore_index, weight_ptr, weight_stride,
        top, total, loss_ptr, row_weight_ptr, top_ptr, total_ptr, C,
    )  # fmt: skip


@triton.jit
def _cross_entropy_backward_rows(
    logits_ptr, strides, target_ptr, ignore_index, row_weight_ptr, top_ptr, total_ptr, dloss_ptr, dloss_stride, dlogits_ptr, dstrides,
    C, P, splits, chunk, VEC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits, dlogits [B, C, P] with class stride 1 and rows that start alike modulo VEC; the others [B * P].
    One program: `chunk` classes of a row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    number = tl.program_id(0)
    row, part = number // splits, number % splits * chunk
    count = tl.minimum(chunk, C - part)
    start, to = _row_of(row, P, strides) + part, _row_of(row, P, dstrides) + part
    head, vectors, first = _body_of(start, count, VEC)
    x_ptr, dx_ptr = logits_ptr + first, dlogits_ptr + (to + (VEC - 1)) // VEC * VEC
    # row numbers: an ignored row is not read, its logits count as 0, and its scale is 0
    y = tl.load(target_ptr + row)
    is_row = y != ignore_index
    y = tl.where((y >= part) & (y < part + count), y - part, -1).to(tl.int32)
    g = tl.where(is_row, tl.load(dloss_ptr + row * dloss_stride) * tl.load(row_weight_ptr + row), 0.0)
    top = tl.where(is_row, tl.load(top_ptr + row), 0.0)
    scale = tl.where(is_row, g / tl.load(total_ptr + row), 0.0)
    # gradient
    lane = tl.arange(0, LANES)
    offset = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = tl.load(x_ptr + (v * VEC + offset), mask=inside & is_row, other=0.0)
        d = _exp(_wide(x) - top) * scale
        # only the block that holds y compares: elsewhere that would be a third of the work
        y_here = y - head - v * VEC
        if (y_here >= 0) & (y_here < BLOCK_C):
            d = tl.where(offset == y_here, d - g, d)
        tl.store(dx_ptr + (v * VEC + offset), d, mask=inside)
    # edges
    c, at_edge = _edges_of(head, vectors, count, VEC)
    edges = tl.load(logits_ptr + start + c, mask=at_edge & is_row, other=0.0)
    dedges = _exp(_wide(edges) - top) * scale
    tl.store(dlogits_ptr + to + c, tl.where(c == y, dedges - g, dedges), mask=at_edge)


@triton.jit
def _cross_entropy_backward_tiles(
    logits_ptr, strides, target_ptr, ignore_index, row_weight_ptr, top_ptr, total_ptr, dloss_ptr, dloss_stride, dlogits_ptr, dstrides,
    C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits, dlogits [B, C, P]; the others [B * P]. One program: BLOCK_C classes of BLOCK_N positions."""
    blocks = _blocks_of(C, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, P, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    y = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    is_row = y != ignore_index
    g = tl.load(dloss_ptr + row * dloss_stride, mask=is_row, other=0.0) * tl.load(row_weight_ptr + row, mask=is_row, other=0.0)
    top = tl.load(top_ptr + row, mask=is_row, other=0.0)
    scale = g / tl.load(total_ptr + row, mask=is_row, other=1.0)
    # gradient
    lanes = inside[:, None] & (c < C)[None, :]
    x = _wide(tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=lanes, other=0.0))
    d = _exp(x - top[:, None]) * scale[:, None]
    d = tl.where(c[None, :] == y[:, None], d - g[:, None], d)
    tl.store(_lanes_at(dlogits_ptr, dstrides, b, p, c), tl.where(is_row[:, None], d, 0.0), mask=lanes)
