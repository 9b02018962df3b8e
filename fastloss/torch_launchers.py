"""The launchers that losses over sharded classes need, in plain torch: for devices without kernels, and for backend 'torch'.
What they do is said in `launchers`."""

import sys
from typing import Any

import torch
from torch import Tensor

from .backends import backend_of, get_backend, kernels_for, unavailable
from .kernels.groups import PAD, Answers, Rows, Slope, Smoothing
from .loss import compute_dtype


def kernels_or_torch(logits: Tensor) -> Any:
    """The launchers for these logits. Whoever serves, what ranks tell one another is the same."""
    name, choice = backend_of(logits.device.type), get_backend()
    if name is not None and choice in ("auto", name) and unavailable(name) is None:
        return kernels_for(logits)
    return sys.modules[__name__]


def token_statistics_forward(logits: Tensor, target: Tensor, ignore_index: int, logit_scale: float, answers: Answers, rows: Rows) -> None:
    x = _by_row(logits)
    top = _top(x)
    shifted = ((x - top[:, None]) * logit_scale).clamp(min=-1000.0)  # e^-1000 times 1000 is 0 where -inf times 0 is NaN
    e = shifted.exp()
    total = e.sum(1)
    lowest = x.amax(1) == -torch.inf
    counts = (target != ignore_index).any(1) | (target.shape[1] == 0)
    zero, total = torch.zeros_like(top), total.masked_fill(lowest, torch.nan)
    rows.top.copy_(torch.where(counts, top, zero))
    rows.total.copy_(torch.where(counts, total, zero))
    found = (
        total.log() - (e * shifted).sum(1) / total,
        (top * logit_scale + total.log()).masked_fill(lowest, -torch.inf),
        e.square().sum(1) / total.square(),
    )
    for place, answer in zip((answers.entropy, answers.lse, answers.sum_sq_prob), found, strict=True):
        if place.numel():
            place.copy_(torch.where(counts, answer, zero))
    if answers.argmax.numel():
        answers.argmax.copy_(torch.where(counts, x.argmax(1), 0))


def token_statistics_backward(
    logits: Tensor, target: Tensor, ignore_index: int, logit_scale: float, rows: Rows, slope: Slope, dlog_prob: Tensor, dlogits: Tensor
) -> None:
    x, counts = _by_row(logits), target != ignore_index
    top, total = rows.top[:, None], rows.total[:, None]
    log_p = ((x - top) * logit_scale) - total.log()
    p, alpha = log_p.exp(), slope.alpha[:, None]
    taken = dlog_prob.masked_fill(~counts, 0.0) if dlog_prob.numel() else None
    if taken is not None:
        alpha = alpha - taken.sum(1, keepdim=True)
    d = p * alpha
    if slope.beta.numel():
        d = d + slope.beta[:, None] * (p * log_p).masked_fill(p == 0, 0.0)
    if slope.gamma.numel():
        d = d + slope.gamma[:, None] * p * p
    if taken is not None:
        d = d.scatter_add(1, target.masked_fill(~counts, 0), taken)
    _write((d * logit_scale).masked_fill(total == 0, 0.0), dlogits)


def soft_cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, loss: Tensor, rows: Rows) -> None:
    x = _by_row(logits)
    k = weight * (smoothing.keep * _by_row(target) + smoothing.spread)
    top = _top(x)
    total = (x - top[:, None]).exp().sum(1)
    total = total.masked_fill(total < 0.5, torch.nan)
    rows.top.copy_(top)
    rows.total.copy_(total)
    _place(rows.mass).copy_(k.sum(1))
    loss.copy_((k * (total.log()[:, None] - (x - top[:, None]))).sum(1))


def soft_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    k = weight * (smoothing.keep * _by_row(target) + smoothing.spread)
    _write(dloss[:, None] * (_place(rows.mass)[:, None] * _prob(logits, rows) - k), dlogits)


def soft_cross_entropy_target_backward(logits: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dtarget: Tensor) -> None:
    nll = rows.total.log()[:, None] - (_by_row(logits) - rows.top[:, None])
    _write(dloss[:, None] * (keep * weight) * nll, dtarget)


def sparse_soft_cross_entropy_backward(
    logits: Tensor, indices: Tensor, prob: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    entries = indices != PAD
    y = indices.masked_fill(~entries, 0)
    taken = (smoothing.keep * weight[y] * prob).masked_fill(~entries, 0.0)
    d = _place(rows.mass)[:, None] * _prob(logits, rows) - smoothing.spread * weight
    d = dloss[:, None] * d.scatter_add(1, y, -taken)
    _write(d.masked_fill((_place(rows.row_weight) == 0)[:, None], 0.0), dlogits)


def sum_rows(values: Tensor, total: Tensor) -> None:
    total.copy_(values.sum(dtype=torch.float64) if values.device.type != "mps" else values.sum())


def _by_row(logits: Tensor) -> Tensor:
    """[N, C] or [B, C, P] as [rows, C] of the compute dtype."""
    x = logits.to(compute_dtype(logits))
    return x if x.dim() == 2 else x.movedim(1, -1).flatten(0, 1)


def _top(x: Tensor) -> Tensor:
    """The largest of each row, as kernels have it: from the lowest finite number on."""
    return x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1).clamp(min=torch.finfo(x.dtype).min)


def _prob(logits: Tensor, rows: Rows) -> Tensor:
    return (_by_row(logits) - rows.top[:, None]).exp() / rows.total[:, None]


def _write(d: Tensor, place: Tensor) -> None:
    place.copy_(d if place.dim() == 2 else d.unflatten(0, (place.shape[0], place.shape[2])).movedim(-1, 1))


def _place(numbers: Any) -> Tensor:
    """A group's field that the launcher is never without."""
    return numbers  # type: ignore[no-any-return]
