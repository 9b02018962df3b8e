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
from ..kernels.groups import Rows, Smoothing
from ..loss import Loss, Spec
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
        r, targets = self.allocate(t, o), _targets(t, o)
        call = targets.call(NAME, t.input, o.first, {"reduction": o.reduction})
        gathered = sharded.exchange(call, lambda first, _, out: targets.write(t.input, first, out), o.group, t.input.device)
        found, ranks = targets.merge(gathered), gathered.slices
        r.numbers.copy_(found.numbers)
        r.local.copy_(slices.in_slice(targets.target, ranks.starts[gathered.rank], call.classes, o.ignore_index))
        r.classes.fill_(ranks.classes)
        found.reduce(o.reduction, r.divisor, r.loss)
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


def _targets(t: Tensors, o: Options) -> slices.IndexTargets:
    weight = None if t.weight is None else rows.dense_class_weight(t.weight, t.input)
    return slices.IndexTargets(rows.as_indices(t.target), o.ignore_index, o.label_smoothing, weight)


vocab_parallel_cross_entropy = VocabParallelCrossEntropy(NAME)
