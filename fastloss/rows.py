"""What the losses over rows of classes have in common: their tensors as the kernels want them, and the arithmetic on one number a row.

The kernels know logits [N, C] or [B, C, P]. Row numbers are [N] vectors (N = B * P) in the compute dtype: float64 for float64 logits, else
float32.
"""

import math
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from . import memory
from .backends import kernels_for
from .loss import Spec, compute_dtype, reduced
from .storage import present


def as_rows(logits: Tensor, dim: int = 1) -> Tensor:
    """[N, C] or [B, C, P] with the classes of dimension `dim`; (C,) counts as one row. A view, unless strides leave no choice."""
    if logits.dim() == 1:
        return logits.unsqueeze(0)
    if logits.dim() == 2:
        return logits if dim in (1, -1) else logits.unsqueeze(0)
    if dim in (-1, logits.dim() - 1):
        return logits.flatten(0, -2)
    rows = logits.flatten(0, dim - 1) if dim > 0 else logits.unsqueeze(0)
    if rows.dim() > 3 and rows.stride(1) < rows.stride(-1):
        return rows.movedim(1, -1).flatten(1, -2).movedim(-1, 1)  # classes side by side stay that, also in a copy
    return rows.flatten(2)


def positions(logits: Tensor) -> tuple[int, ...]:
    """The shape of (N, C, d1, ...) without its classes."""
    return (*logits.shape[:1], *logits.shape[2:]) if logits.dim() > 1 else ()


def rows_in(logits: Tensor) -> int:
    return math.prod(positions(logits))


def classes_of(logits: Tensor) -> int:
    return logits.shape[1] if logits.dim() > 1 else logits.shape[0]


def numbers_spec(logits: Tensor, count: int) -> Spec:
    """So many numbers of every row, [count, N], of which kernels take one [N] each."""
    return Spec((count, rows_in(logits)), compute_dtype(logits))


def divisor_spec(logits: Tensor, reduction: str) -> Spec:
    """What 'mean' divides by; without elements for 'none' and 'sum'."""
    return Spec(() if reduction == "mean" else (0,), compute_dtype(logits))


def loss_spec(logits: Tensor, reduction: str, dtype: torch.dtype) -> Spec:
    return Spec(positions(logits) if reduction == "none" else (), dtype)


# ---------------------------------------------------------------- arguments of the kernels


def as_indices(target: Tensor) -> Tensor:
    """Class indices [N], int64, side by side in memory."""
    if target.dim() == 1 and target.dtype == torch.int64 and target.is_contiguous():
        return target
    return present(target, "target").reshape(-1).long().contiguous()


def by_row(entries: Tensor) -> Tensor:
    """(K,), (N, K) or (N, K, d1, ...), some numbers for each row, as [rows, K]."""
    if entries.dim() < 3:
        return entries if entries.dim() == 2 else entries.unsqueeze(0)
    return entries.movedim(1, -1).flatten(0, -2)


