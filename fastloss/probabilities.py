"""softmax and log_softmax, with the signatures and the behaviour of torch.nn.functional."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses
from .arguments import autocast_is_active, is_int64, tensors_misfit
from .calls import THEIRS, recall
from .loss import COMPUTE
from .operation import apply_again
from .routing import route, tiny
from .serving import by_kernels, by_torch, scripted_as_torchs


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum of exp(input) along `dim`.

    Source: torch.nn.functional.softmax, whose arguments these are.

    Args:
        input: any shape, float32, float64, bfloat16 or float16, any strides.
        dim: the dimension along which the result sums to 1.
        dtype: what `input` is cast to first; float32 of half precision without a copy.

    Returns:
        A tensor of the shape of `input`, in `dtype` or its own (float32 for half precision under autocast on CUDA, as torch has it).
        Raises what torch raises.

    >>> softmax(torch.tensor([1.0, 2.0, 3.0]), dim=0)
    tensor([0.0900, 0.2447, 0.6652])
    """
    theirs = partial(F.softmax, input, dim, _stacklevel + 2, dtype)
    return _along(losses.softmax, input, dim, dtype, theirs)


def log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """input - log(sum of exp(input)) along `dim`.

    Source: torch.nn.functional.log_softmax, whose arguments these are.

    Args:
        input: any shape, float32, float64, bfloat16 or float16, any strides.
        dim: the dimension along which the exponentials of the result sum to 1.
        dtype: what `input` is cast to first; float32 of half precision without a copy.

    Returns:
        A tensor of the shape of `input`, in `dtype` or its own (float32 for half precision under autocast on CUDA, as torch has it).
        Raises what torch raises.

    >>> log_softmax(torch.tensor([1.0, 2.0, 3.0]), dim=0)
    tensor([-2.4076, -1.4076, -0.4076])
    """
    theirs = partial(F.log_softmax, input, dim, _stacklevel + 2, dtype)
    return _along(losses.log_softmax, input, dim, dtype, theirs)


def _along(loss: Any, input: Tensor, dim: int | None, dtype: torch.dtype | None, theirs: Callable[[], Tensor]) -> Tensor:
    """softmax or log_softmax."""
    if tiny(input, loss.worth):
        return theirs()
    kind, call = recall(loss.name, (input,), (dim, dtype))
    if call is not None:
        return theirs() if call is THEIRS else apply_again(call, (_cast(input, dtype),))
    way = route(_softmax_misfit(input, dim, dtype), input, loss.worth)
    if way.path == "torch" or dim is None:
        return by_torch(way, loss.name, theirs(), kind)
    given = _cast(input, dtype)
    o = loss.options(dim % input.dim(), _result_dtype(given, dtype), given.dtype)
    result: Tensor = by_kernels(way, loss, loss.tensors(given), o, kind)
    return result


def _cast(input: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The input in the dtype that is asked for; in its own where the kernels widen what they read."""
    return input if dtype is None or COMPUTE[input.dtype] == dtype else input.to(dtype)


def _result_dtype(input: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    half = input.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and input.is_cuda and autocast_is_active(input) else input.dtype  # autocast has no rule for CPU


def _exporting() -> bool:
    return torch.compiler.is_exporting() if hasattr(torch.compiler, "is_exporting") else False


def _softmax_misfit(input: Any, dim: Any, dtype: Any) -> str | None:
    if not is_int64(dim):
        return f"dim is {dim!r}"
    misfit = tensors_misfit(input)
    if misfit is not None:
        return misfit
    if not -input.dim() <= dim < input.dim():
        return f"dim {dim} is not a dimension of logits of shape {tuple(input.shape)}"
    if _exporting():
        return "an exported program is to run where fastloss is not installed"
    return f"there are no kernels for {dtype}" if dtype is not None and dtype not in COMPUTE else None


for _function in (softmax, log_softmax):
    scripted_as_torchs(_function)
