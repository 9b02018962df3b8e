"""In plain torch, what a user of torch would write where torch has no such function: it serves the calls that our kernels do not."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import all_logits


def sigmoid_focal_loss(input: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> Tensor:
    """As torchvision has it."""
    p = torch.sigmoid(input)
    loss = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    loss = loss * (1 - (p * target + (1 - p) * (1 - target))) ** gamma
    if alpha >= 0:
        loss = (alpha * target + (1 - alpha) * (1 - target)) * loss
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """By torch: its own where it has one that does this, else F.linear and F.cross_entropy."""
    rest: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    scaled = isinstance(logit_scale, Tensor) or logit_scale != 1 or logit_softcap is not None
    if hasattr(F, "linear_cross_entropy") and not scaled and (input.dim() < 3 or linear_weight.dim() != 2):
        return F.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, ignore_index=ignore_index, options=options, **rest
        )
    _refuse_shapes(input, linear_weight, linear_bias)
    logits = all_logits(input, linear_weight, linear_bias, logit_scale, logit_softcap or 0.0)
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    rest["ignore_index"] = -100 if ignore_index is None else ignore_index
    if input.dim() < 3:
        return F.cross_entropy(logits, target, **rest)
    if target.shape not in (logits.shape, logits.shape[:-1]):
        raise RuntimeError(
            f"expected input with dimensionality 1 or 2, got {input.dim()}, with which target must have shape {tuple(logits.shape[:-1])} "
            f"or {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    loss = F.cross_entropy(logits.flatten(0, -2), target.reshape(-1, *target.shape[input.dim() - 1 :]), **rest)
    return loss.view(logits.shape[:-1]) if reduction == "none" else loss


def _refuse_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """In torch's words."""
    problem = None
    if input.dim() < 1 or (input.dim() > 2 and linear_weight.dim() > 2):
        problem = f"expected input with dimensionality 1 or 2, got {input.dim()}"
    elif linear_weight.dim() < 2:
        problem = f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
    elif input.shape[-1] != linear_weight.shape[-1]:
        problem = (
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    elif linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        problem = f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
    elif linear_weight.dim() > 2 and input.dim() == 1:
        problem = (
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    if problem is not None:
        raise RuntimeError(problem)
