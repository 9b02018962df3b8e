"""The eager path of every loss: one autograd Function, made of what the loss says of itself.

A first derivative is a kernel; a graph through the backward (`create_graph`, batched gradients) differentiates the loss's `gradient`
instead, which is slow and right.
"""

from typing import Any

import torch
from torch import Tensor

from .arguments import plain
from .foresight import Foresight, ForesightOnDevice, foresee
from .loss import Loss


def apply(loss: Loss[Any, Any, Any], t: Any, o: Any, inplace_backward: bool = False) -> Any:
    """The answer of a loss to tensors and options that fit, by the kernels; a tuple if it has several."""
    ahead = loss.one_visit and not inplace_backward and loss.one_visit_pays(t, o)
    foresight = foresee(loss.name, t[: loss.one_visit], o.reduction) if ahead else None
    return _Operation.apply(loss, o, inplace_backward, foresight, *t)  # type: ignore[no-untyped-call]


class _Operation(torch.autograd.Function):
    """(loss, options, inplace_backward, foresight, the loss's tensors)"""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: Loss[Any, Any, Any], o: Any, inplace: bool, foresight: Foresight | None, *tensors: Any
    ) -> Any:
        ctx.loss, ctx.options, ctx.inplace, ctx.foresight = loss, o, inplace, foresight
        t = loss.tensors(*tensors)
        if foresight is not None and foresight.expected is not None:
            gradients, results = loss.forward_backward(foresight.expected, t, o, ctx.needs_input_grad[4 : 4 + loss.one_visit])
            foresight.keep(gradients)
        else:
            results = loss.forward(t, o)
        ctx.save_for_backward(*loss.to_save(t, results))
        if loss.answers == 1:
            return results[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(answer for answer in results[: loss.answers] if not answer.is_floating_point()))
        return tuple(results[: loss.answers])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        loss, o, foresight = ctx.loss, ctx.options, ctx.foresight
        dloss: Any = upstream[0] if loss.answers == 1 else upstream
        s, needed = loss.saved(*ctx.saved_tensors), ctx.needs_input_grad[4 : 4 + loss.differentiable]
        if ctx.inplace and torch.is_grad_enabled():
            raise RuntimeError("inplace_backward: the logits cannot be overwritten with their gradient while create_graph=True needs them")
        if torch.is_grad_enabled() or not plain(*(d for d in upstream if d is not None)):
            if foresight is not None:
                foresight.forget()
            gradients = loss.gradient(dloss, s, o, needed)
        else:
            found = () if foresight is None else foresight.take(dloss)
            if found and isinstance(foresight, ForesightOnDevice):
                loss.repair(dloss, foresight.expected, s, o, found)
            found += (None,) * (loss.differentiable - len(found))
            missing = tuple(wanted and gradient is None for wanted, gradient in zip(needed, found, strict=True))
            if any(missing):
                rest = loss.backward(dloss, s, o, missing, _overwritten(s.input, dloss) if ctx.inplace else None)
                found = tuple(b if a is None else a for a, b in zip(found, rest, strict=True))
            gradients = found
        return None, None, None, None, *gradients, *(None,) * (len(ctx.needs_input_grad) - 4 - loss.differentiable)


def _overwritten(logits: Tensor, dloss: Tensor) -> Tensor:
    """The logits' own memory as the place of their gradient. Their version moves on, so that autograd refuses whoever needs them still."""
    if dloss.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() and logits.numel():
        raise RuntimeError("inplace_backward: the upstream gradient shares the memory of the logits")
    torch.autograd.graph.increment_version(logits)
    return logits.detach()
