"""Losses of a linear layer's logits, and what else is asked of them, without the logits: the last layer of a classifier or a language model
and its loss in one.

Calls that the kernels do not serve go to torch, which makes all logits (`fastloss.explain` tells which and why).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import composed, losses
from .arguments import autocast_is_active, is_int64, reduction_misfit, tensors_misfit
from .chunks import stand_in
from .loss import COMPUTE, Worth
from .routing import route, served_by_torch
from .serving import by_kernels, result_dtype
from .statistics import USUAL, TokenStatistics, checked_dim, checked_outputs, chosen

_WORTH = Worth(4.0, 4.0)  # beside the layer's products, what torch takes longer for fewer logits is not worth a call of ours


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
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """`cross_entropy` of the logits input W^T + b, of which only a chunk of rows is ever in memory, with the gradients of all three.

    Source: torch.nn.functional.linear_cross_entropy (torch 2.13), whose arguments these are, and two more. With torch the class dimension
    of the logits is the first after the rows: (N, C) or (N, C, d1, ...). What torch has not: input of more than two dimensions.

    Args:
        input: (D,), (N, D), or (..., D) for a two-dimensional `linear_weight`; float32, float64, bfloat16 or float16, any strides.
        linear_weight: W, (C, D) or (C, d1, ..., D), dtype of `input` (under autocast any).
        target: class indices, () or (N,) or (N, d1, ...), or (...) for input (..., D), int64 or uint8; or class probabilities, the shape
            of the logits (for input (..., D): (..., C)) and the dtype of `input`.
        linear_bias: b, the shape of `linear_weight` without D.
        weight: (C,): the weight of every class. Not that of the layer.
        reduction: 'none', 'sum', or 'mean': over the weights of the rows for class indices, over their number for probabilities.
        ignore_index: rows with this class index count for nothing, and on CPU cost nothing; None is -100.
        label_smoothing: in [0, 1]; how much of the target is spread evenly over all classes.
        options: torch.nn.LinearCrossEntropyOptions, of which `batch_chunk_size` and `acc_dtype` mean something here; None computes in
            chunks too, as many rows at a time as `config.linear_chunk_bytes` has room for.
        logit_scale: what the logits are multiplied by.
        logit_softcap: cap of the scaled logits: cap tanh(logits / cap).

    Returns:
        The loss, () or the shape of the class indices, in the dtype of `input` (float32 under autocast).

    Raises:
        IndexError: on CPU, a class index that is no class. On CUDA the loss of that row is NaN: a check would stall the device.
        ValueError: logit_softcap that is not positive.
        Whatever torch raises, for all else.

    >>> x, head = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> linear_cross_entropy(x, head, torch.tensor([2, 0]))
    tensor(0.5627)
    """
    refuse_softcap(logit_softcap)
    loss: Any = losses.linear_cross_entropy
    t: Any = None
    o: Any = None
    misfit = tensors_misfit(input, linear_weight, target, optional=(linear_bias, weight)) or reduction_misfit(None, None, reduction)
    if misfit is None:
        x, y = _two_dimensional(input, linear_weight, target)
        products = products_of(input)
        chunk_rows, sums, misfit = _wishes(options, products)
        shared = logit_scale, logit_softcap or 0.0, chunk_rows, products, sums, reduction, result_dtype(input)
        if y.is_floating_point():
            loss, o = losses.linear_soft_cross_entropy, losses.linear_soft_cross_entropy.options(label_smoothing, *shared)
            misfit = misfit or (None if ignore_index is None else f"ignore_index is {ignore_index!r} for class probabilities")
        else:
            o = loss.options(-100 if ignore_index is None else ignore_index, label_smoothing, *shared)
        t = loss.tensors(x, linear_weight, linear_bias, y, weight)
        misfit = misfit or loss.misfit(t, o)
    logits = input if misfit is not None else stand_in(t, input.dtype)
    way = route(misfit, logits, _WORTH, _meaningless(options))
    if way.path == "torch":
        theirs = composed.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
        )
        return served_by_torch("linear_cross_entropy", way, theirs)
    result: Tensor = by_kernels(way, loss, t, o)
    return result.reshape(input.shape[:-1]) if reduction == "none" and input.dim() > 2 else result


def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    outputs: Sequence[str] = USUAL,
) -> TokenStatistics:
    """`token_statistics` of the logits input W^T + b, of which only a chunk of rows is ever in memory, with the gradients of all three.

    For reinforcement learning: log-probabilities of tokens, entropies and lse from a model's last hidden states. The backward makes
    the logits again.

    Args:
        input: (..., D), float32, float64, bfloat16 or float16, any strides.
        linear_weight: W, (C, D), dtype of `input` (under autocast any).
        target: class indices: (...), or K of them for each row, (..., K). Without it there is no log_prob.
        linear_bias: b, (C,).
        ignore_index: a target with this number has log_prob 0. A row without any other target counts for nothing, and on CPU costs nothing:
            all its results are 0, its input is not looked at and gets a zero gradient.
        logit_scale: 1 / temperature.
        logit_softcap: cap of the scaled logits: cap tanh(logits / cap).
        outputs: which results are wanted, of 'log_prob', 'entropy', 'lse', 'sum_sq_prob', 'argmax'.

    Returns:
        A TokenStatistics. log_prob has the shape of `target`, the others that of `input` without D. float32, float64 for float64; argmax
        int64.

    Raises:
        ValueError: an unknown output, 'log_prob' asked for without a target, a target whose shape does not fit, or a logit_softcap that is
            not positive.
        IndexError: on CPU, a target is no class. On CUDA log_prob and gradient of that row are NaN.
        RuntimeError: a target that does not hold integers; shapes or dtypes that make no linear layer.

    >>> x, head = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> found = linear_token_statistics(x, head, torch.tensor([2, 0]), outputs=("log_prob", "argmax"))
    >>> found.log_prob, found.argmax
    (tensor([-0.4076, -0.7177]), tensor([2, 0]))
    """
    names = checked_outputs(outputs, target)
    _refuse_misfits(input, linear_weight, target, linear_bias, logit_softcap)
    loss: Any = losses.linear_token_statistics
    t: Any = None
    o: Any = None
    misfit = tensors_misfit(input, linear_weight, optional=(linear_bias, target))
    if misfit is None:
        x, y, products = *_by_row(input, target), products_of(input)
        t = loss.tensors(x, linear_weight, linear_bias, y)
        sums = COMPUTE.get(products, products)
        o = loss.options(ignore_index, logit_scale, logit_softcap or 0.0, 0, products, sums, result_dtype(input), " ".join(names))
        misfit = loss.misfit(t, o)
    way = route(misfit, input if misfit is not None else stand_in(t, input.dtype), _WORTH)
    if way.path == "torch":
        theirs = composed.linear_token_statistics(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            wanted=" ".join(names),
        )
        return chosen(served_by_torch("linear_token_statistics", way, theirs), names, target)
    log_prob, *others = chosen(by_kernels(way, loss, t, o), names, target)
    if log_prob is not None and target is not None:
        log_prob = log_prob.reshape(target.shape)
    return TokenStatistics(log_prob, *(None if answer is None else answer.reshape(input.shape[:-1]) for answer in others))


def _refuse_misfits(
    input: Tensor, linear_weight: Tensor, target: Tensor | None, linear_bias: Tensor | None, logit_softcap: float | None
) -> None:
    refuse_softcap(logit_softcap)
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(tensor, Tensor) and not (name == "linear_bias" and tensor is None):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if linear_weight.dim() != 2:
        raise RuntimeError(f"linear_weight must have shape (C, D), got {tuple(linear_weight.shape)}")
    composed.refuse_shapes(input, linear_weight, linear_bias)
    checked_dim(input, target, -1)  # the rows are those of the logits


def refuse_softcap(logit_softcap: float | None) -> None:
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive or None, got {logit_softcap!r}")


def _by_row(input: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(N, D), and (N,) or (N, K)."""
    x = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
    return x, None if target is None else target.reshape(len(x), *target.shape[input.dim() - 1 :])


