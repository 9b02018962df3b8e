"""From tensors to tensors: allocate, launch, reduce. Both the eager path (`autograd`) and the registered ops (`ops`) call these.

Each loss has a forward, which returns the loss and what the backward wants to see again, and a backward. `reduction` is 'none',
'mean' or 'sum'. Per-row numbers are float32, float64 for float64 logits. Inputs are never written to, unless `result` is one of them.
"""

from functools import cache

import torch
from torch import Tensor

from . import memory
from .backends import kernels_for

COMPUTE = {torch.float32: torch.float32, torch.float64: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


def rows_in(logits: Tensor) -> int:
    """N of [N, C], B * P of [B, C, P]."""
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]


def compute_dtype(logits: Tensor) -> torch.dtype:
    return COMPUTE[logits.dtype]


def _class_weight(weight: Tensor | None, logits: Tensor) -> Tensor:
    """[C] in the compute dtype; no weight is a one with stride 0."""
    if weight is None:
        return _one(compute_dtype(logits), logits.device).expand(logits.shape[1])
    return weight.detach().to(compute_dtype(logits))


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A one, made once: nothing ever writes to it."""
    return torch.ones(1, dtype=dtype, device=device)


def _dense_class_weight(weight: Tensor | None, logits: Tensor) -> Tensor:
    """The same for kernels that read it along with the logits: side by side in memory, also where all are one."""
    return _class_weight(weight, logits).contiguous()


def _vectors(count: int, logits: Tensor) -> tuple[Tensor, ...]:
    """`count` uninitialised [N] vectors in the compute dtype."""
    # one storage each: outputs of a registered op must not share memory
    return tuple(memory.empty((rows_in(logits),), compute_dtype(logits), logits.device) for _ in range(count))


def _divisor(row_weight: Tensor, reduction: str) -> Tensor:
    """What 'mean' divides by, [1]: the sum of the rows' weights; without elements for 'none' and 'sum'."""
    if reduction != "mean":
        return row_weight.new_empty(0)
    divisor = row_weight.new_empty(1)
    kernels_for(row_weight).sum_rows(row_weight, divisor)
    return divisor


def _number_of_rows(loss: Tensor, reduction: str) -> Tensor:
    """The same where every row counts alike."""
    return loss.new_full((1 if reduction == "mean" else 0,), loss.numel())