def as_entries(indices: Tensor, prob: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Classes [N, K], int64, side by side in memory, and [N, K] of the compute dtype: no copy where one number is for many rows."""
    prob = present(prob, "probabilities").detach().to(compute_dtype(logits)).expand(indices.shape)
    return by_row(present(indices, "indices")).contiguous(), by_row(prob)


def class_table(target: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Class indices, those of a row behind all else, as [rows, K], int64, side by side in memory; K is 0 without a target."""
    if target is None:
        return torch.empty(count, 0, dtype=torch.int64, device=device)
    return present(target, "target").reshape(count, target.numel() // max(1, count)).long().contiguous()


def class_weight(weight: Tensor | None, logits: Tensor) -> Tensor:
    """[C] in the compute dtype; no weight is a one with stride 0."""
    compute = compute_dtype(logits)
    if weight is None:
        return ones(classes_of(logits), compute, logits.device)
    return weight.detach() if weight.dtype is compute else present(weight, "weight").detach().to(compute)


def dense_class_weight(weight: Tensor | None, logits: Tensor) -> Tensor:
    """The same for kernels that read it along with the logits: side by side in memory. No weight is that, too, but on CUDA, where a
    weight of stride 0 is read once."""
    found = class_weight(weight, logits)
    return found if found.is_cuda and found.stride(0) == 0 else found.contiguous()


def class_weight_along(weight: Tensor | None, logits: Tensor) -> Tensor:
    """`dense_class_weight` for kernels that read a one with stride 0 once, on every device."""
    return class_weight(None, logits) if weight is None else dense_class_weight(weight, logits)


def ones(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A one for each, [size] with stride 0, that nothing ever writes to."""
    # made inside a graph capture it would hold nothing until the graph is replayed
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return torch.ones(1, dtype=dtype, device=device).expand(size) if capturing else _ones(size, dtype, device)


@lru_cache(64)
def _ones(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _one(dtype, device).expand(size)


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    one = torch.ones(1, dtype=dtype, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # once: other streams will read it without waiting for this one
    return one


def row_losses(loss: Tensor, logits: Tensor, reduction: str) -> Tensor:
    """Where the kernels write the losses of the rows, [N]: the result itself if that is what it will be."""
    dtype = compute_dtype(logits)
    return loss.view(-1) if reduction == "none" and loss.dtype is dtype else memory.empty((rows_in(logits),), dtype, logits.device)


def row_gradient(dloss: Tensor, divisor: Tensor, logits: Tensor) -> Tensor:
    """The gradient of every row's loss, [N] with stride 1 or 0, from that of the reduced loss."""
    dloss, rows = present(dloss, "the upstream gradient").to(compute_dtype(logits)), rows_in(logits)
    if divisor.numel():
        dloss = quotient(dloss, divisor)
    if dloss.dim() == 0:
        return dloss.expand(rows)
    dloss = dloss.reshape(-1)
    return dloss if dloss.stride(0) in (0, 1) else dloss.contiguous()


def row_gradient_of(number: float, divisor: Tensor, logits: Tensor) -> Tensor:
    """The same from a number that the upstream gradient is expected to be."""
    dloss = torch.full((), number, dtype=compute_dtype(logits), device=logits.device)
    return (quotient(dloss, divisor) if divisor.numel() else dloss).expand(rows_in(logits))


def quotient(dloss: Tensor, divisor: Tensor) -> Tensor:
    """Of two numbers, on CPU by a launch: a call that computes something by torch cannot be repeated as launches."""
    if not dloss.is_cpu:
        return dloss / divisor
    found = torch.empty_like(dloss)
    kernels_for(dloss).divide(dloss, divisor, found)
    return found


def answer_gradient(d: Tensor | None, logits: Tensor) -> Tensor | None:
    """The gradient of one of several answers in the compute dtype; None if there is none."""
    return None if d is None or not d.numel() else present(d, "an upstream gradient").to(compute_dtype(logits))


def each_number(numbers: Tensor) -> tuple[Tensor, ...]:
    """[count, N] as one [N] each, side by side in memory whatever the caller of an op gave."""
    return numbers.contiguous().unbind()


# ---------------------------------------------------------------- reductions


def reduce_rows(rows: Tensor, divisor: Tensor, reduction: str, loss: Tensor, row_weight: Tensor | None = None) -> None:
    """Write the loss, from the losses of the rows; with their weights also what 'mean' divides by, the sum of these."""
    if reduction == "none":
        if rows.data_ptr() != loss.data_ptr():
            loss.view(-1).copy_(rows)
        return
    total, kernels = loss if loss.dtype == rows.dtype else rows.new_empty(()), kernels_for(rows)
    if divisor.numel() and row_weight is not None:
        kernels.mean_of_rows(rows, row_weight, divisor, total)
    else:
        whole = rows.new_empty(()) if divisor.numel() else total
        kernels.sum_rows(rows, whole)
        if divisor.numel():
            kernels.divide(whole, divisor, total)
    if total is not loss:
        loss.copy_(total)


def reduce_index_rows(losses: Tensor, divisor: Tensor, o: Any, loss: Tensor, row_weight: Tensor | None = None) -> None:
    """The same where rows have weights and `o` says how much is smoothed."""
    if o.label_smoothing == 0 or o.reduction != "mean":
        reduce_rows(losses, divisor, o.reduction, loss, row_weight)
        return
    kernels, parts = kernels_for(losses), losses.new_empty(2)
    reduce_rows(losses, divisor, o.reduction, parts[0], row_weight)
    # no weight at all: NaN, although the smoothed part of the sum is not 0
    kernels.divide(torch.zeros((), dtype=losses.dtype, device=losses.device), divisor, parts[1])
    reduce_rows(parts, divisor.new_empty(0), "sum", loss)


# ---------------------------------------------------------------- results of the logits' size


def settle(result: Tensor, written: Tensor) -> Tensor:
    """The result, after a kernel has written it as `written`: a view of it, or a copy in its order where strides left no choice."""
    if written.data_ptr() != result.data_ptr():
        result.copy_(written.view(result.shape))
    return result


# ---------------------------------------------------------------- for definitions in plain torch


def one_row_each(logits: Tensor) -> Tensor:
    """(C,), (N, C) or (N, C, d1, ...) as [rows, C]."""
    rows = as_rows(logits)
    return rows if rows.dim() == 2 else rows.transpose(1, 2).flatten(0, 1)


def reduced_rows(loss: Tensor, row_weight: Tensor | None, reduction: str, logits: Tensor) -> Tensor:
    """`reduced`, in the shape of the logits without their classes if nothing is."""
    return reduced(loss, row_weight, reduction).reshape(positions(logits) if reduction == "none" else ())


def picked(log_prob: Tensor, target: Tensor, weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """-w_y log_prob_y and w_y of rows [N, C], both zero for ignored rows."""
    ignored = target == ignore_index
    y = target.masked_fill(ignored, 0)
    row_weight = weight[y].masked_fill(ignored, 0.0) if weight.numel() else log_prob.new_zeros(target.shape)
    found = log_prob.gather(1, y[:, None]).squeeze(1) if log_prob.shape[1] else row_weight
    return (-row_weight * found).masked_fill(ignored, 0.0), row_weight


def index_loss(logits: Tensor, target: Tensor, weight: Tensor | None, o: Any) -> Tensor:
    """Cross-entropy with class indices, of logits (C,), (N, C) or (N, C, d1, ...); `o` has ignore_index, label_smoothing, reduction."""
    log_prob, target = torch.log_softmax(one_row_each(logits), 1), target.reshape(-1).long()
    weight = log_prob.new_ones(log_prob.shape[1]) if weight is None else weight.to(log_prob.dtype)
    loss, row_weight = picked(log_prob, target, weight, o.ignore_index)
    if o.label_smoothing > 0:
        smooth = -(log_prob * weight).sum(1).masked_fill(target == o.ignore_index, 0.0)
        loss = (1 - o.label_smoothing) * loss + o.label_smoothing / max(1, log_prob.shape[1]) * smooth
    return reduced_rows(loss, row_weight, o.reduction, logits)


def soft_loss(logits: Tensor, target: Tensor, weight: Tensor | None, o: Any) -> Tensor:
    """The same with class probabilities."""
    q = (1 - o.label_smoothing) * one_row_each(target) + o.label_smoothing / max(1, classes_of(logits))
    terms = -q * torch.log_softmax(one_row_each(logits), 1)
    return reduced_rows((terms if weight is None else terms * weight).sum(1), None, o.reduction, logits)
