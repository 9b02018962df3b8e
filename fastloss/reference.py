"""The losses by their definitions, in plain torch: the oracle of the tests, and how second derivatives are taken.

Slow, differentiable as often as you like, any float dtype, and without a line in common with the kernels. `logits` is [N, C] or
[B, C, P], per-row results are [N] with N = B * P.
"""

import torch
from torch import Tensor


def rows(tensor: Tensor) -> Tensor:
    """[N, C] as it is, [B, C, P] as [B * P, C]."""
    return tensor if tensor.dim() == 2 else tensor.transpose(1, 2).flatten(0, 1)


def reduced(loss: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """'none', 'sum', or 'mean' over the weights of the rows (their number, if there are none)."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if row_weight is None:
        return total / loss.numel()
    divisor = row_weight.sum()
    return total / divisor + 0 / divisor  # no weight at all is NaN, also where the total is not zero


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str
) -> Tensor:
    """-(1 - eps) w_y log p_y - eps / C sum_c w_c log p_c for class indices `target` [N]; 'mean' divides by sum w_y."""
    log_prob = torch.log_softmax(rows(logits), 1)
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits.dtype)
    loss, row_weight = _picked(log_prob, target, weight, ignore_index)
    if label_smoothing > 0:
        smooth = -(log_prob * weight).sum(1).masked_fill(target == ignore_index, 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing / max(1, logits.shape[1]) * smooth
    return reduced(loss, row_weight, reduction)


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str) -> Tensor:
    """-sum_c w_c q_c log p_c for class probabilities q = (1 - eps) target + eps / C; 'mean' divides by the number of rows."""
    q = (1 - label_smoothing) * rows(target) + label_smoothing / max(1, logits.shape[1])
    terms = -q * torch.log_softmax(rows(logits), 1)
    return reduced((terms if weight is None else terms * weight).sum(1), None, reduction)


def nll_loss(log_prob: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """-w_y log_prob_y; 'mean' divides by sum w_y."""
    weight = log_prob.new_ones(log_prob.shape[1]) if weight is None else weight.to(log_prob.dtype)
    return reduced(*_picked(rows(log_prob), target, weight, ignore_index), reduction)


def bce_with_logits(logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str) -> Tensor:
    """w ((1 - y) x + (1 + (pos_weight - 1) y) softplus(-x)), element by element."""
    log_weight = 1.0 if pos_weight is None else 1 + (pos_weight - 1) * target
    loss = (1 - target) * logits - log_weight * torch.nn.functional.logsigmoid(logits)
    return reduced(loss if weight is None else loss * weight, None, reduction)


def binary_cross_entropy(prob: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """-w (y log p + (1 - y) log(1 - p)), logarithms not below -100, element by element."""
    loss = (target - 1) * torch.log1p(-prob).clamp(min=-100) - target * torch.log(prob).clamp(min=-100)
    return reduced(loss if weight is None else loss * weight, None, reduction)


def _picked(log_prob: Tensor, target: Tensor, weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """-w_y log_prob_y and w_y, both zero for ignored rows."""
    ignored = target == ignore_index
    y = target.masked_fill(ignored, 0)
    row_weight = weight[y].masked_fill(ignored, 0.0) if weight.numel() else log_prob.new_zeros(target.shape)
    picked = log_prob.gather(1, y[:, None]).squeeze(1) if log_prob.shape[1] else row_weight
    return (-row_weight * picked).masked_fill(ignored, 0.0), row_weight
