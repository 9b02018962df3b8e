"""What is saved, and what is differentiable: the eager path. A first derivative is a kernel; a graph through the backward
(`create_graph`, batched gradients) differentiates the reference instead, which is slow and right.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from . import launches, reference
from .foresight import Foresight, foresee

_NOTHING = (None,) * 8


def plain(*tensors: Tensor | None) -> bool:
    """True if nothing but the numbers in memory matters: no subclass, vmap, forward-mode level, trace, mode or lazy tensor."""
    return (
        all(t is None or _has_its_numbers_in_memory(t) for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and (not torch._C._is_torch_function_mode_enabled() or _only_a_default_device())
    )


def _only_a_default_device() -> bool:
    """Whether the active modes are those of torch.set_default_device and `with torch.device(...)`: they move new tensors only, and ours
    name their device."""
    return all(type(mode) is DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def _has_its_numbers_in_memory(tensor: Tensor) -> bool:
    return (
        (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter)
        and not tensor.is_neg()  # a lazy minus sign
        and not tensor._is_zerotensor()  # no memory at all
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # `is_grads_batched`
    )


def differentiable_backward(definition: Callable[..., Tensor], inputs: tuple[Tensor, ...], dloss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of `definition(*inputs)` as a graph that can be differentiated again; None where an input needs none."""
    with torch.enable_grad():
        wide = tuple(t.to(launches.compute_dtype(t)) for t in inputs)
        loss = definition(*wide).to(dloss.dtype)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=torch.is_grad_enabled(), materialize_grads=True))
    return tuple(next(found) if t.requires_grad else None for t in inputs)


def _by_kernel(dloss: Tensor) -> bool:
    return not torch.is_grad_enabled() and plain(dloss)


