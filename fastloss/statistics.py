"""What losses, reinforcement learning and evaluation ask of logits besides the cross-entropy, in one visit to them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import composed, losses, sharded
from .arguments import is_int64, tensors_misfit
from .losses.token_statistics import belongs, positions
from .routing import ANY, Route, route, served_by_torch, tiny
from .serving import by_kernels

USUAL = ("log_prob", "entropy", "lse")


class TokenStatistics(NamedTuple):
    """One number for each row of logits, None for what was not asked for.

    >>> import torch
    >>> TokenStatistics(log_prob=None, entropy=None, lse=torch.tensor([0.5]), sum_sq_prob=None, argmax=None).lse
    tensor([0.5000])
    """

    log_prob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    sum_sq_prob: Tensor | None
    argmax: Tensor | None


def token_statistics(
    input: Tensor,
    target: Tensor | None = None,
    *,
    dim: int = -1,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = USUAL,
    group: Any = None,
) -> TokenStatistics:
    """Log-probabilities, entropy and more of each row of logits, from one visit to them going forward and one coming back.

    With z = logit_scale * input and p = softmax(z) along `dim`: log_prob = log p at the targets, entropy = -sum p log p,
    lse = log sum exp(z), sum_sq_prob = sum p^2, argmax = the class of the largest logit. All but argmax can be differentiated; what is not
    asked for, or gets no gradient, costs nothing.

    Args:
        input: logits of any shape, float32, float64, bfloat16 or float16, any strides.
        target: class indices: one for each row, the shape of `input` without `dim`; or K of them, the same shape and (K,) behind it.
            Without it there is no log_prob.
        dim: the dimension of the classes.
        ignore_index: a target with this number has log_prob 0. A row without any other target counts for nothing: all its results are 0,
            its logits are not looked at and get a zero gradient.
        logit_scale: 1 / temperature.
        outputs: which results are wanted, of 'log_prob', 'entropy', 'lse', 'sum_sq_prob', 'argmax'.
        group: a process group of torch.distributed over whose ranks the classes are sharded, in rank order: `input` is this rank's slice,
            `target` has indices among all classes and is the same on every rank, as the results are, to the bit. One all_gather, as in
            `vocab_parallel_cross_entropy`, whose errors it has, too. None: all classes are here.

    Returns:
        A TokenStatistics. log_prob has the shape of `target`, the others that of `input` without `dim`. float32, float64 for float64;
        argmax int64.

    Raises:
        ValueError: an unknown output, 'log_prob' asked for without a target, or a target whose shape does not fit.
        IndexError: `dim` is no dimension; on CPU, a target is no class. On CUDA log_prob and gradient of that row are NaN.
        RuntimeError: a target that does not hold integers.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]], requires_grad=True)
    >>> found = token_statistics(logits, torch.tensor([2, 0]), outputs=("log_prob", "entropy", "argmax"))
    >>> found.log_prob.detach(), found.entropy.detach(), found.argmax
    (tensor([-0.4076, -0.5514]), tensor([0.8324, 0.9753]), tensor([2, 0]))
    >>> (-found.log_prob.mean() - 0.01 * found.entropy.mean()).backward()  # cross-entropy with an entropy bonus
    >>> logits.grad
    tensor([[ 0.0443,  0.1217, -0.1660],
            [-0.2107,  0.1054,  0.1054]])
    """
    if group is not None:
        return sharded_token_statistics(input, target, dim, ignore_index, logit_scale, outputs, group)
    loss: Any = losses.token_statistics
    names = checked_outputs(outputs, target)
    dim = checked_dim(input, target, dim)
    theirs = partial(composed.token_statistics, input, target, dim, ignore_index, logit_scale, " ".join(names))
    if tiny(input):
        return chosen(theirs(), names, target)
    t: Any = None
    o: Any = None
    misfit = tensors_misfit(input, optional=(target,))
    if misfit is None:
        t, o = loss.tensors(input, target), loss.options(dim, ignore_index, logit_scale, " ".join(names))
        misfit = loss.misfit(t, o)
    way = route(misfit, input)
    found = served_by_torch("token_statistics", way, theirs()) if way.path == "torch" else by_kernels(way, loss, t, o)
    return chosen(found, names, target)


def sharded_token_statistics(
    input: Tensor, target: Tensor | None, dim: int, ignore_index: int, logit_scale: float, outputs: Sequence[str], group: Any
) -> TokenStatistics:
    """The same where the ranks of a group have some of the classes each."""
    loss: Any = losses.vocab_parallel_token_statistics
    compiling, misfit = torch.compiler.is_compiling(), tensors_misfit(input, optional=(target,))
    try:
        names = checked_outputs(outputs, target)
        dim = checked_dim(input, target, dim)
        t, o = loss.tensors(input, target), loss.options(dim, ignore_index, logit_scale, " ".join(names), group.group_name)
        misfit = misfit or loss.misfit(t, o)
        way = route(misfit, input, ANY)
        if misfit is not None:
            raise RuntimeError(f"token_statistics: {misfit}")
    except Exception as error:
        if compiling or not isinstance(input, Tensor):
            raise
        sharded.refuse("token_statistics", error, group.group_name, input.device)
    return chosen(by_kernels(Route(way.backend, "op" if compiling else "kernel", way.reason), loss, t, o), names, target)


def chosen(found: Sequence[Tensor], names: tuple[str, ...], target: Tensor | None) -> TokenStatistics:
    wanted = set(names) - ({"log_prob"} if target is None else set())
    return TokenStatistics(*(answer if name in wanted else None for name, answer in zip(TokenStatistics._fields, found, strict=False)))


def checked_outputs(outputs: Sequence[str], target: Tensor | None) -> tuple[str, ...]:
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for name in names:
        if name not in TokenStatistics._fields:
            raise ValueError(f"outputs must be some of {', '.join(TokenStatistics._fields)}, got {name!r}")
    if target is None and "log_prob" in names and names != USUAL:
        raise ValueError("outputs: 'log_prob' needs a target, got none")
    return names


def checked_dim(input: Tensor, target: Tensor | None, dim: int) -> int:
    """`dim`, not negative. The target must fit."""
    for name, tensor in (("input", input), ("target", target)):
        if not isinstance(tensor, Tensor) and not (name == "target" and tensor is None):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    dims = input.dim()
    if not is_int64(dim) or not -dims <= dim < dims:
        raise IndexError(f"dim must be a dimension of the logits, in [{-dims}, {dims - 1}], got {dim!r}")
    dim %= dims
    if target is None:
        return dim
    if not belongs(target, input, dim):
        rows = ", ".join(map(str, positions(input, dim)))
        raise ValueError(f"target must have shape ({rows}) or ({rows}, K), like the logits without dim {dim}, got {tuple(target.shape)}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise RuntimeError(f"target must hold class indices, got {target.dtype}")
    return dim
