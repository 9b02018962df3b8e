"""The eager path of every loss: one autograd Function, made of what the loss says of itself.

A first derivative is a kernel; a graph through the backward (`create_graph`, batched gradients) differentiates the loss's `gradient`
instead, which is slow and right.
"""

from typing import Any

import torch
from torch import Tensor

from .arguments import plain
from .calls import Call
from .foresight import Foresight, ForesightOnDevice, foresee


def apply(call: Call, t: Any, inplace_backward: bool = False) -> Any:
    """The answer of a loss to tensors that fit, by the kernels; a tuple if it has several."""
    foresight = None if call.subject is None or inplace_backward else foresee(call.subject)
    return _Operation.apply(call, inplace_backward, foresight, *t)  # type: ignore[no-untyped-call]


def apply_again(call: Call, tensors: tuple[Tensor | None, ...]) -> Any:
    """The same for a call of a kind that is remembered: of plain tensors, under no mode but autocast, on CPU."""
    if not call.graph:
        results, answers = call.forward(tensors), call.loss.answers
        return results[0] if answers == 1 else results[:answers]
    foresight = None if call.subject is None else foresee(call.subject)
    if foresight is not None and (visit := call.programs.get(foresight.expected)) is not None:
        found = visit.run(tensors)
        if found is not None:
            gradients, (answer,) = found
            foresight.keep(gradients)
            return _apply_visit(call, foresight, (answer, tensors), *tensors[: call.loss.one_visit])
    return _apply_operation(call, False, foresight, *tensors)


class _Operation(torch.autograd.Function):
    """(call, inplace_backward, foresight, the loss's tensors)"""

    @staticmethod
    def forward(ctx: Any, call: Call, inplace: bool, foresight: Foresight | None, *tensors: Any) -> Any:  # type: ignore[override]
        loss, t = call.loss, call.loss.tensors(*tensors)
        ctx.call, ctx.inplace, ctx.foresight = call, inplace, foresight
        if foresight is not None and foresight.expected is not None:
            gradients, results = call.forward_backward(foresight.expected, t, ctx.needs_input_grad[3 : 3 + loss.one_visit])
            foresight.keep(gradients)
        else:
            results = call.forward(t)
        ctx.save_for_backward(*loss.to_save(t, results))
        if loss.answers == 1:
            return results[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(answer for answer in results[: loss.answers] if not answer.is_floating_point()))
        return tuple(results[: loss.answers])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        loss, saved = ctx.call.loss, ctx.saved_tensors  # asked for first: torch then notices tensors that were edited since
        graph = torch.is_grad_enabled() or not plain(*upstream)
        needed = ctx.needs_input_grad[3 : 3 + loss.differentiable]
        nothing = (None,) * (len(ctx.needs_input_grad) - 3 - loss.differentiable)
        if ctx.foresight is None and not graph and not ctx.inplace:
            return None, None, None, *ctx.call.backward(upstream, saved, list(needed)), *nothing
        found: tuple[Tensor | None, ...] = ()
        if ctx.foresight is not None:
            if graph:
                ctx.foresight.forget()
            else:
                found = ctx.foresight.take(upstream[0])
                if found and isinstance(ctx.foresight, ForesightOnDevice):
                    loss.repair(upstream[0], ctx.foresight.expected, loss.saved(*saved), ctx.call.options, found)
        if len(found) < loss.differentiable or any(gradient is None for gradient in found):
            found = _gradients(ctx, upstream, saved, needed, found, graph)
        return None, None, None, *found, *nothing


class _Visit(torch.autograd.Function):
    """(call, foresight, (its answer, its tensors), the tensors whose gradients were made with the answer): for small calls, as little as
    autograd can do. Only tensors are saved. If the gradients turn out to be those for another number, all begins anew."""

    @staticmethod
    def forward(ctx: Any, call: Call, foresight: Foresight, found: Any, *differentiable: Any) -> Tensor:  # type: ignore[override]
        answer, tensors = found  # in a tuple: an answer that autograd sees coming in, it would give back as a view
        ctx.call, ctx.foresight = call, foresight
        ctx.save_for_backward(*tensors)
        return answer  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        saved = ctx.saved_tensors
        graph = torch.is_grad_enabled() or not plain(dloss)
        if graph:
            ctx.foresight.forget()
        found = () if graph else ctx.foresight.take(dloss)
        return None, None, None, *(found or _anew(ctx.call, saved, dloss, graph))


# what torch.autograd.Function.apply does beside this is for functorch, under which nothing is remembered
_apply_operation: Any = super(torch.autograd.Function, _Operation).apply
_apply_visit: Any = super(torch.autograd.Function, _Visit).apply


def _gradients(
    ctx: Any, upstream: tuple[Any, ...], saved: Any, needed: tuple[bool, ...], found: tuple[Tensor | None, ...], graph: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of a loss's first tensors: those that were not found, or all as a graph."""
    loss, s, o = ctx.call.loss, ctx.call.loss.saved(*saved), ctx.call.options
    dloss: Any = upstream[0] if loss.answers == 1 else upstream
    if ctx.inplace and torch.is_grad_enabled():
        raise RuntimeError("inplace_backward: the logits cannot be overwritten with their gradient while create_graph=True needs them")
    if graph:
        return loss.gradient(dloss, s, o, needed)  # type: ignore[no-any-return]
    found += (None,) * (loss.differentiable - len(found))
    missing = [wanted and gradient is None for wanted, gradient in zip(needed, found, strict=True)]
    if not any(missing):
        return found
    if ctx.inplace:
        rest = loss.backward(dloss, s, o, tuple(missing), _overwritten(s.input, dloss))
    else:
        rest = ctx.call.backward(upstream, saved, missing)
    return tuple(b if a is None else a for a, b in zip(found, rest, strict=True))


def _anew(call: Call, saved: Any, dloss: Tensor, graph: bool) -> tuple[Tensor | None, ...]:
    """The gradients that a visit was to make, from its tensors."""
    loss: Any = call.loss
    t = loss.tensors(*saved)
    with torch.no_grad():
        s = loss.saved(*loss.to_save(t, call.forward(t)))
    if graph:
        return loss.gradient(dloss, s, call.options, call.needed)[: loss.one_visit]  # type: ignore[no-any-return]
    return loss.backward(dloss, s, call.options, call.needed, None)[: loss.one_visit]  # type: ignore[no-any-return]


def _overwritten(logits: Tensor, dloss: Tensor) -> Tensor:
    """The logits' own memory as the place of their gradient. Their version moves on, so that autograd refuses whoever needs them still."""
    if dloss.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() and logits.numel():
        raise RuntimeError("inplace_backward: the upstream gradient shares the memory of the logits")
    torch.autograd.graph.increment_version(logits)
    return logits.detach()
