"""In plain torch, what a user of torch would write where torch has no such function: it serves the calls that our kernels do not."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(input: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> Tensor:
    """As torchvision has it."""
    p = torch.sigmoid(input)
    loss = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    loss = loss * (1 - (p * target + (1 - p) * (1 - target))) ** gamma
    if alpha >= 0:
        loss = (alpha * target + (1 - alpha) * (1 - target)) * loss
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
