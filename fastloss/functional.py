"""The losses, with the signatures and the behaviour of torch.nn.functional.

Every function takes and returns what torch's function of the same name does: shapes, dtypes, reductions, broadcasting, errors. Calls that
the kernels do not serve go to torch (`fastloss.explain` tells which and why). No argument is ever written to. Gradients of any order,
`torch.func` transforms, forward-mode AD and `torch.compile` work as they do with torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, checks, ops
from .routing import route, served_by_torch, tiny
from .shapes import as_elements, as_rows


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """Softmax cross-entropy: -w_y log softmax(input)_y for each row, reduced.

    Source: torch.nn.functional.cross_entropy, whose arguments these are.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16, any strides.
        target: class indices, () or (N,) or (N, d1, ...), int64 or uint8; or class probabilities, shape and dtype of `input`.
        weight: (C,), dtype of `input`: the weight of every class.
        ignore_index: rows with this class index count for nothing: their logits are not looked at and get a zero gradient.
        reduction: 'none', 'sum', or 'mean': over the weights of the rows for class indices, over their number for probabilities.
        label_smoothing: in [0, 1]; how much of the target is spread evenly over all classes.
        inplace_backward: not torch's. The backward writes the gradient over the logits, and so needs no memory for it. Only for logits
            that nothing else reads afterwards; autograd raises if something does.

    Returns:
        The loss, () or the shape of the class indices, in the dtype of `input` (float32 for half precision under autocast).

    Raises:
        IndexError: on CPU, a class index that is no class. On CUDA the loss of that row is NaN: a check would stall the device.
        RuntimeError: inplace_backward where the gradient cannot take the place of the logits.
        Whatever torch raises, for all else.
    """
    if tiny(input) and not inplace_backward:
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    misfit = checks.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    way = route(misfit, input, target, weight, min_numel=0 if inplace_backward else None)
    if inplace_backward:
        if way.path != "kernel":
            raise RuntimeError(f"inplace_backward: the kernels do not serve this call: {way.reason}")
        checks.inplace_backward(input, target)
    if way.path == "torch":
        return served_by_torch(
            "cross_entropy", way, F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        )
    loss: Tensor
    logits, dtype = as_rows(input), _result_dtype(input)
    if target.is_floating_point():
        soft = as_rows(target)
        if way.path == "op":
            loss = ops.soft_cross_entropy(logits, soft, weight, label_smoothing, reduction, dtype)[0]
        else:
            loss = autograd.soft_cross_entropy(logits, soft, weight, label_smoothing, reduction, dtype, inplace_backward)
        return loss.view(input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()) if reduction == "none" else loss
    indices = target.reshape(-1).long()
    if way.path == "op":
        loss = ops.cross_entropy(logits, indices, weight, ignore_index, label_smoothing, reduction, dtype)[0]
    else:
        loss = autograd.cross_entropy(logits, indices, weight, ignore_index, label_smoothing, reduction, dtype, inplace_backward)
    return loss.view(target.shape if input.dim() > 1 else ()) if reduction == "none" else loss


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood: -w_y input_y for each row, reduced.

    Source: torch.nn.functional.nll_loss, whose arguments these are.

    Args:
        input: log-probabilities, (C,), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16, any strides.
        target: class indices, () or (N,) or (N, d1, ...), int64 or uint8.
        weight: (C,), dtype of `input`: the weight of every class.
        ignore_index: rows with this class index count for nothing.
        reduction: 'none', 'sum', or 'mean' over the weights of the rows.

    Returns:
        The loss, () or the shape of `target`, in the dtype of `input` (float32 for half precision under autocast).

    Raises:
        IndexError: on CPU, a class index that is no class. On CUDA the loss of that row is NaN.
        Whatever torch raises, for all else.
    """
    if tiny(input):
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    misfit = checks.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    way = route(misfit, input, target, weight)
    if way.path == "torch":
        return served_by_torch("nll_loss", way, F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction))
    arguments = as_rows(input), target.reshape(-1).long(), weight, ignore_index, reduction, _result_dtype(input)
    loss: Tensor = ops.nll_loss(*arguments)[0] if way.path == "op" else autograd.nll_loss(*arguments)
    return loss.view(target.shape) if reduction == "none" else loss


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum of exp(input) along `dim`.

    Source: torch.nn.functional.softmax, whose arguments these are.

    Args:
        input: any shape, float32, float64, bfloat16 or float16, any strides.
        dim: the dimension along which the result sums to 1.
        dtype: what `input` is cast to first.

    Returns:
        A tensor of the shape of `input`. Raises what torch raises.
    """
    if tiny(input):
        return F.softmax(input, dim, _stacklevel + 1, dtype)
    way = route(checks.softmax(input, dim, dtype) or _autocast_misfit(input), input)
    if way.path == "torch":
        return served_by_torch("softmax", way, F.softmax(input, dim, _stacklevel + 1, dtype))
    assert dim is not None
    logits = as_rows(input if dtype is None else input.to(dtype), dim % input.dim())
    prob: Tensor = ops.softmax(logits) if way.path == "op" else autograd.softmax(logits)
    return _back(prob, input, dim)


def log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """input - log(sum of exp(input)) along `dim`.

    Source: torch.nn.functional.log_softmax, whose arguments these are.

    Args:
        input: any shape, float32, float64, bfloat16 or float16, any strides.
        dim: the dimension along which the exponentials of the result sum to 1.
        dtype: what `input` is cast to first.

    Returns:
        A tensor of the shape of `input`. Raises what torch raises.
    """
    if tiny(input):
        return F.log_softmax(input, dim, _stacklevel + 1, dtype)
    way = route(checks.softmax(input, dim, dtype) or _autocast_misfit(input), input)
    if way.path == "torch":
        return served_by_torch("log_softmax", way, F.log_softmax(input, dim, _stacklevel + 1, dtype))
    assert dim is not None
    logits = as_rows(input if dtype is None else input.to(dtype), dim % input.dim())
    log_prob: Tensor = ops.log_softmax(logits) if way.path == "op" else autograd.log_softmax(logits)
    return _back(log_prob, input, dim)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Sigmoid cross-entropy: w ((1 - y) x + (1 + (pos_weight - 1) y) log(1 + exp(-x))) for each element, reduced.

    Source: torch.nn.functional.binary_cross_entropy_with_logits, whose arguments these are.

    Args:
        input: logits x of any shape, float32, float64, bfloat16 or float16, any strides.
        target: y, shape and dtype of `input`, usually in [0, 1].
        weight: w, broadcastable to `input`.
        reduction: 'none', 'mean' over the elements, or 'sum'.
        pos_weight: weight of the positive part, broadcastable to `input`.

    Returns:
        The loss, () or the shape of `input`, in the dtype of `input` (float32 for half precision under autocast). Raises what torch raises.
    """
    if tiny(input):
        return F.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight)
    misfit = checks.elementwise(input, target, (weight, pos_weight), size_average, reduce, reduction)
    way = route(misfit, input, target, weight, pos_weight)
    if way.path == "torch":
        return served_by_torch(
            "binary_cross_entropy_with_logits",
            way,
            F.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight),
        )
    elements = as_elements(input, target, weight, pos_weight)
    arguments: Any = *elements.tensors, reduction, _result_dtype(input)
    loss: Tensor = ops.bce_with_logits(*arguments) if way.path == "op" else autograd.bce_with_logits(*arguments)
    return elements.restore(loss) if reduction == "none" else loss


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of probabilities: -w (y log p + (1 - y) log(1 - p)) for each element, reduced; no logarithm counts below -100.

    Source: torch.nn.functional.binary_cross_entropy, whose arguments these are. Where there are logits, `binary_cross_entropy_with_logits`
    is faster and more accurate.

    Args:
        input: probabilities p in [0, 1], any shape, float32, float64, bfloat16 or float16, any strides.
        target: y in [0, 1], shape and dtype of `input`.
        weight: w, broadcastable to `input`.
        reduction: 'none', 'mean' over the elements, or 'sum'.

    Returns:
        The loss, () or the shape of `input`, in the dtype of `input`.

    Raises:
        RuntimeError: on CPU, a number of `input` or `target` outside [0, 1].
        Whatever torch raises, for all else.
    """
    if tiny(input):
        return F.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)
    misfit = checks.elementwise(input, target, (weight,), size_average, reduce, reduction) or _autocast_misfit(input)
    way = route(misfit, input, target, weight)
    if way.path == "torch":
        return served_by_torch("binary_cross_entropy", way, F.binary_cross_entropy(input, target, weight, size_average, reduce, reduction))
    elements = as_elements(input, target, weight)
    arguments = *elements.tensors, reduction, input.dtype
    loss: Tensor = ops.binary_cross_entropy(*arguments) if way.path == "op" else autograd.binary_cross_entropy(*arguments)
    return elements.restore(loss) if reduction == "none" else loss


def _result_dtype(input: Tensor) -> torch.dtype:
    """float32 for half precision under autocast, computed without a float32 copy of the input; else the input's own."""
    half = input.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and torch.is_autocast_enabled(input.device.type) else input.dtype


def _autocast_misfit(input: Any) -> str | None:
    """Autocast's rules for these functions differ between devices; torch knows them."""
    if isinstance(input, Tensor) and torch.amp.is_autocast_available(input.device.type) and torch.is_autocast_enabled(input.device.type):
        return "autocast is active"
    return None


def _back(result: Tensor, input: Tensor, dim: int) -> Tensor:
    """A result of `as_rows(input, dim)` in the shape of `input`."""
    return result.reshape(input.shape)
