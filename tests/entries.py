"""Sparse soft targets for tests: made at random, and as the dense target that they stand for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers import Tensors, assert_no_worse, copy_of, kernel_call
from torch import Tensor

PAD = -100


def by_entry(probabilities: Tensor, indices: Tensor) -> Tensor:
    """A (K,) tensor is one number for each entry, whatever the positions."""
    if probabilities.dim() == 1 and indices.dim() > 2 and probabilities.shape[0] == indices.shape[1]:
        probabilities = probabilities.view(-1, *(1,) * (indices.dim() - 2))
    return probabilities.expand(indices.shape)


def dense(input: Tensor, indices: Tensor, probabilities: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """What the entries stand for."""
    prob = torch.where(indices == PAD, 0.0, by_entry(probabilities, indices)).to(input.dtype)
    dim = min(1, input.dim() - 1)
    target = torch.zeros_like(input).scatter_add(dim, indices.clamp(min=0), prob)
    return F.cross_entropy(input, target, weight, **options)


def sparse(**arguments: Any) -> Tensor:
    return kernel_call("sparse_soft_cross_entropy", **arguments)


def results(call: Callable[..., Tensor], tensors: Tensors, views: Any = None, **options: Any) -> list[Tensor]:
    """Value and gradients of logits and probabilities, under a random upstream gradient."""
    leaves = {k: None if t is None else copy_of(t).requires_grad_(k in ("input", "probabilities")) for k, t in tensors.items()}
    value = call(**{k: None if t is None else (views or {}).get(k, lambda leaf: leaf)(t) for k, t in leaves.items()}, **options)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, [leaves["input"], leaves["probabilities"]], upstream)]


def check(tensors: Tensors, views: Any = None, **options: Any) -> None:
    """What cancels in a gradient is as large as dloss sum_k q_k."""
    scale = 3.0 + tensors["indices"].shape[min(1, tensors["indices"].dim() - 1)]
    wide = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in tensors.items()}
    found = (results(call, t, views, **options) for call, t in ((sparse, tensors), (dense, tensors), (dense, wide)))
    for what, mine, other, truth in zip(("value", "dinput", "dprobabilities"), *found, strict=True):
        assert_no_worse(mine, other, truth, f"{what} {options}", ulps=8, scale=scale if what == "dinput" else 0.0)


def make(shape: tuple[int, ...], count: int, dtype: torch.dtype, weighted: bool = False) -> Tensors:
    """Some entries are padding, some classes come twice, the last one comes."""
    indices = torch.randint(shape[1], (shape[0], count, *shape[2:]))
    indices[torch.rand(indices.shape) < 0.2] = PAD
    indices.view(-1)[-1:] = shape[1] - 1
    if count > 1:
        indices[0, 1] = indices[0, 0]
    return {
        "input": (torch.randn(shape) * 3).to(dtype),
        "indices": indices,
        "probabilities": torch.rand(indices.shape).to(dtype),
        "weight": (torch.rand(shape[1]) + 0.1).to(dtype) if weighted else None,
    }
