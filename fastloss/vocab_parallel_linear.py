"""The last layer and its loss in one, where the layer's classes are sharded over the ranks of a process group."""

from typing import Any

import torch
from torch import Tensor

from . import losses, sharded
from .arguments import tensors_misfit
from .backends import BackendError, get_backend
from .chunks import stand_in
from .linear import products_of, refuse_softcap
from .loss import COMPUTE
from .routing import ANY, Route, route
from .serving import by_kernels, result_dtype
from .vocab_parallel import wrong_options

NAME = "vocab_parallel_linear_cross_entropy"


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduce_input_gradient: bool = True,
) -> Tensor:
    """`vocab_parallel_cross_entropy` of the logits input W^T + b, of which only a chunk of rows is ever in memory.

    All ranks of the group call it together, with the same input and their slices of the layer, and get the same loss, to the bit. Going
    forward there is one all_gather, of 12 to 20 bytes a row; the backward makes the logits again, so there are four matrix products and
    not three, and one all_reduce of the input's gradient. The gradient cannot be differentiated again.

    Args:
        input: (..., D), float32, float64, bfloat16 or float16, any strides, the same on every rank.
        linear_weight: W, (C_r, D), dtype of `input` (under autocast any): this rank's classes, at least one.
        target: class indices among the classes of all ranks (...), int64 or uint8, the same on every rank.
        group, vocab_start: as in `vocab_parallel_cross_entropy`.
        linear_bias: b, (C_r,).
        weight: (C_r,): the weights of this rank's classes. Not that of the layer.
        reduction, ignore_index, label_smoothing: as in `vocab_parallel_cross_entropy`. Ignored rows cost nothing on CPU.
        logit_scale, logit_softcap: as in `linear_cross_entropy`.
        reduce_input_gradient: whether the input's gradient is added over the ranks. False leaves each rank with what its slice gives,
            for sequence parallelism, which wants a reduce_scatter instead, or where whatever made the input adds gradients by itself.

    Returns:
        The loss, () or (...), in the dtype of `input` (float32 under autocast).

    Raises: what `vocab_parallel_cross_entropy` raises.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # one rank has all classes here
    >>> x, head = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> vocab_parallel_linear_cross_entropy(x, head, torch.tensor([2, 0]))
    tensor(0.5627)
    >>> dist.destroy_process_group()
    """
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} must be a Tensor, got {type(tensor).__name__}")
    loss: Any = losses.vocab_parallel_linear_cross_entropy
    compiling, group_name = torch.compiler.is_compiling(), "" if group is None else group.group_name
    misfit = tensors_misfit(input, linear_weight, target, optional=(linear_bias, weight))
    try:
        if misfit is not None:
            raise RuntimeError(f"{NAME}: {misfit}")
        error = wrong_options(NAME, vocab_start, reduction, ignore_index, label_smoothing)
        if error is not None:
            raise error
        refuse_softcap(logit_softcap)
        if target.shape != input.shape[:-1]:
            raise ValueError(f"{NAME}: target must have shape {tuple(input.shape[:-1])}, like input without D, got {tuple(target.shape)}")
        products = products_of(input)
        t = loss.tensors(input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, target.reshape(-1), weight)
        first = -1 if vocab_start is None else vocab_start
        o = loss.options(
            first, ignore_index, label_smoothing, logit_scale, logit_softcap or 0.0, 0, products, COMPUTE[products], reduction,
            result_dtype(input), group_name, reduce_input_gradient,
        )  # fmt: skip
        misfit = loss.misfit(t, o)
        way = route(misfit, input if misfit is not None else stand_in(t, input.dtype), ANY)
        if misfit is not None:
            raise ValueError(f"{NAME}: {misfit}")
        if way.path == "torch" and get_backend() not in ("auto", "torch"):
            raise BackendError(f"{NAME}: backend {get_backend()!r} was chosen, but {way.reason}")
    except Exception as error:
        if compiling:
            raise
        sharded.refuse(NAME, error, group_name, input.device)
    result: Tensor = by_kernels(Route(way.backend, "op" if compiling else "kernel", way.reason), loss, t, o)
    return result.reshape(target.shape) if reduction == "none" else result
