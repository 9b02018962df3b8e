"""In plain torch, what a user of torch would write where torch has no such function: it serves the calls that our kernels do not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import autocast_is_active
from .kernels.groups import PAD


def sigmoid_focal_loss(input: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> Tensor:
    """As torchvision has it."""
    p = torch.sigmoid(input)
    loss = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    loss = loss * (1 - (p * target + (1 - p) * (1 - target))) ** gamma
    if alpha >= 0:
        loss = (alpha * target + (1 - alpha) * (1 - target)) * loss
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def sparse_soft_cross_entropy(
    input: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """By picking log-probabilities, in float32 for half precision: -inf at a class that no entry names makes no NaN, as in the kernels."""
    half, dim = input.dtype in (torch.float16, torch.bfloat16), min(1, input.dim() - 1)
    log_prob = torch.log_softmax(input.float() if half else input, dim)
    classes, padding = input.shape[dim], indices == PAD
    weight = log_prob.new_ones(classes) if weight is None else weight.to(log_prob.dtype)
    # on CPU an index too large is an IndexError here; a negative one would count from the end
    row_weight = weight[torch.where(padding, 0, torch.where(indices < 0, classes, indices))] if indices.numel() else probabilities
    picked = row_weight * log_prob.gather(dim, indices.masked_fill(padding, 0))
    loss = -(1 - label_smoothing) * (probabilities * picked).masked_fill(padding, 0.0).sum(dim)
    if label_smoothing > 0:
        loss = loss - label_smoothing / classes * (log_prob.movedim(dim, -1) * weight).sum(-1)
    loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    return loss.to(torch.float32 if half and autocast_is_active(input) else input.dtype)
