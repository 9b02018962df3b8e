"""The registered ops `torch.ops.fastloss.*`: what torch.compile, torch.export and make_fx see instead of pointers.

One op for each direction of each loss, around the same launches as the eager path; opaque on purpose, since a compiler that opened them
would drop the launch options. Second derivatives go through the reference, as in `autograd`; `nll_loss` and the gradient of soft targets
have none here and raise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import launches, reference
from .autograd import differentiable_backward
from .launches import compute_dtype, rows_in

cross_entropy = custom_op("fastloss::cross_entropy", launches.cross_entropy_forward, mutates_args=())
soft_cross_entropy = custom_op("fastloss::soft_cross_entropy", launches.soft_cross_entropy_forward, mutates_args=())
softmax = custom_op("fastloss::softmax", launches.softmax_forward, mutates_args=())
log_softmax = custom_op("fastloss::log_softmax", launches.log_softmax_forward, mutates_args=())
nll_loss = custom_op("fastloss::nll_loss", launches.nll_loss_forward, mutates_args=())
bce_with_logits = custom_op("fastloss::bce_with_logits", launches.bce_with_logits_forward, mutates_args=())
binary_cross_entropy = custom_op("fastloss::binary_cross_entropy", launches.binary_cross_entropy_forward, mutates_args=())
softmax_backward = custom_op("fastloss::softmax_backward", launches.softmax_backward, mutates_args=())
log_softmax_backward = custom_op("fastloss::log_softmax_backward", launches.log_softmax_backward, mutates_args=())
nll_loss_backward = custom_op("fastloss::nll_loss_backward", launches.nll_loss_backward, mutates_args=())
bce_with_logits_backward = custom_op("fastloss::bce_with_logits_backward", launches.bce_with_logits_backward, mutates_args=())
binary_cross_entropy_backward = custom_op(
    "fastloss::binary_cross_entropy_backward", launches.binary_cross_entropy_backward, mutates_args=()
)
soft_cross_entropy_target_backward = custom_op(
    "fastloss::soft_cross_entropy_target_backward", launches.soft_cross_entropy_target_backward, mutates_args=()
)


@custom_op("fastloss::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str,
    divisor: Tensor, row_weight: Tensor, mass: Tensor, top: Tensor, total: Tensor,
) -> Tensor:  # fmt: skip
    saved = divisor, row_weight, mass, top, total
    return launches.cross_entropy_backward(dloss, logits, target, weight, ignore_index, label_smoothing, *saved)


@custom_op("fastloss::soft_cross_entropy_backward", mutates_args=())
def soft_cross_entropy_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str,
    divisor: Tensor, mass: Tensor, top: Tensor, total: Tensor,
) -> Tensor:  # fmt: skip
    return launches.soft_cross_entropy_backward(dloss, logits, target, weight, label_smoothing, divisor, mass, top, total)


# ---------------------------------------------------------------- shapes and dtypes, for tracing without data


def _loss(logits: Tensor, rows: Any, reduction: str, dtype: torch.dtype) -> Tensor:
    return logits.new_empty(rows if reduction == "none" else (), dtype=dtype)


def _vector(logits: Tensor, size: Any) -> Tensor:
    return logits.new_empty((size,), dtype=compute_dtype(logits))


def _divisor(logits: Tensor, reduction: str) -> Tensor:
    return _vector(logits, 1 if reduction == "mean" else 0)


@cross_entropy.register_fake
def _(logits, target, weight, ignore_index, label_smoothing, reduction, dtype):  # type: ignore[no-untyped-def]
    rows = rows_in(logits)
    mass = _vector(logits, rows if label_smoothing > 0 else 0)
    vectors = (_vector(logits, rows) for _ in range(3))
    row_weight, top, total = vectors
    return _loss(logits, (rows,), reduction, dtype), _divisor(logits, reduction), row_weight, mass, top, total


@soft_cross_entropy.register_fake
def _(logits, target, weight, label_smoothing, reduction, dtype):  # type: ignore[no-untyped-def]
    rows = rows_in(logits)
    vectors = (_vector(logits, rows) for _ in range(3))
    return _loss(logits, (rows,), reduction, dtype), _divisor(logits, reduction), *vectors


@nll_loss.register_fake
def _(log_prob, target, weight, ignore_index, reduction, dtype):  # type: ignore[no-untyped-def]
    rows = rows_in(log_prob)
    return _loss(log_prob, (rows,), reduction, dtype), _divisor(log_prob, reduction), _vector(log_prob, rows)


@bce_with_logits.register_fake
def _(logits, target, weight, pos_weight, reduction, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(target, dtype=dtype) if reduction == "none" else logits.new_empty((), dtype=dtype)


@binary_cross_entropy.register_fake
def _(prob, target, weight, reduction, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(prob, dtype=dtype) if reduction == "none" else prob.new_empty((), dtype=dtype)


def _shaped_like(position: int) -> Callable[..., Tensor]:
    return lambda *args: torch.empty_like(args[position])


def _contiguous(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


softmax.register_fake(_contiguous)
log_softmax.register_fake(_contiguous)
softmax_backward.register_fake(_shaped_like(1))
log_softmax_backward.register_fake(_shaped_like(1))
cross_entropy_backward.register_fake(_shaped_like(1))
soft_cross_entropy_backward.register_fake(_shaped_like(1))
soft_cross_entropy_target_backward.register_fake(_shaped_like(1))
nll_loss_backward.register_fake(_shaped_like(1))
bce_with_logits_backward.register_fake(_shaped_like(1))
binary_cross_entropy_backward.register_fake(_shaped_like(1))


# ---------------------------------------------------------------- first derivatives: the backward ops


def _save(tensors: int, *, outputs: bool = True) -> Callable[..., None]:
    """Save the first `tensors` inputs and all outputs but the loss; keep the other inputs as `ctx.options`."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(True)
        ctx.options = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *(output[1:] if isinstance(output, tuple) and outputs else ()))

    return setup_context


