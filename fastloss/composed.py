"""In plain torch, what a user of torch would write where torch has no such function: it serves the calls that our kernels do not."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses
from .arguments import autocast_is_active, plain
from .chunks import all_logits, without_ignored
from .kernels.groups import PAD
from .loss import COMPUTE


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
    refuse_shapes(input, linear_weight, linear_bias)
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


def refuse_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
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


def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *,
    linear_bias: Tensor | None,
    ignore_index: int,
    logit_scale: float | Tensor,
    logit_softcap: float | None,
    wanted: str,
) -> tuple[Tensor, ...]:
    """The answers of the loss of this name, from all logits."""
    counting = without_ignored(input, target, ignore_index)
    logits = all_logits(counting, linear_weight, linear_bias, logit_scale, logit_softcap or 0.0)
    return token_statistics(logits, target, logits.dim() - 1, ignore_index, 1.0, wanted)


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


def token_statistics(
    input: Tensor, target: Tensor | None, dim: int, ignore_index: int, logit_scale: float, wanted: str
) -> tuple[Tensor, ...]:
    """As the loss defines them, computed in float32 for half precision."""
    loss = losses.token_statistics
    # what the kernels raise, where a target can be looked at without waiting for a device
    if target is not None and not torch.compiler.is_compiling() and target.device.type == "cpu" and plain(target):
        bad = target[(target != ignore_index) & ((target < 0) | (target >= input.shape[dim]))]
        if bad.numel():
            raise IndexError(f"Target {int(bad[0])} is out of bounds.")
    wide = input.to(COMPUTE.get(input.dtype, input.dtype))
    return loss.definition(loss.tensors(wide, target), loss.options(dim, ignore_index, logit_scale, wanted))
