"""torch's guard of compiled programs, in C++: one question of all tensors of a call, instead of Python's many of each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor


class _Absent(Tensor):
    """What nobody else passes."""


# a guard wants tensors, each another
_ABSENT: tuple[Tensor, ...] = tuple(torch.empty(0, device="cpu").as_subclass(_Absent) for _ in range(8))


def askable(tensors: tuple[Any, ...]) -> list[Tensor]:
    """The tensors, and one for each that is absent; none at all if one of them has no shape, which would end the process."""
    found = []
    for t, absent in zip(tensors, _ABSENT, strict=False):
        if t is None:
            found.append(absent)
        elif (type(t) is Tensor or type(t) is torch.nn.Parameter) and not t.is_nested:
            found.append(t)
        else:
            return []
    return found


def guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """Whether tensors have the types, shapes, strides, dtypes and dispatch keys of these under the modes of this thread, and want gradients
    as they do, by torch's own function for compiled programs; None if this torch has no such function."""
    try:
        made: Any = _C._dynamo.guards.TensorGuards
    except AttributeError:
        return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    fits: Callable[..., bool] = made(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return fits