def _two_dimensional(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) and its target with one dimension of rows, where they fit."""
    rows = input.shape[:-1]
    if input.dim() > 2 and linear_weight.dim() == 2:
        if target.shape == rows and not target.is_floating_point():
            return input.flatten(0, -2), target.reshape(-1)
        if target.shape == (*rows, linear_weight.shape[0]) and target.is_floating_point():
            return input.flatten(0, -2), target.flatten(0, -2)
    return input, target


def products_of(input: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's, but float64 stays what it is."""
    autocast = autocast_is_active(input) and input.dtype is not torch.float64
    return torch.get_autocast_dtype(input.device.type) if autocast else input.dtype


def _wishes(options: Any, products: torch.dtype) -> tuple[int, torch.dtype, str | None]:
    """What torch's options say of the rows of a chunk (0: nothing) and of the dtype of sums; and what torch is to refuse."""
    compute = COMPUTE.get(products, products)
    if options is None:
        return 0, compute, None
    rows, method = getattr(options, "batch_chunk_size", None), getattr(options, "chunking_method", None)
    sums = getattr(options, "acc_dtype", None) or compute
    misfit = None if rows is None or is_int64(rows) else f"options.batch_chunk_size is {rows!r}"
    if rows is not None and method not in (None, "auto"):
        misfit = "options.batch_chunk_size and options.chunking_method may give different chunk sizes"
    return rows or 0, sums, misfit


def _meaningless(options: Any) -> str:
    """Which of torch's options were set and mean nothing here."""
    defaults = {"allow_retain_graph": False, "chunking_method": "auto", "acc_policy": "auto"}
    found = [name for name, default in defaults.items() if getattr(options, name, default) not in (default, None)]
    return f"; options: {', '.join(found)} means nothing here" if found else ""
