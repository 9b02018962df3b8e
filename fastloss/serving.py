"""From a public function's arguments to its result: by our kernels, as an op where a compiler is watching, or by torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arguments import autocast_is_active, reduction_misfit, tensors_misfit
from .calls import THEIRS, Call, Kind, recall, remember
from .loss import Loss, each
from .operation import apply, apply_again
from .ops import OPS
from .routing import Route, route, served_by_torch, tiny

AnyLoss = Loss[Any, Any, Any]


def serve(loss: AnyLoss, tensors: Any, options: Any, theirs: Callable[..., Tensor], given: tuple[Any, ...]) -> Tensor:
    """The result of a loss that has one function in torch, `theirs`, which takes the arguments as `given`. `options` are the loss's, its
    reduction last, but for the dtype of the result; and after them size_average and reduce, which are deprecated."""
    worth = loss.worth.of(options[-3])
    if tiny(tensors[0], worth):
        return theirs(*given)
    kind, call = recall(loss.name, tensors, options)
    if call is not None:
        return theirs(*given) if call is THEIRS else apply_again(call, tensors)  # type: ignore[no-any-return]
    t: Any = loss.tensors(*tensors)
    o: Any = None
    misfit = tensors_misfit(*tensors[: loss.required], optional=tensors[loss.required :])
    if misfit is None:
        named: Any = loss.options
        *ours, size_average, reduce = options
        o = named(*ours, result_dtype(*(t[i] for i in loss.typed_by)))
        misfit = reduction_misfit(size_average, reduce, o.reduction) or loss.misfit(t, o) or loss.mixture_misfit(t)
    way = route(misfit, tensors[0], worth)
    result: Tensor = by_torch(way, theirs.__name__, theirs(*given), kind) if way.path == "torch" else by_kernels(way, loss, t, o, kind)
    return result


def by_torch(way: Route, name: str, result: Tensor, kind: Kind | None) -> Tensor:
    """The result of torch's function of this name, that torch serves this kind of call now being known. Computed by the caller: torch's
    warnings point so many frames up."""
    served_by_torch(name, way, result)
    remember(kind, THEIRS)
    return result


def by_kernels(way: Route, loss: AnyLoss, t: Any, o: Any, kind: Kind | None = None, inplace_backward: bool = False) -> Any:
    """The answer of a loss to arguments that fit, a tuple if it has several."""
    if way.path == "kernel":
        return apply(remember(kind, Call(loss, o, t), t), t, inplace_backward)
    results = each(OPS[loss.name].forward(*t, *o))
    return results[0] if loss.answers == 1 else results[: loss.answers]


def result_dtype(input: Tensor, *others: Tensor | None) -> torch.dtype:
    """What these tensors are promoted to; float32 for half precision under autocast, computed without a float32 copy of anything."""
    dtype = input.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) and autocast_is_active(input) else dtype


def scripted_as_torchs(function: Any) -> None:
    """torch.jit.script cannot compile our functions: it takes torch's of the same name instead, by the protocol it has for that
    (undocumented)."""
    function.__prepare_scriptable__ = partial(getattr, torch.nn.functional, function.__name__)