def _reduced(loss: Tensor, divisor: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.new_empty(1)
    kernels_for(loss).sum_rows(loss, total)
    return (total / divisor if divisor.numel() else total).view(())


def _row_gradient(dloss: Tensor, divisor: Tensor, logits: Tensor) -> Tensor:
    """The gradient of every row's loss, [N], from that of the reduced loss."""
    dloss = dloss.to(compute_dtype(logits))
    if divisor.numel():
        dloss = dloss / divisor
    if dloss.dim() == 1 and dloss.numel() == rows_in(logits) != 1:
        return dloss if dloss.stride(0) in (0, 1) else dloss.contiguous()
    return dloss.reshape(1).expand(rows_in(logits))


def cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss in `dtype`; then divisor, row_weight, mass (without elements if nothing is smoothed), top, total."""
    kernels = kernels_for(logits)
    loss, row_weight, top, total = _vectors(4, logits)
    mass = memory.empty_like(loss) if label_smoothing > 0 else loss.new_empty(0)
    if label_smoothing > 0:
        keep, spread = 1 - label_smoothing, label_smoothing / max(1, logits.shape[1])
        dense_weight = _dense_class_weight(weight, logits)
        kernels.smoothed_cross_entropy_forward(logits, target, dense_weight, ignore_index, keep, spread, loss, row_weight, mass, top, total)
    else:
        kernels.cross_entropy_forward(logits, target, _class_weight(weight, logits), ignore_index, loss, row_weight, top, total)
    divisor = _divisor(row_weight, reduction)
    return _reduced_smoothed(loss, mass, divisor, reduction).to(dtype), divisor, row_weight, mass, top, total


def cross_entropy_forward_backward(
    dloss: float, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dlogits for this gradient of the reduced loss; then what `cross_entropy_forward` returns. One visit to the logits."""
    kernels = kernels_for(logits)
    loss, row_weight, top, total = _vectors(4, logits)
    mass = memory.empty_like(loss) if label_smoothing > 0 else loss.new_empty(0)
    class_weight = _class_weight(weight, logits)
    divisor = loss.new_empty(1 if reduction == "mean" else 0)
    if reduction == "mean":
        kernels.sum_weights(target, class_weight, ignore_index, divisor)
    row_gradient, dlogits = _row_gradient(logits.new_full((), dloss, dtype=dtype), divisor, logits), memory.empty_like(logits)
    if label_smoothing > 0:
        keep, spread = 1 - label_smoothing, label_smoothing / max(1, logits.shape[1])
        dense_weight = class_weight.contiguous()
        kernels.smoothed_cross_entropy_forward_backward(
            logits, target, dense_weight, ignore_index, keep, spread, row_gradient, loss, row_weight, mass, top, total, dlogits
        )
    else:
        kernels.cross_entropy_forward_backward(
            logits, target, class_weight, ignore_index, row_gradient, loss, row_weight, top, total, dlogits
        )
    return dlogits, _reduced_smoothed(loss, mass, divisor, reduction).to(dtype), divisor, row_weight, mass, top, total


def _reduced_smoothed(loss: Tensor, mass: Tensor, divisor: Tensor, reduction: str) -> Tensor:
    reduced = _reduced(loss, divisor, reduction)
    # no weight at all: NaN, although the smoothed part of the sum is not 0
    return reduced + 0 / divisor.view(()) if mass.numel() and divisor.numel() else reduced


def cross_entropy_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    divisor: Tensor, row_weight: Tensor, mass: Tensor, top: Tensor, total: Tensor, result: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dlogits, in `result` if there is one (the logits themselves, for instance)."""
    dlogits = memory.empty_like(logits) if result is None else result
    kernels, row_gradient = kernels_for(logits), _row_gradient(dloss, divisor, logits)
    if mass.numel():
        keep, spread = 1 - label_smoothing, label_smoothing / max(1, logits.shape[1])
        class_weight = _dense_class_weight(weight, logits)
        kernels.smoothed_cross_entropy_backward(
            logits, target, class_weight, ignore_index, keep, spread, row_weight, mass, top, total, row_gradient, dlogits
        )
    else:
        kernels.cross_entropy_backward(logits, target, ignore_index, row_weight, top, total, row_gradient, dlogits)
    return dlogits


def soft_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss in `dtype`; then divisor, mass, top, total."""
    loss, mass, top, total = _vectors(4, logits)
    keep, spread = 1 - label_smoothing, label_smoothing / max(1, logits.shape[1])
    kernels_for(logits).soft_cross_entropy_forward(
        logits, target, _dense_class_weight(weight, logits), keep, spread, loss, mass, top, total
    )
    divisor = _number_of_rows(loss, reduction)
    return _reduced(loss, divisor, reduction).to(dtype), divisor, mass, top, total


def soft_cross_entropy_forward_backward(
    dloss: float, logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dlogits for this gradient of the reduced loss; then what `soft_cross_entropy_forward` returns. One visit to the logits."""
    loss, mass, top, total = _vectors(4, logits)
    keep, spread = 1 - label_smoothing, label_smoothing / max(1, logits.shape[1])
    divisor = _number_of_rows(loss, reduction)
    row_gradient, dlogits = _row_gradient(logits.new_full((), dloss, dtype=dtype), divisor, logits), memory.empty_like(logits)
    kernels_for(logits).soft_cross_entropy_forward_backward(
        logits, target, _dense_class_weight(weight, logits), keep, spread, row_gradient, loss, mass, top, total, dlogits
    )
    return dlogits, _reduced(loss, divisor, reduction).to(dtype), divisor, mass, top, total


def soft_cross_entropy_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float,
    divisor: Tensor, mass: Tensor, top: Tensor, total: Tensor, result: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dlogits, in `result` if there is one."""
    dlogits = memory.empty_like(logits) if result is None else result
    keep, spread = 1 - label_smoothing, label_smoothing / max(1, logits.shape[1])
    kernels_for(logits).soft_cross_entropy_backward(
        logits, target, _dense_class_weight(weight, logits), keep, spread, mass, top, total, _row_gradient(dloss, divisor, logits), dlogits
    )
    return dlogits


def soft_cross_entropy_target_backward(
    dloss: Tensor, logits: Tensor, weight: Tensor | None, label_smoothing: float, divisor: Tensor, top: Tensor, total: Tensor
) -> Tensor:
    """The gradient of the class probabilities."""
    dtarget = memory.empty_like(logits)
    kernels_for(logits).soft_cross_entropy_target_backward(
        logits, _dense_class_weight(weight, logits), 1 - label_smoothing, top, total, _row_gradient(dloss, divisor, logits), dtarget
    )
    return dtarget


def softmax_forward(logits: Tensor) -> Tensor:
    prob = memory.empty(logits.shape, logits.dtype, logits.device)
    kernels_for(logits).softmax_forward(logits, prob)
    return prob


def softmax_backward(dprob: Tensor, prob: Tensor) -> Tensor:
    dlogits = memory.empty_like(prob)
    kernels_for(prob).softmax_backward(prob, dprob, dlogits)
    return dlogits


def log_softmax_forward(logits: Tensor) -> Tensor:
    log_prob = memory.empty(logits.shape, logits.dtype, logits.device)
    kernels_for(logits).log_softmax_forward(logits, log_prob)
    return log_prob


def log_softmax_backward(dlog_prob: Tensor, log_prob: Tensor) -> Tensor:
    dlogits = memory.empty_like(log_prob)
    kernels_for(log_prob).log_softmax_backward(log_prob, dlog_prob, dlogits)
    return dlogits


def nll_loss_forward(
    log_prob: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss in `dtype`; then divisor and row_weight."""
    loss, row_weight = _vectors(2, log_prob)
    kernels_for(log_prob).nll_loss_forward(log_prob, target, _class_weight(weight, log_prob), ignore_index, loss, row_weight)
    divisor = _divisor(row_weight, reduction)
    return _reduced(loss, divisor, reduction).to(dtype), divisor, row_weight


def nll_loss_backward(dloss: Tensor, log_prob: Tensor, target: Tensor, ignore_index: int, divisor: Tensor, row_weight: Tensor) -> Tensor:
    """dlog_prob. Of log_prob only shape, dtype and strides matter."""
    dlog_prob = memory.empty_like(log_prob)
    row_gradient = _row_gradient(dloss, divisor, log_prob)
    kernels_for(log_prob).nll_loss_backward(target, ignore_index, row_weight, row_gradient, dlog_prob)
    return dlog_prob


def _element_weight(weight: Tensor | None, logits: Tensor) -> Tensor:
    """[A, B, P] in the compute dtype; no weight is a one with strides 0."""
    if weight is None:
        return _one(compute_dtype(logits), logits.device).expand(logits.shape)
    # cast without what is broadcast, which would otherwise be written out
    once = weight.detach()[tuple(slice(1) if stride == 0 else slice(None) for stride in weight.stride())]
    return once.to(compute_dtype(logits)).expand(logits.shape)


def _element_gradient(dloss: Tensor, reduction: str, logits: Tensor) -> Tensor:
    """The gradient of every element's loss, [A, B, P]."""
    dloss = dloss.to(compute_dtype(logits))
    return (dloss / logits.numel() if reduction == "mean" else dloss).expand(logits.shape)


def bce_with_logits_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> Tensor:
    """The loss in `dtype`; every tensor is [A, B, P]."""
    kernels, weights = kernels_for(logits), (_element_weight(weight, logits), _element_weight(pos_weight, logits))
    if reduction == "none":
        loss = torch.empty_like(target, dtype=compute_dtype(logits))  # torch's result has the target's strides, too
        kernels.bce_with_logits_forward(logits, target, *weights, loss)
        return loss.to(dtype)
    total = logits.new_empty(1, dtype=compute_dtype(logits))
    kernels.bce_with_logits_sum(logits, target, *weights, total)
    return (total / logits.numel() if reduction == "mean" else total).view(()).to(dtype)


def bce_with_logits_forward_backward(
    dloss: float, logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dlogits for this gradient of the reduced loss; then what `bce_with_logits_forward` returns. One visit to the logits."""
    weights = _element_weight(weight, logits), _element_weight(pos_weight, logits)
    total, dlogits = logits.new_empty(1, dtype=compute_dtype(logits)), memory.empty_like(logits)
    element_gradient = _element_gradient(logits.new_full((), dloss, dtype=dtype), reduction, logits)
    kernels_for(logits).bce_with_logits_sum_backward(logits, target, *weights, element_gradient, total, dlogits)
    return dlogits, (total / logits.numel() if reduction == "mean" else total).view(()).to(dtype)


def bce_with_logits_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    dlogits = memory.empty_like(logits)
    weights = _element_weight(weight, logits), _element_weight(pos_weight, logits)
    kernels_for(logits).bce_with_logits_backward(logits, target, *weights, _element_gradient(dloss, reduction, logits), dlogits)
    return dlogits


def binary_cross_entropy_forward(prob: Tensor, target: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    """The loss in `dtype`; every tensor is [A, B, P]."""
    kernels = kernels_for(prob)
    if reduction == "none":
        loss = torch.empty_like(prob, dtype=compute_dtype(prob))
        kernels.binary_cross_entropy_forward(prob, target, _element_weight(weight, prob), loss)
        return loss.to(dtype)
    total = prob.new_empty(1, dtype=compute_dtype(prob))
    kernels.binary_cross_entropy_sum(prob, target, _element_weight(weight, prob), total)
    return (total / prob.numel() if reduction == "mean" else total).view(()).to(dtype)


def binary_cross_entropy_backward(dloss: Tensor, prob: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    dprob = memory.empty_like(prob)
    dloss = _element_gradient(dloss, reduction, prob)
    kernels_for(prob).binary_cross_entropy_backward(prob, target, _element_weight(weight, prob), dloss, dprob)
    return dprob