class CrossEntropy(torch.autograd.Function):
    """Class indices. (logits, target [N], weight, ignore_index, label_smoothing, reduction, dtype of the loss, inplace_backward,
    foresight)"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        ignore_index, label_smoothing, reduction, dtype, inplace, foresight = options
        ctx.options = ignore_index, label_smoothing, reduction, inplace, foresight
        arguments = logits, target, weight, ignore_index, label_smoothing, reduction, dtype
        if foresight is not None and foresight.expected is not None:
            dlogits, loss, *saved = launches.cross_entropy_forward_backward(foresight.expected, *arguments)
            foresight.keep(dlogits)
        else:
            loss, *saved = launches.cross_entropy_forward(*arguments)
        ctx.save_for_backward(logits, target, weight, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:  # type: ignore[override]
        logits, target, weight, divisor, row_weight, mass, top, total = ctx.saved_tensors
        ignore_index, label_smoothing, reduction, inplace, foresight = ctx.options
        if inplace:
            _refuse_graph()
        if _by_kernel(dloss):
            dlogits = _foreseen(foresight, dloss)
            if dlogits is None:
                result = _overwritten(logits) if inplace else None
                dlogits = launches.cross_entropy_backward(
                    dloss, logits, target, weight, ignore_index, label_smoothing, divisor, row_weight, mass, top, total, result
                )
            return dlogits, *_NOTHING[:8]
        _forget(foresight)

        def definition(logits: Tensor) -> Tensor:
            return reference.cross_entropy(logits, target, weight, ignore_index, label_smoothing, reduction)

        return *differentiable_backward(definition, (logits,), dloss), *_NOTHING[:8]


class SoftCrossEntropy(torch.autograd.Function):
    """Class probabilities. (logits, target like logits, weight, label_smoothing, reduction, dtype of the loss, inplace_backward,
    foresight)"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        label_smoothing, reduction, dtype, inplace, foresight = options
        ctx.options = label_smoothing, reduction, inplace, foresight
        arguments = logits, target, weight, label_smoothing, reduction, dtype
        if foresight is not None and foresight.expected is not None:
            dlogits, loss, *saved = launches.soft_cross_entropy_forward_backward(foresight.expected, *arguments)
            foresight.keep(dlogits)
        else:
            loss, *saved = launches.soft_cross_entropy_forward(*arguments)
        ctx.save_for_backward(logits, target, weight, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:  # type: ignore[override]
        logits, target, weight, divisor, mass, top, total = ctx.saved_tensors
        label_smoothing, reduction, inplace, foresight = ctx.options
        if inplace:
            _refuse_graph()
        if _by_kernel(dloss):
            dlogits, dtarget = _foreseen(foresight, dloss), None
            if ctx.needs_input_grad[1]:  # before the logits may be overwritten
                dtarget = launches.soft_cross_entropy_target_backward(dloss, logits, weight, label_smoothing, divisor, top, total)
            if ctx.needs_input_grad[0] and dlogits is None:
                result = _overwritten(logits) if inplace else None
                dlogits = launches.soft_cross_entropy_backward(
                    dloss, logits, target, weight, label_smoothing, divisor, mass, top, total, result=result
                )
            return dlogits, dtarget, *_NOTHING[:6]
        _forget(foresight)

        def definition(logits: Tensor, target: Tensor) -> Tensor:
            return reference.soft_cross_entropy(logits, target, weight, label_smoothing, reduction)

        return *differentiable_backward(definition, (logits, target), dloss), *_NOTHING[:6]


class Softmax(torch.autograd.Function):
    """(logits)"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        prob = launches.softmax_forward(logits)
        ctx.save_for_backward(prob, logits)
        return prob

    @staticmethod
    def backward(ctx: Any, dprob: Tensor) -> Any:  # type: ignore[override]
        prob, logits = ctx.saved_tensors
        if _by_kernel(dprob):
            return launches.softmax_backward(dprob, prob)
        return differentiable_backward(lambda logits: torch.softmax(logits, 1), (logits,), dprob)[0]


class LogSoftmax(torch.autograd.Function):
    """(logits)"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        log_prob = launches.log_softmax_forward(logits)
        ctx.save_for_backward(log_prob, logits)
        return log_prob

    @staticmethod
    def backward(ctx: Any, dlog_prob: Tensor) -> Any:  # type: ignore[override]
        log_prob, logits = ctx.saved_tensors
        if _by_kernel(dlog_prob):
            return launches.log_softmax_backward(dlog_prob, log_prob)
        return differentiable_backward(lambda logits: torch.log_softmax(logits, 1), (logits,), dlog_prob)[0]


class NLLLoss(torch.autograd.Function):
    """(log_prob, target [N], weight, ignore_index, reduction, dtype of the loss)"""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        ignore_index, reduction, dtype = options
        ctx.options = ignore_index, reduction
        loss, *saved = launches.nll_loss_forward(log_prob, target, weight, ignore_index, reduction, dtype)
        ctx.save_for_backward(log_prob, target, weight, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:  # type: ignore[override]
        log_prob, target, weight, *saved = ctx.saved_tensors
        ignore_index, reduction = ctx.options
        if _by_kernel(dloss):
            return launches.nll_loss_backward(dloss, log_prob, target, ignore_index, *saved), *_NOTHING[:5]

        def definition(log_prob: Tensor) -> Tensor:
            return reference.nll_loss(log_prob, target, weight, ignore_index, reduction)

        return *differentiable_backward(definition, (log_prob,), dloss), *_NOTHING[:5]


class BCEWithLogits(torch.autograd.Function):
    """Every tensor [A, B, P]. (logits, target, weight, pos_weight, reduction, dtype of the loss, foresight)"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, *options: Any) -> Tensor:
        reduction, dtype, foresight = options
        ctx.options = reduction, foresight
        ctx.save_for_backward(logits, target, weight, pos_weight)
        arguments = logits, target, weight, pos_weight, reduction, dtype
        if foresight is None or foresight.expected is None:
            return launches.bce_with_logits_forward(*arguments)
        dlogits, loss = launches.bce_with_logits_forward_backward(foresight.expected, *arguments)
        foresight.keep(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:  # type: ignore[override]
        logits, target, weight, pos_weight = ctx.saved_tensors
        reduction, foresight = ctx.options
        if _by_kernel(dloss):
            dlogits = _foreseen(foresight, dloss)
            if dlogits is None:
                dlogits = launches.bce_with_logits_backward(dloss, logits, target, weight, pos_weight, reduction)
            return dlogits, *_NOTHING[:6]
        _forget(foresight)

        def definition(logits: Tensor) -> Tensor:
            return reference.bce_with_logits(logits, target, weight, pos_weight, reduction)

        return *differentiable_backward(definition, (logits,), dloss), *_NOTHING[:6]


class BinaryCrossEntropy(torch.autograd.Function):
    """Every tensor [A, B, P]. (prob, target, weight, reduction, dtype of the loss)"""

    @staticmethod
    def forward(ctx: Any, prob: Tensor, target: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
        ctx.reduction = reduction
        ctx.save_for_backward(prob, target, weight)
        return launches.binary_cross_entropy_forward(prob, target, weight, reduction, dtype)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:  # type: ignore[override]
        prob, target, weight = ctx.saved_tensors
        if _by_kernel(dloss):
            return launches.binary_cross_entropy_backward(dloss, prob, target, weight, ctx.reduction), *_NOTHING[:4]

        def definition(prob: Tensor) -> Tensor:
            return reference.binary_cross_entropy(prob, target, weight, ctx.reduction)

        return *differentiable_backward(definition, (prob,), dloss), *_NOTHING[:4]


def _foreseen(foresight: Foresight | None, dloss: Tensor) -> Tensor | None:
    return None if foresight is None else foresight.take(dloss)


def _forget(foresight: Foresight | None) -> None:
    if foresight is not None:
        foresight.forget()


def _refuse_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("inplace_backward: the logits cannot be overwritten with their gradient while create_graph=True needs them")


def _overwritten(logits: Tensor) -> Tensor:
    """The logits' own memory as the place of their gradient. Their version moves on, so that autograd refuses whoever needs them still."""
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


# by the names of the registered ops in `ops`


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str, dtype: torch.dtype,
    inplace_backward: bool,
) -> Tensor:  # fmt: skip
    foresight = None if inplace_backward else foresee("cross_entropy", logits, reduction)
    arguments = logits, target, weight, ignore_index, label_smoothing, reduction, dtype, inplace_backward
    return CrossEntropy.apply(*arguments, foresight)  # type: ignore[no-any-return, no-untyped-call]


def soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
    inplace_backward: bool,
) -> Tensor:
    foresight = None if inplace_backward else foresee("soft_cross_entropy", logits, reduction)
    arguments = logits, target, weight, label_smoothing, reduction, dtype, inplace_backward
    return SoftCrossEntropy.apply(*arguments, foresight)  # type: ignore[no-any-return, no-untyped-call]


softmax: Callable[..., Tensor] = Softmax.apply
log_softmax: Callable[..., Tensor] = LogSoftmax.apply
nll_loss: Callable[..., Tensor] = NLLLoss.apply


def bce_with_logits(
    logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> Tensor:
    foresight = foresee("bce_with_logits", logits, reduction)
    return BCEWithLogits.apply(logits, target, weight, pos_weight, reduction, dtype, foresight)  # type: ignore[no-any-return, no-untyped-call]


binary_cross_entropy: Callable[..., Tensor] = BinaryCrossEntropy.apply
