"""What the losses over single numbers have in common: their tensors as [A, B, P], which is what the kernels know, and the arithmetic
around the kernels. Views only, unless strides leave no choice."""

from functools import lru_cache

import torch
from torch import Tensor

from .loss import COMPUTE, Spec, compute_dtype
from .rows import ones, quotient
from .storage import present


def loss_spec(like: Tensor, reduction: str, dtype: torch.dtype) -> Spec:
    """The loss: a number, or for 'none' one each, with the strides that torch's result has, those of `like`."""
    return Spec(tuple(like.shape), dtype, like) if reduction == "none" else Spec((), dtype)


def as_elements(first: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors broadcast to the shape of the first, as [A, B, P] with its smallest stride along P; None is a one for each element."""
    shape, dims = first.shape, first.dim()
    everything = [first, *(t.expand(shape) for t in others if t is not None)]
    flat = (1, 1, first.numel())
    if all(t.is_contiguous() or t.stride() == (0,) * dims for t in everything):
        found = [t.view(flat) if t.is_contiguous() else t.as_strided(flat, (0, 0, 0)) for t in everything]
        return _with_ones(found, others)
    if not first.is_contiguous() and 0 not in first.stride():
        order = tuple(sorted(range(dims), key=lambda d: -first.stride()[d]))
        everything = [t.permute(order) for t in everything]
    sizes = _merged(everything[0].shape, [t.stride() for t in everything])
    if len(sizes) > 3:  # no view will do: copies, in the order of the call
        return _with_ones([t.expand(shape).contiguous().view(flat) for t in (first, *others) if t is not None], others)
    target = (*(1,) * (3 - len(sizes)), *sizes)
    return _with_ones([t.reshape(target) for t in everything], others)


def _with_ones(found: list[Tensor], others: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    first, rest = found[0], iter(found[1:])
    return (first, *(ones(1, compute_dtype(first), first.device).expand(first.shape) if t is None else next(rest) for t in others))


def _merged(shape: torch.Size, strides: list[tuple[int, ...]]) -> list[int]:
    """The sizes that are left when neighbouring dimensions are merged wherever that is one stride for every tensor."""
    sizes: list[int] = []
    inner: list[int] = []
    for d in reversed(range(len(shape))):
        if shape[d] == 1:
            continue
        here = [s[d] for s in strides]
        if sizes and all(h == i * sizes[-1] for h, i in zip(here, inner, strict=True)):
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
            inner = here
    return sizes[::-1] or [1]


def computed(weight: Tensor, first: Tensor) -> Tensor:
    """A weight [A, B, P] in the compute dtype, cast without what is broadcast, which would otherwise be written out; or in a dtype that
    kernels compute with in that, where nothing is broadcast and a cast would be a copy of it all."""
    whole = all(stride or size < 2 for stride, size in zip(weight.stride(), weight.shape, strict=True))
    if weight.dtype == compute_dtype(first) or (whole and COMPUTE.get(weight.dtype) == compute_dtype(first)):
        return weight
    once = present(weight.detach(), "weight")[tuple(slice(1) if stride == 0 else slice(None) for stride in weight.stride())]
    return once.to(compute_dtype(first)).expand(first.shape)


def element_gradient(dloss: Tensor, reduction: str, first: Tensor) -> Tensor:
    """The gradient of every element's loss, broadcastable to the shape of `first`: as it is where there is one for each, else one number
    in the compute dtype."""
    dloss = present(dloss, "the upstream gradient")
    if reduction == "none":
        return dloss
    dloss = dloss.to(compute_dtype(first))
    return quotient(dloss, _count(first.numel(), dloss.dtype)) if reduction == "mean" else dloss


@lru_cache(64)
def _count(count: int, dtype: torch.dtype) -> Tensor:
    """On CPU: beside a tensor elsewhere torch takes one number from there as it takes Python's."""
    return torch.full((), count, dtype=dtype, device="cpu")


def gradient_ahead(dloss: float, reduction: str, dtype: torch.dtype, first: Tensor) -> Tensor:
    """The same for an upstream gradient that has not come yet, and so a constant; `dtype` is the loss's, `first` is [A, B, P]."""
    number = torch.full((), dloss, dtype=dtype, device=first.device).to(compute_dtype(first))
    return (number / first.numel() if reduction == "mean" else number).expand(first.shape)


def count_of(first: Tensor, reduction: str) -> int:
    """What the sum of the losses is divided by."""
    return first.numel() if reduction == "mean" else 1


def place_of_total(loss: Tensor, first: Tensor) -> Tensor:
    """Where the kernels write the loss: itself, unless it is to be rounded."""
    compute = compute_dtype(first)
    return loss if loss.dtype is compute else torch.empty((), dtype=compute, device=loss.device)


def put_total(total: Tensor, loss: Tensor) -> None:
    if total is not loss:
        loss.copy_(total)
