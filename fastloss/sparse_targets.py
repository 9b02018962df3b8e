"""Losses whose targets are a few classes with probabilities: what torch has no function for, with arguments named as torch names them."""

from typing import Any

import torch
from torch import Tensor

from . import composed, losses
from .arguments import REDUCTIONS
from .losses.sparse_soft_cross_entropy import belong, can_broadcast
from .rows import classes_of
from .serving import serve


def sparse_soft_cross_entropy(
    input: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax cross-entropy with a few classes of a probability each as target: -sum_k q_k w_{y_k} log softmax(input)_{y_k} for each row,
    reduced.

    What `cross_entropy` gives for class probabilities that are 0 elsewhere, without a tensor of them: mixup and CutMix pairs, distillation
    from a teacher's best K classes, sets of candidates.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16, any strides.
        indices: classes y, (K,), (N, K) or (N, K, d1, ...), int64. -100 fills up a row that has fewer; of a class that a row has twice,
            the probabilities add up.
        probabilities: q, any of these dtypes, broadcastable to `indices`; or (K,), one for each entry of every row. They need not sum to 1.
        weight: (C,), any float dtype but float64 beside another `input`: the weight of every class.
        reduction: 'none', 'sum', or 'mean' over the rows, as for class probabilities.
        label_smoothing: in [0, 1]; how much of the target is spread evenly over all classes. Without it a row of nothing but -100 counts
            for nothing: its loss and gradient are 0, whatever its logits.

    Returns:
        The loss, () or the shape of `input` without its classes, in the dtype of `input` (float32 for half precision under autocast).
        Gradients go to `input` and to `probabilities`.

    Raises:
        IndexError: on CPU, an index that is no class. On CUDA the loss of that row is NaN: a check would stall the device.
        TypeError, ValueError, RuntimeError: arguments that do not fit.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]], requires_grad=True)
    >>> pairs, lam = torch.tensor([[2, 0], [0, 1]]), 0.7
    >>> loss = sparse_soft_cross_entropy(logits, pairs, torch.tensor([lam, 1 - lam]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", logits.grad[0])
    0.9295 tensor([-0.1050,  0.1224, -0.0174])
    """
    _refuse_misfits(input, indices, probabilities, weight, reduction, label_smoothing)
    if probabilities.dim() == 1 and indices.dim() > 2 and probabilities.shape == indices.shape[1:2]:
        probabilities = probabilities.view(-1, *(1,) * (indices.dim() - 2))
    given = input, indices, probabilities, weight, reduction, label_smoothing
    options = label_smoothing, reduction, None, None
    theirs = composed.sparse_soft_cross_entropy
    return serve(losses.sparse_soft_cross_entropy, (input, probabilities, indices, weight), options, theirs, given)


def _refuse_misfits(input: Any, indices: Any, probabilities: Any, weight: Any, reduction: Any, label_smoothing: Any) -> None:
    """Raise for arguments that no kernel and no composition could make sense of."""
    name, tensors = "sparse_soft_cross_entropy", {"input": input, "indices": indices, "probabilities": probabilities, "weight": weight}
    for argument, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and argument == "weight"):
            raise TypeError(f"{name}: {argument} must be a Tensor, got {type(tensor).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"{name}: label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if indices.dtype != torch.int64:
        raise RuntimeError(f"{name}: indices must be int64, got {indices.dtype}")
    for argument in ("input", "probabilities"):
        if not tensors[argument].is_floating_point():
            raise RuntimeError(f"{name}: {argument} must be floating point, got {tensors[argument].dtype}")
    logits, entries, prob = tuple(input.shape), tuple(indices.shape), tuple(probabilities.shape)
    if not logits or not belong(indices, input):
        wanted = ", ".join(map(str, (*logits[:-1][:1], "K", *logits[2:])))
        raise ValueError(f"{name}: indices must have shape ({wanted}) to match logits of shape {logits}, got {entries}")
    if not can_broadcast(probabilities, indices) and prob != entries[1:2]:
        raise ValueError(f"{name}: probabilities must be broadcastable to indices of shape {entries}, got {prob}")
    if weight is not None and tuple(weight.shape) != (classes_of(input),):
        raise RuntimeError(f"{name}: weight must have shape ({classes_of(input)},), one for each class, got {tuple(weight.shape)}")
