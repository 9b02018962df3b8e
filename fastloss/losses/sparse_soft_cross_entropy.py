"""Softmax cross-entropy with a few classes y_k of probability q_k as a row's target. Of each row

    loss = -(1 - eps) sum_k w_{y_k} q_k log p_{y_k} - eps / C sum_c w_c log p_c,    p = softmax(input)

and 'mean' divides by the number of rows. Entries whose class is -100 count for nothing; a class may have several entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import rows
from ..arguments import class_weight_misfit, smoothing_misfit
from ..backends import kernels_for
from ..kernels.groups import PAD, Rows, Smoothing
from ..loss import COMPUTE, Loss, Spec
from ..memory import empty, empty_like


class Tensors(NamedTuple):
    input: Tensor  # logits (C,), (N, C) or (N, C, d1, ...)
    probabilities: Tensor  # broadcastable to `indices`
    indices: Tensor  # classes (K,), (N, K) or (N, K, d1, ...), int64
    weight: Tensor | None  # (C,)


class Options(NamedTuple):
    label_smoothing: float  # eps
    reduction: str
    dtype: torch.dtype  # of the loss


class Results(NamedTuple):
    loss: Tensor
    divisor: Tensor
    numbers: Tensor  # [4, N]: `Rows`; row_weight is 0 for a row of nothing but padding, unless something is smoothed, else 1


class Saved(NamedTuple):
    input: Tensor
    probabilities: Tensor
    indices: Tensor
    weight: Tensor | None
    divisor: Tensor
    numbers: Tensor


class SparseSoftCrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    differentiable = 2
    one_visit = 1

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if t.indices.dtype != torch.int64 or t.probabilities.dtype not in COMPUTE:
            return f"indices are {t.indices.dtype}, probabilities {t.probabilities.dtype}"
        if t.input.dim() == 0 or not belong(t.indices, t.input):
            return f"indices of shape {tuple(t.indices.shape)} do not belong to logits of shape {tuple(t.input.shape)}"
        if not can_broadcast(t.probabilities, t.indices):
            return f"probabilities of shape {tuple(t.probabilities.shape)} cannot be broadcast to {tuple(t.indices.shape)}"
        return smoothing_misfit(t.input, o.label_smoothing) or class_weight_misfit(t.input, t.weight)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        numbers = rows.numbers_spec(t.input, 4)
        return rows.loss_spec(t.input, o.reduction, o.dtype), rows.divisor_spec(t.input, o.reduction), numbers

    def definition(self, t: Tensors, o: Options) -> Tensor:
        log_prob, indices = torch.log_softmax(rows.one_row_each(t.input), 1), rows.by_row(t.indices)
        prob = rows.by_row(t.probabilities.to(log_prob.dtype).expand(t.indices.shape))
        weight = log_prob.new_ones(log_prob.shape[1]) if t.weight is None else t.weight.to(log_prob.dtype)
        padding = indices == PAD
        y = indices.masked_fill(padding, 0)
        # without classes there is nothing to pick from, and nothing but padding
        picked = weight[y] * log_prob.gather(1, y) if log_prob.shape[1] else torch.zeros_like(prob)
        loss = -(1 - o.label_smoothing) * (prob * picked).masked_fill(padding, 0.0).sum(1)
        if o.label_smoothing > 0:
            loss = loss - o.label_smoothing / max(1, log_prob.shape[1]) * (log_prob * weight).sum(1)
        return rows.reduced_rows(loss, None, o.reduction, t.input)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, logits, weight = self.allocate(t, o), rows.as_rows(t.input), _weight(t, o)
        indices, prob = rows.as_entries(t.indices, t.probabilities, t.input)
        loss = rows.row_losses(r.loss, t.input, o.reduction)
        r.divisor.fill_(loss.numel())
        kernels_for(t.input).sparse_soft_cross_entropy_forward(
            logits, indices, prob, weight, _smoothing(t, o), loss, Rows(*rows.each_number(r.numbers))
        )
        rows.reduce_rows(loss, r.divisor, o.reduction, r.loss)
        return tuple(r)

    def forward_backward(
        self, dloss: float, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        r, logits, weight, dinput = self.allocate(t, o), rows.as_rows(t.input), _weight(t, o), empty_like(t.input)
        loss, (indices, prob), dlogits = (
            rows.row_losses(r.loss, t.input, o.reduction),
            rows.as_entries(t.indices, t.probabilities, t.input),
            rows.as_rows(dinput),
        )
        r.divisor.fill_(loss.numel())
        g = rows.row_gradient_of(dloss, r.divisor, t.input)
        kernels_for(t.input).sparse_soft_cross_entropy_forward_backward(
            logits, indices, prob, weight, _smoothing(t, o), g, loss, Rows(*rows.each_number(r.numbers)), dlogits
        )
        rows.reduce_rows(loss, r.divisor, o.reduction, r.loss)
        return (rows.settle(dinput, dlogits),), tuple(r)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, weight, kernels = rows.as_rows(s.input), _weight(s, o), kernels_for(s.input)
        (indices, prob), g = rows.as_entries(s.indices, s.probabilities, s.input), rows.row_gradient(dloss, s.divisor, s.input)
        smoothing, numbers = _smoothing(s, o), Rows(*rows.each_number(s.numbers))
        dinput = dprobabilities = None
        if needed[1]:  # before the logits may be overwritten
            dprob = empty(tuple(indices.shape), prob.dtype, prob.device)
            kernels.sparse_soft_cross_entropy_prob_backward(logits, indices, weight, smoothing.keep, numbers, g, dprob)
            dprobabilities = _summed(dprob, s)
        if needed[0]:
            dinput = empty_like(s.input) if result is None else result
            written = rows.as_rows(dinput)
            kernels.sparse_soft_cross_entropy_backward(logits, indices, prob, weight, smoothing, numbers, g, written)
            rows.settle(dinput, written)
        return dinput, dprobabilities


def belong(indices: Tensor, logits: Tensor) -> bool:
    """Whether they differ in nothing but the number of classes."""
    a, b = indices.shape, logits.shape
    return len(a) == len(b) and (len(a) == 1 or (a[0] == b[0] and a[2:] == b[2:]))


def can_broadcast(prob: Tensor, indices: Tensor) -> bool:
    missing = indices.dim() - prob.dim()
    return missing >= 0 and all(p in (1, n) for p, n in zip(prob.shape, indices.shape[missing:], strict=True))


def _summed(dprob: Tensor, s: Saved) -> Tensor:
    """[rows, K] as the gradient of `probabilities`: summed over what these were broadcast to."""
    shape, indices = s.probabilities.shape, s.indices
    result = empty_like(s.probabilities)
    full = dprob.view(indices.movedim(1, -1).shape).movedim(-1, 1) if indices.dim() > 1 else dprob.view(indices.shape)
    if shape == indices.shape:
        return result.copy_(full)
    if s.probabilities.numel() == 1:  # torch's sum of everything depends on the number of threads
        total = dprob.new_empty(())
        kernels_for(dprob).sum_rows(dprob.view(-1), total)
        return result.copy_(total.expand(shape))
    return result.copy_(full.double().sum_to_size(shape))


def _weight(t: Tensors | Saved, o: Options) -> Tensor:
    return (rows.dense_class_weight if o.label_smoothing > 0 else rows.class_weight)(t.weight, t.input)


def _smoothing(t: Tensors | Saved, o: Options) -> Smoothing:
    return Smoothing(1 - o.label_smoothing, o.label_smoothing / rows.classes_of(t.input))


sparse_soft_cross_entropy = SparseSoftCrossEntropy("sparse_soft_cross_entropy")
