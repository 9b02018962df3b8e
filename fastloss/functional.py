"""The losses, with the signatures and the behaviour of torch.nn.functional.

Every function takes and returns what torch's function of the same name does: shapes, dtypes, reductions, broadcasting, errors. Calls that
the kernels do not serve go to torch (`fastloss.explain` tells which and why). No argument is ever written to. Gradients of any order,
`torch.func` transforms, forward-mode AD and `torch.compile` work as they do with torch.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import composed, dtensors, losses
from .arguments import REDUCTIONS, is_int64, reduction_misfit, refuse_inplace, tensors_misfit
from .backends import get_backend
from .calls import THEIRS, recall
from .operation import apply_again
from .routing import ANY, route, tiny
from .serving import by_kernels, by_torch, result_dtype, scripted_as_torchs, serve


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
        input: logits, (C,), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16, any strides. A DTensor sharded on its
            classes or rows is computed where its shards are (docs/distributed.md).
        target: class indices, () or (N,) or (N, d1, ...), int64 or uint8; or class probabilities, shape of `input`, any of these dtypes.
        weight: (C,): the weight of every class. With class indices its dtype must be that of `input`, under autocast any but float64.
        ignore_index: rows with this class index count for nothing: their logits are not looked at and get a zero gradient.
        reduction: 'none', 'sum', or 'mean': over the weights of the rows for class indices, over their number for probabilities.
        label_smoothing: in [0, 1]; how much of the target is spread evenly over all classes.
        inplace_backward: not torch's. The backward writes the gradient over the logits, and so needs no memory for it. Only for logits
            that nothing else reads afterwards; autograd raises if something does.

    Returns:
        The loss, () or the shape of the class indices, in the dtype of `input`, with probabilities in the one that input, target and
        weight are promoted to (float32 for half precision under autocast).

    Raises:
        IndexError: on CPU, a class index that is no class. On CUDA the loss of that row is NaN: a check would stall the device.
        RuntimeError: inplace_backward where the gradient cannot take the place of the logits.
        Whatever torch raises, for all else.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([2, 0]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", logits.grad.sum().abs() < 1e-6)
    0.4795 tensor(True)
    """
    worth = losses.cross_entropy.worth.of(reduction)
    if not inplace_backward and tiny(input, worth):
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    loss: Any = losses.cross_entropy
    given: Any = (input, target, weight)
    options: Any = (size_average, ignore_index, reduce, reduction, label_smoothing)
    kind, call = (None, None) if inplace_backward else recall("cross_entropy", given, options)
    if call is not None:
        return F.cross_entropy(*given, *options) if call is THEIRS else apply_again(call, given)  # type: ignore[no-any-return]
    odd_reduction = reduction_misfit(size_average, reduce, reduction)
    misfit = tensors_misfit(input, target, optional=(weight,)) or odd_reduction
    if misfit is not None and odd_reduction is None and dtensors.is_dtensor(input) and not inplace_backward and get_backend() != "torch":
        plan = dtensors.plan_of(input, target, weight)
        if isinstance(plan, dtensors.Plan):
            named = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
            return dtensors.cross_entropy(plan, cross_entropy, input, target, weight, named)
        misfit = plan
    t: Any = None
    o: Any = None
    if misfit is None:
        if target.is_floating_point() and target.shape == input.shape and target.dim():
            loss = losses.soft_cross_entropy
            o = loss.options(label_smoothing, reduction, result_dtype(input, target, weight))
            misfit = None if is_int64(ignore_index) and ignore_index < 0 else f"ignore_index is {ignore_index!r} for class probabilities"
        else:
            o = loss.options(ignore_index, label_smoothing, reduction, result_dtype(input))
        t = loss.tensors(*given)
        misfit = misfit or loss.misfit(t, o) or loss.mixture_misfit(t)
    way = route(misfit, input, ANY if inplace_backward else worth)
    if inplace_backward:
        if way.path != "kernel":
            raise RuntimeError(f"inplace_backward: the kernels do not serve this call: {way.reason}")
        refuse_inplace(*t)
    if way.path == "torch":
        return by_torch(way, "cross_entropy", F.cross_entropy(*given, *options), kind)
    result: Tensor = by_kernels(way, loss, t, o, kind, inplace_backward)
    return result


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
        weight: (C,), dtype of `input` (under autocast any but float64): the weight of every class.
        ignore_index: rows with this class index count for nothing.
        reduction: 'none', 'sum', or 'mean' over the weights of the rows.

    Returns:
        The loss, () or the shape of `target`, in the dtype of `input` (float32 for half precision under autocast).

    Raises:
        IndexError: on CPU, a class index that is no class. On CUDA the loss of that row is NaN.
        Whatever torch raises, for all else.

    >>> log_prob = torch.log_softmax(torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]]), dim=1)
    >>> print(f"{nll_loss(log_prob, torch.tensor([2, 0])).item():.4f}")
    0.4795
    """
    given = input, target, weight, size_average, ignore_index, reduce, reduction
    return serve(losses.nll_loss, (input, target, weight), (ignore_index, reduction, size_average, reduce), F.nll_loss, given)


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
        target: y, shape of `input`, any of these dtypes, usually in [0, 1].
        weight: w, broadcastable to `input`.
        reduction: 'none', 'mean' over the elements, or 'sum'.
        pos_weight: weight of the positive part, broadcastable to `input`.

    Returns:
        The loss, () or the shape of `input`, in the dtype of `target` (float32 for half precision under autocast). Raises what torch
        raises.

    >>> logits, labels = torch.tensor([-1.7723, -1.5965, 0.8863]), torch.tensor([0.0, 1.0, 0.0])
    >>> binary_cross_entropy_with_logits(logits, labels, reduction="none")
    tensor([0.1570, 1.7810, 1.2314])
    """
    given = input, target, weight, size_average, reduce, reduction, pos_weight
    options = reduction, size_average, reduce
    theirs = F.binary_cross_entropy_with_logits
    return serve(losses.bce_with_logits, (input, target, weight, pos_weight), options, theirs, given)


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
        target: y in [0, 1], shape and dtype of `input` (under autocast, which torch has for it on CPU, any but float64).
        weight: w, broadcastable to `input`.
        reduction: 'none', 'mean' over the elements, or 'sum'.

    Returns:
        The loss, () or the shape of `input`, in the dtype of `input` (float32 for half precision under autocast).

    Raises:
        RuntimeError: on CPU, a number of `input` or `target` outside [0, 1].
        Whatever torch raises, for all else.

    >>> binary_cross_entropy(torch.tensor([0.5, 0.9]), torch.tensor([0.0, 1.0]), reduction="none")
    tensor([0.6931, 0.1054])
    """
    given = input, target, weight, size_average, reduce, reduction
    return serve(losses.binary_cross_entropy, (input, target, weight), (reduction, size_average, reduce), F.binary_cross_entropy, given)


def sigmoid_focal_loss(input: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> Tensor:
    """Sigmoid cross-entropy of each element, times (1 - p_t)^gamma: what is predicted well already counts for little.

    Source: torchvision.ops.sigmoid_focal_loss, with torch's names for the arguments; Lin et al., arXiv 1708.02002.

    Args:
        input: logits x of any shape, float32, float64, bfloat16 or float16, any strides.
        target: y, shape of `input`, any of these dtypes: 1 for the positive class, 0 for the negative one, or between.
        alpha: in [0, 1], weight of the positive class, 1 - alpha that of the negative one; negative: both weigh 1.
        gamma: not negative; 0 is cross-entropy.
        reduction: 'none', 'mean' over the elements, or 'sum'.

    Returns:
        The loss, () or the shape of `input`, in the dtype that input and target are promoted to (float32 for half precision under
        autocast).

    Raises:
        ValueError: another reduction.
        Whatever torch raises for tensors that do not fit.

    >>> sigmoid_focal_loss(torch.tensor([-4.0, 0.0, 4.0]), torch.tensor([0.0, 1.0, 1.0]))
    tensor([4.4037e-06, 4.3322e-02, 1.4679e-06])
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    given = input, target, alpha, gamma, reduction
    return serve(losses.sigmoid_focal_loss, (input, target), (alpha, gamma, reduction, None, None), composed.sigmoid_focal_loss, given)


for _function in (cross_entropy, nll_loss, binary_cross_entropy_with_logits, binary_cross_entropy):
    scripted_as_torchs(_function)