def _cross_entropy(ctx: Any, dloss: Tensor, *_: Any) -> Any:
    logits, target, weight, *saved = ctx.saved_tensors
    ignore_index, label_smoothing, reduction, _dtype = ctx.options
    dlogits = cross_entropy_backward(dloss, logits, target, weight, ignore_index, label_smoothing, reduction, *saved)
    return dlogits, None, None, None, None, None, None


def _soft_cross_entropy(ctx: Any, dloss: Tensor, *_: Any) -> Any:
    logits, target, weight, divisor, mass, top, total = ctx.saved_tensors
    label_smoothing, reduction, _dtype = ctx.options
    dlogits = dtarget = None
    if ctx.needs_input_grad[0]:
        dlogits = soft_cross_entropy_backward(dloss, logits, target, weight, label_smoothing, reduction, divisor, mass, top, total)
    if ctx.needs_input_grad[1]:
        dtarget = soft_cross_entropy_target_backward(dloss, logits, weight, label_smoothing, divisor, top, total)
    return dlogits, dtarget, None, None, None, None


def _nll_loss(ctx: Any, dloss: Tensor, *_: Any) -> Any:
    log_prob, target, _weight, divisor, row_weight = ctx.saved_tensors
    return nll_loss_backward(dloss, log_prob, target, ctx.options[0], divisor, row_weight), None, None, None, None, None


def _bce_with_logits(ctx: Any, dloss: Tensor) -> Any:
    return bce_with_logits_backward(dloss, *ctx.saved_tensors, ctx.options[0]), None, None, None, None, None


def _binary_cross_entropy(ctx: Any, dloss: Tensor) -> Any:
    return binary_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.options[0]), None, None, None, None


def _save_result(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output)


cross_entropy.register_autograd(_cross_entropy, setup_context=_save(3))
soft_cross_entropy.register_autograd(_soft_cross_entropy, setup_context=_save(3))
nll_loss.register_autograd(_nll_loss, setup_context=_save(3))
bce_with_logits.register_autograd(_bce_with_logits, setup_context=_save(4))
binary_cross_entropy.register_autograd(_binary_cross_entropy, setup_context=_save(3))
softmax.register_autograd(lambda ctx, d: softmax_backward(d, *ctx.saved_tensors), setup_context=_save_result)
log_softmax.register_autograd(lambda ctx, d: log_softmax_backward(d, *ctx.saved_tensors), setup_context=_save_result)


# ---------------------------------------------------------------- second derivatives: the backward ops' own, through the reference


def _differentiate(op: Any, formula: Callable[..., Tensor], differentiable: int) -> None:
    """Give a backward op the derivatives of `formula`, the same gradient in plain torch, by its first `differentiable` inputs."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inputs = inputs[differentiable:]
        ctx.save_for_backward(*inputs[:differentiable])

    def backward(ctx: Any, ddinput: Tensor) -> Any:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors]
            wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            found = torch.autograd.grad(formula(*inputs, *ctx.inputs), wanted, ddinput, allow_unused=True)
        results = iter(found)
        return *(next(results) if needed else None for needed in ctx.needs_input_grad[:differentiable]), *(None for _ in ctx.inputs)

    op.register_autograd(backward, setup_context=setup_context)


def _cross_entropy_gradient(
    dloss: Tensor, logits: Tensor, target: Any, weight: Any, ignore_index: Any, smoothing: Any, *rest: Any
) -> Tensor:
    def definition(logits: Tensor) -> Tensor:
        return reference.cross_entropy(logits, target, weight, ignore_index, smoothing, rest[0])

    return _gradient(definition, logits, dloss)


def _soft_gradient(dloss: Tensor, logits: Tensor, target: Tensor, weight: Any, smoothing: Any, reduction: str, *_: Any) -> Tensor:
    return _gradient(lambda logits: reference.soft_cross_entropy(logits, target, weight, smoothing, reduction), logits, dloss)


def _bce_gradient(dloss: Tensor, logits: Tensor, target: Any, weight: Any, pos_weight: Any, reduction: str) -> Tensor:
    return _gradient(lambda logits: reference.bce_with_logits(logits, target, weight, pos_weight, reduction), logits, dloss)


def _binary_gradient(dloss: Tensor, prob: Tensor, target: Any, weight: Any, reduction: str) -> Tensor:
    return _gradient(lambda prob: reference.binary_cross_entropy(prob, target, weight, reduction), prob, dloss)


def _gradient(definition: Callable[[Tensor], Tensor], logits: Tensor, dloss: Tensor) -> Tensor:
    found = differentiable_backward(definition, (logits,), dloss)[0]
    assert found is not None
    return found


def _softmax_gradient(dprob: Tensor, prob: Tensor) -> Tensor:
    return prob * (dprob - (dprob * prob).sum(1, keepdim=True))


def _log_softmax_gradient(dlog_prob: Tensor, log_prob: Tensor) -> Tensor:
    return dlog_prob - log_prob.exp() * dlog_prob.sum(1, keepdim=True)


_differentiate(cross_entropy_backward, _cross_entropy_gradient, 2)
_differentiate(soft_cross_entropy_backward, _soft_gradient, 3)
_differentiate(bce_with_logits_backward, _bce_gradient, 2)
_differentiate(binary_cross_entropy_backward, _binary_gradient, 2)
_differentiate(softmax_backward, _softmax_gradient, 2)
_differentiate(log_softmax_backward, _log_softmax_gradient, 2)
