"""Softmax cross-entropy with class indices, of logits whose classes are sharded over ranks: `cross_entropy` of all slices side by side.

Ranks send of each row the `top` and `total` of their slice and the target's logit (0 from those that do not have it); where something is
smoothed Σ w_c (−log p_c), p of the slice alone; with class weights the target's. −log p of all classes is that of the slice plus how much
log Σ exp(x) rises from the slice to all: nothing large is subtracted.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rows, sharded, slices
from ..arguments import class_indices_misfit
from ..kernels.groups import PAD, Rows, Smoothing
from ..loss import Loss, Spec, compute_dtype
from ..memory import empty_like
from ..torch_launchers import kernels_or_torch

NAME = "vocab_parallel_cross_entropy"


class Tensors(NamedTuple):
    input: Tensor  # this rank's logits (C,), (N, C) or (N, C, d1, ...)
    target: Tensor  # class indices of all classes, the shape of `input` without its classes, int64 or uint8
    weight: Tensor | None  # (C,), of this rank's classes


class Options(NamedTuple):
    first: int  # this rank's first class; -1: after those of the ranks before it
    ignore_index: int
    label_smoothing: float  # eps
    reduction: str
    dtype: torch.dtype  # of the loss
    group: str


class Results(NamedTuple):
    loss: Tensor
    divisor: Tensor
    numbers: Tensor  # [4, N]: the fields of `Rows`, of all classes; row_weight is 1 for rows that count, else 0
    local: Tensor  # [N]: the target as the slice counts classes, PAD where it is another rank's or ignored
    classes: Tensor  # of all ranks, one number


class Saved(NamedTuple):
    input: Tensor
    target: Tensor
    weight: Tensor | None
    divisor: Tensor
    numbers: Tensor
    local: Tensor
    classes: Tensor


class VocabParallelCrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved

    def misfit(self, t: Tensors, o: Options) -> str | None:
        return slices.slice_misfit(t.input, o.label_smoothing) or class_indices_misfit(t.input, t.target, t.weight, o.ignore_index)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        return (
            rows.loss_spec(t.input, o.reduction, o.dtype),
            rows.divisor_spec(t.input, o.reduction),
            rows.numbers_spec(t.input, 4),
            Spec((rows.rows_in(t.input),), torch.int64),
            Spec((), torch.int64),
        )

    def definition(self, t: Tensors, o: Options) -> Tensor:
        """Where one rank has all classes."""
        return rows.index_loss(t.input, t.target, t.weight, o)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, target = self.allocate(t, o), rows.as_indices(t.target)
        smoothed, weighted = o.label_smoothing > 0, t.weight is not None
        classes, weight = rows.classes_of(t.input), rows.dense_class_weight(t.weight, t.input)

        def local(first: int, _: int, out: Tensor) -> None:
            y = slices.in_slice(target, first, classes, o.ignore_index)
            if smoothed:
                q = t.input.new_zeros(()).expand(t.input.shape)
                numbers = torch.empty_like(out[:1]).expand(4, -1).contiguous()
                slices.soft_statistics(t.input, q, weight, Smoothing(0.0, 1.0), numbers)
                out[:2].copy_(numbers[:2])
                out[3].copy_(numbers[2])
            else:
                slices.statistics(t.input, target, o.ignore_index, out[:2])
            out[2].copy_(slices.pick(t.input, y[:, None]).squeeze(1))
            if weighted:
                out[-1].copy_(torch.where(y == PAD, 0.0, weight[y.clamp(min=0)]) if classes else torch.zeros_like(out[-1]))

        compute = compute_dtype(t.input)
        numbers, weights, ranks, rank = sharded.exchange(
            sharded.Call(
                NAME, target.numel(), 3 + smoothed + weighted, t.input.dtype, compute,
                {"target": "indices", "reduction": o.reduction, "ignore_index": o.ignore_index,
                 "label_smoothing": float(o.label_smoothing), "weight": int(weighted)},
                classes, None if o.first < 0 else o.first, sharded.digest(target), weight.sum(dtype=torch.float64),
            ),
            local, o.group, t.input.device,
        )  # fmt: skip
        bad = slices.refuse_out_of_bounds(target, ranks.classes, o.ignore_index)
        keep, spread = 1 - o.label_smoothing, o.label_smoothing / ranks.classes
        counts, merged = target != o.ignore_index, sharded.merge(numbers[:, 0], numbers[:, 1])
        row_weight = sharded.in_rank_order(numbers[:, -1]).double() if weighted else torch.ones_like(merged.top)
        losses = keep * row_weight * (merged.total.log() - (sharded.in_rank_order(numbers[:, 2]).double() - merged.top))
        mass = keep * row_weight
        if smoothed:
            losses = losses + spread * sharded.in_rank_order(numbers[:, 3].double() + slices.risen(weights[:, None], merged.rises))
            mass = mass + spread * sharded.in_rank_order(weights)
        # nothing of a row that does not count, and NaN for everything of one whose target is no class
        values = torch.stack((counts.double(), mass, merged.top, merged.total)).masked_fill(bad, torch.nan)
        r.numbers.copy_(torch.where(counts, values, values.new_tensor((0.0, 0.0, 0.0, 1.0))[:, None]))
        r.local.copy_(slices.in_slice(target, ranks.starts[rank], classes, o.ignore_index))
        r.classes.fill_(ranks.classes)
        if r.divisor.numel():
            slices.sum_rows(row_weight.masked_fill(~counts, 0.0).to(compute), r.divisor)
        slices.reduce(losses.masked_fill(bad, torch.nan).masked_fill(~counts, 0.0), r.divisor, o.reduction, r.loss)
        return tuple(r)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        dinput, logits = empty_like(s.input) if result is None else result, rows.as_rows(s.input)
        g, weight = rows.row_gradient(dloss, s.divisor, s.input), rows.dense_class_weight(s.weight, s.input)
        smoothing = Smoothing(1 - o.label_smoothing, o.label_smoothing / int(s.classes) if o.label_smoothing > 0 else 0.0)
        prob = rows.ones(g.numel(), g.dtype, g.device)[:, None]
        numbers, local = Rows(*rows.each_number(s.numbers)), s.local.contiguous()[:, None]

        def write(dlogits: Tensor) -> None:
            kernels_or_torch(s.input).sparse_soft_cross_entropy_backward(logits, local, prob, weight, smoothing, numbers, g, dlogits)

        return (slices.settled(dinput, write),)

    def gradient(self, dloss: Any, s: Saved, o: Options, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        raise slices.refused_twice(self.name)


vocab_parallel_cross_entropy = VocabParallelCrossEntropy(NAME)
