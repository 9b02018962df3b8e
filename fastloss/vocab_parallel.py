"""Losses whose classes are sharded over the ranks of a process group of torch.distributed: each has the logits of its own slice.

How it works, what it costs and when to use it: docs/distributed.md.
"""

from typing import Any

import torch
from torch import Tensor

from . import losses, sharded
from .arguments import REDUCTIONS, is_int64, tensors_misfit
from .backends import BackendError, get_backend
from .loss import COMPUTE
from .routing import ANY, Route, route
from .serving import by_kernels, result_dtype

NAME = "vocab_parallel_cross_entropy"


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`cross_entropy` of logits whose classes are sharded over ranks: every rank has some of the classes of all rows.

    All ranks of the group call it together and get the same loss, to the bit, and each the gradient of its own slice. They tell one another
    three numbers of every row in one all_gather going forward (four where something is smoothed or targets are probabilities, one more
    with class weights for class indices), and nothing coming back. The gradient cannot be differentiated again.

    Args:
        input: this rank's slice of the logits, (C_r,), (N, C_r) or (N, C_r, d1, ...), float32, float64, bfloat16 or float16, any strides.
            Slices may differ in size, and be empty.
        target: class indices among the classes of all ranks, the same on every rank: () or (N,) or (N, d1, ...), int64 or uint8. Or this
            rank's slice of class probabilities, shape and dtype of `input`.
        group: a process group of torch.distributed; None is the default group.
        vocab_start: this rank's first class. Slices must lie side by side from 0 on. None: after the classes of the ranks before it.
        weight: (C_r,), as `input` of float64 or not: the weights of this rank's classes.
        reduction: 'none', 'sum', or 'mean': over the weights of the rows for class indices, over their number for probabilities.
        ignore_index: rows with this class index count for nothing.
        label_smoothing: in [0, 1]; how much of the target is spread evenly over all classes of all ranks.

    Returns:
        The loss, () or the shape of the class indices, in the dtype of `input` (float32 for half precision under autocast).

    Raises:
        IndexError: on CPU, on every rank, a class index that is on no rank. On CUDA the loss of that row is NaN.
        RuntimeError: ranks that disagree about rows, targets, dtype, options or slices, with the same words on every rank; or another
            rank refused its arguments.
        TypeError, ValueError: an argument of the wrong kind or value.
        What torch raises where a rank does not come: after the group's timeout.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # one rank has all classes here
    >>> logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = vocab_parallel_cross_entropy(logits, torch.tensor([2, 0]))
    >>> print(f"{loss.item():.4f}")
    0.4795
    >>> dist.destroy_process_group()
    """
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        raise TypeError(f"{NAME}: input and target must be Tensors, got {type(input).__name__} and {type(target).__name__}")
    first, group_name = -1 if vocab_start is None else vocab_start, "" if group is None else group.group_name
    misfit = tensors_misfit(input, target, optional=(weight,))
    loss: Any = losses.vocab_parallel_cross_entropy
    error: Exception | None = None
    t: Any = None
    o: Any = None
    if misfit is None:
        error = wrong_options(NAME, vocab_start, reduction, ignore_index, label_smoothing)
    elif not isinstance(weight, Tensor | None) or input.dtype not in COMPUTE:
        error = TypeError(f"{NAME}: {misfit}")
    else:
        error = RuntimeError(f"{NAME}: {misfit}")
    if error is None:
        dtype = result_dtype(input)
        if target.is_floating_point():
            loss = losses.vocab_parallel_soft_cross_entropy
            o = loss.options(first, label_smoothing, reduction, dtype, group_name)
        else:
            o = loss.options(first, ignore_index, label_smoothing, reduction, dtype, group_name)
        t = loss.tensors(input, target, weight)
        problem = loss.misfit(t, o)
        if problem is not None:
            error = (TypeError if "torch." in problem else ValueError)(f"{NAME}: {problem}")
    way = route(None if error is None else str(error), input, ANY)
    if error is None and way.path == "torch" and get_backend() not in ("auto", "torch"):
        error = BackendError(f"{NAME}: backend {get_backend()!r} was chosen, but {way.reason}")
    if error is not None:
        if torch.compiler.is_compiling():
            raise error
        sharded.refuse(NAME, error, group_name, input.device)
    result: Tensor = by_kernels(Route(way.backend, "op" if torch.compiler.is_compiling() else "kernel", way.reason), loss, t, o)
    return result


def wrong_options(name: str, vocab_start: Any, reduction: Any, ignore_index: Any, label_smoothing: Any) -> Exception | None:
    """What the functions over sharded classes refuse of their options."""
    if vocab_start is not None and (not is_int64(vocab_start) or vocab_start < 0):
        return ValueError(f"{name}: vocab_start must be the number of this rank's first class, 0 or more, or None, got {vocab_start!r}")
    if reduction not in REDUCTIONS:
        return ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not is_int64(ignore_index):
        return TypeError(f"{name}: ignore_index must be an int, got {ignore_index!r}")
    if not isinstance(label_smoothing, (float, int)) or not 0 <= label_smoothing <= 1:
        return ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing!r}")
    return None
