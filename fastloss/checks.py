"""Which arguments our kernels serve. Each function returns None, or in words what does not fit; torch then serves, or raises."""

from typing import Any

import torch
from torch import Tensor

from .launches import COMPUTE

_REDUCTIONS = ("none", "mean", "sum")


def _tensors(logits: Any, others: tuple[Any, ...] = (), optional: tuple[Any, ...] = ()) -> str | None:
    """Kind, device, layout and dtype, for every loss. An optional tensor may be None."""
    for tensor in (logits, *others, *(t for t in optional if t is not None)):
        if not isinstance(tensor, Tensor):
            return f"{type(tensor).__name__} is not a Tensor"
        if tensor.layout != torch.strided or not isinstance(logits, Tensor) or tensor.device != logits.device:
            return "the tensors are not all strided and on one device"
    return None if logits.dtype in COMPUTE else f"there are no kernels for {logits.dtype}"


def _options(size_average: Any, reduce: Any, reduction: Any) -> str | None:
    if size_average is not None or reduce is not None:
        return "size_average and reduce are deprecated"
    return None if reduction in _REDUCTIONS else f"{reduction!r} is not a reduction"


def _is_int64(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and -(2**63) <= number < 2**63


def _class_weight(logits: Tensor, weight: Tensor | None) -> str | None:
    if weight is None:
        return None
    if weight.dim() != 1 or weight.shape[0] != (logits.shape[0] if logits.dim() == 1 else logits.shape[1]):
        return f"weight of shape {tuple(weight.shape)} is not one number for each class"
    if weight.dtype != logits.dtype:
        return f"weight is {weight.dtype}, logits are {logits.dtype}"
    return "weight requires a gradient" if weight.requires_grad else None


def _class_indices(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: Any) -> str | None:
    if target.dtype not in (torch.int64, torch.uint8):
        return f"target is {target.dtype}, not int64 or uint8"
    shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size(())
    if logits.dim() == 0 or (target.shape != shape and not (logits.dim() == 1 and target.shape == (1,))):
        return f"target of shape {tuple(target.shape)} does not belong to logits of shape {tuple(logits.shape)}"
    if not _is_int64(ignore_index):
        return f"ignore_index is {ignore_index!r}"
    return _class_weight(logits, weight)


def cross_entropy(
    logits: Any, target: Any, weight: Any, size_average: Any, ignore_index: Any, reduce: Any, reduction: Any, label_smoothing: Any
) -> str | None:
    problem = _tensors(logits, (target,), (weight,)) or _options(size_average, reduce, reduction)
    if problem is not None:
        return problem
    if not isinstance(label_smoothing, (float, int)) or not 0 <= label_smoothing <= 1:
        return f"label_smoothing is {label_smoothing!r}"
    if logits.dim() > 0 and logits.shape[min(1, logits.dim() - 1)] == 0:
        return "there are no classes"
    if target.is_floating_point() and target.shape == logits.shape and logits.dim() > 0:
        if target.dtype != logits.dtype:
            return f"target is {target.dtype}, logits are {logits.dtype}"
        if not _is_int64(ignore_index) or ignore_index >= 0:
            return f"ignore_index is {ignore_index!r} for class probabilities"
        return _class_weight(logits, weight)
    return _class_indices(logits, target, weight, ignore_index)


def nll_loss(logits: Any, target: Any, weight: Any, size_average: Any, ignore_index: Any, reduce: Any, reduction: Any) -> str | None:
    problem = _tensors(logits, (target,), (weight,)) or _options(size_average, reduce, reduction)
    if problem is None and logits.dim() == 1 and target.dim() != 0:
        return "one row of log-probabilities has one target"
    return problem or _class_indices(logits, target, weight, ignore_index)


def softmax(logits: Any, dim: Any, dtype: Any) -> str | None:
    if not _is_int64(dim):
        return f"dim is {dim!r}"
    problem = _tensors(logits)
    if problem is not None:
        return problem
    if not -logits.dim() <= dim < logits.dim():
        return f"dim {dim} is not a dimension of logits of shape {tuple(logits.shape)}"
    return f"there are no kernels for {dtype}" if dtype is not None and dtype not in COMPUTE else None


def elementwise(logits: Any, target: Any, weights: tuple[Any, ...], size_average: Any, reduce: Any, reduction: Any) -> str | None:
    problem = _tensors(logits, (target,), weights) or _options(size_average, reduce, reduction)
    if problem is not None:
        return problem
    if target.shape != logits.shape or target.dtype != logits.dtype:
        return f"target is {target.dtype} of shape {tuple(target.shape)}, input {logits.dtype} of shape {tuple(logits.shape)}"
    if target.requires_grad:
        return "target requires a gradient"
    for weight in weights:
        if weight is None:
            continue
        if weight.requires_grad or weight.dtype.is_complex:
            return f"a weight is {weight.dtype} or requires a gradient"
        missing = logits.dim() - weight.dim()
        if missing < 0 or any(w not in (1, s) for w, s in zip(weight.shape, logits.shape[missing:], strict=True)):
            return f"a weight of shape {tuple(weight.shape)} cannot be broadcast to {tuple(logits.shape)}"
    return None


def inplace_backward(logits: Tensor, target: Tensor) -> None:
    """Raise RuntimeError where overwriting the logits with their gradient would be wrong."""
    problem = None
    owner = logits if logits._base is None else logits._base
    if owner.requires_grad and owner.is_leaf:
        problem = "the logits are (a view of) a leaf that requires a gradient, and would be lost"
    elif _may_overlap(logits):
        problem = f"logits with strides {tuple(logits.stride())} share memory among themselves"
    elif logits.untyped_storage().data_ptr() == target.untyped_storage().data_ptr() and logits.numel():
        problem = "target shares the memory of the logits"
    if problem is not None:
        raise RuntimeError(f"inplace_backward: {problem}")


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two elements might share memory: a dimension does not reach beyond all smaller ones."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
