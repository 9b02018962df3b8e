"""Softmax cross-entropy with class probabilities, of logits and probabilities whose classes are sharded over ranks alike:
`soft_cross_entropy` of all slices side by side.

Ranks send of each row `top`, `total`, Σ k_c (−log p_c) with p of the slice alone, and Σ k_c: see `vocab_parallel_cross_entropy`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rows, sharded, slices
from ..arguments import class_weight_misfit
from ..kernels.groups import Rows, Smoothing
from ..loss import Loss, Spec, compute_dtype
from ..memory import empty_like
from ..torch_launchers import kernels_or_torch

NAME = "vocab_parallel_cross_entropy"  # of the function, which serves both kinds of targets


class Tensors(NamedTuple):
    input: Tensor  # this rank's logits (C,), (N, C) or (N, C, d1, ...)
    target: Tensor  # this rank's class probabilities, shape and dtype of `input`
    weight: Tensor | None  # (C,), of this rank's classes


class Options(NamedTuple):
    first: int  # this rank's first class; -1: after those of the ranks before it
    label_smoothing: float  # eps
    reduction: str
    dtype: torch.dtype  # of the loss
    group: str


class Results(NamedTuple):
    loss: Tensor
    divisor: Tensor
    numbers: Tensor  # [3, N]: mass, top and total of `Rows`, of all classes
    classes: Tensor  # of all ranks, one number


class Saved(NamedTuple):
    input: Tensor
    target: Tensor
    weight: Tensor | None
    divisor: Tensor
    numbers: Tensor
    classes: Tensor


class VocabParallelSoftCrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    differentiable = 2

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if t.target.dtype != t.input.dtype or t.target.shape != t.input.shape:
            return f"target is {t.target.dtype} {tuple(t.target.shape)}, logits are {t.input.dtype} {tuple(t.input.shape)}"
        return slices.slice_misfit(t.input, o.label_smoothing) or class_weight_misfit(t.input, t.weight)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        return (
            rows.loss_spec(t.input, o.reduction, o.dtype),
            rows.divisor_spec(t.input, o.reduction),
            rows.numbers_spec(t.input, 3),
            Spec((), torch.int64),
        )

    def definition(self, t: Tensors, o: Options) -> Tensor:
        """Where one rank has all classes."""
        return rows.soft_loss(t.input, t.target, t.weight, o)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, weight = self.allocate(t, o), rows.dense_class_weight(t.weight, t.input)

        def local(_: int, classes: int, out: Tensor) -> None:
            slices.soft_statistics(t.input, t.target, weight, _smoothing(o, classes), out)

        compute = compute_dtype(t.input)
        options: dict[str, Any] = {
            "target": "shares", "reduction": o.reduction, "label_smoothing": float(o.label_smoothing), "weight": int(t.weight is not None)
        }  # fmt: skip
        call = sharded.Call(
            NAME, rows.rows_in(t.input), 4, t.input.dtype, compute, options, rows.classes_of(t.input), None if o.first < 0 else o.first
        )
        numbers, _, ranks, _ = sharded.exchange(call, local, o.group, t.input.device)
        merged = sharded.merge(numbers[:, 0], numbers[:, 1])
        losses, masses = numbers[:, 2].double(), numbers[:, 3].double()
        r.numbers.copy_(torch.stack((sharded.in_rank_order(masses), merged.top, merged.total)))
        r.classes.fill_(ranks.classes)
        r.divisor.fill_(call.rows)
        slices.reduce(sharded.in_rank_order(losses + slices.risen(masses, merged.rises)), r.divisor, o.reduction, r.loss)
        return tuple(r)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, kernels = rows.as_rows(s.input), rows.as_rows(s.target), kernels_or_torch(s.input)
        g, weight = rows.row_gradient(dloss, s.divisor, s.input), rows.dense_class_weight(s.weight, s.input)
        smoothing, numbers = _smoothing(o, int(s.classes)), Rows(None, *rows.each_number(s.numbers))
        dinput = dtarget = None
        if needed[1]:  # before the logits may be overwritten
            dtarget = slices.settled(
                empty_like(s.target),
                lambda place: kernels.soft_cross_entropy_target_backward(logits, weight, smoothing.keep, numbers, g, place),
            )
        if needed[0]:
            dinput = slices.settled(
                empty_like(s.input) if result is None else result,
                lambda place: kernels.soft_cross_entropy_backward(logits, target, weight, smoothing, numbers, g, place),
            )
        return dinput, dtarget

    def gradient(self, dloss: Any, s: Saved, o: Options, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        raise slices.refused_twice(NAME)


def _smoothing(o: Options, classes: int) -> Smoothing:
    return Smoothing(1 - o.label_smoothing, o.label_smoothing / classes)


vocab_parallel_soft_cross_entropy = VocabParallelSoftCrossEntropy("vocab_parallel_soft_cross_entropy")
