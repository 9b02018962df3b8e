"""The registered ops `torch.ops.fastloss.*`: what torch.compile, torch.export and make_fx see instead of pointers.

Two for each loss, `NAME` and `NAME_backward`, around the same forward and backward as the eager path; opaque on purpose, since a compiler
that opened them would drop the launch options. Schema, fakes and derivatives of any order follow from the loss.

    NAME(tensors, options) -> results              the answers first
    NAME_backward(dloss, saved, options, bool[] needed) -> a gradient for each differentiable tensor, without elements where not needed

A loss with several answers has an upstream gradient for each, `Tensor? dANSWER, ...`, in place of `Tensor dloss`.
"""

from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._library.custom_ops import get_library_allowing_overwrite
from torch.library import Library

from .loss import COMPUTE, Loss, each, fields
from .losses import LOSSES
from .op_calls import repeated
from .replay import Found
from .storage import present

AnyLoss = Loss[Any, Any, Any]

_KIND = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", str: "str", bool: "bool", torch.dtype: "ScalarType"}


class Ops(NamedTuple):
    """The two ops of a loss."""

    forward: Any
    backward: Any


def _arguments(*named: type[tuple[Any, ...]]) -> str:
    return ", ".join(f"{_KIND[kind]} {field}" for group in named for field, kind in group.__annotations__.items())


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _one_or_all(results: tuple[Any, ...]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _register(loss: AnyLoss) -> Ops:
    ours = _Arguments(loss)
    results = fields(loss.results)
    kind = "Tensor" if loss.answers == 1 else "Tensor?"
    upstream = "".join(f"{kind} {field}, " for field in ours.upstream)
    backward = _op(
        f"{loss.name}_backward",
        f"({upstream}{_arguments(loss.saved, loss.options)}, bool[] needed) -> {_returns(loss.differentiable)}",
        _Functions(ours.backward, ours.repeated_backward, ours.fake_backward, ours.second, ours.save_for_second),
    )

    def first(ctx: Any, *upstream: Any) -> Any:
        _, o = ours.of_forward(ctx.arguments)
        needed = ctx.needs_input_grad[: loss.differentiable]
        found = backward(*upstream[: loss.answers], *ctx.saved_tensors, *o, list(needed))
        gradients = (gradient if wanted else None for gradient, wanted in zip(each(found), needed, strict=True))
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - loss.differentiable)

    forward = _op(
        loss.name,
        f"({_arguments(loss.tensors, loss.options)}) -> {_returns(len(results))}",
        _Functions(ours.forward, ours.repeated_forward, ours.fake_forward, first, ours.save_for_first),
    )
    return Ops(forward, backward)


class _Functions(NamedTuple):
    """What an op is made of; `again` is `kernel` for plain tensors on CPU."""

    kernel: Any
    again: Any
    fake: Any
    derivative: Any
    setup_context: Any


def _op(name: str, schema: str, functions: _Functions) -> Any:
    """An op as torch.library.custom_op makes it, but for `_Shortcut`, and with no look at each call for results that are arguments."""
    library = get_library_allowing_overwrite("fastloss", name)  # an import may have been interrupted
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _hidden(functions.kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastloss::{name}", functions.fake, lib=library)
    shortcut: Any = _Shortcut(library, functions.again)
    torch.library.register_autograd(f"fastloss::{name}", functions.derivative, setup_context=functions.setup_context, lib=shortcut)
    return getattr(torch.ops.fastloss, name).default


class _Shortcut:
    """A library in which a derivative is registered. Compiled code calls its ops without a wish for one, with plain tensors: from where
    torch looks for derivatives the kernel is then called straight away, which saves two ways through the dispatcher of 5 us each."""

    def __init__(self, library: Library, kernel: Any) -> None:
        self.library, self.kernel = library, kernel

    def impl(self, name: str, derived: Any, key: str, **options: Any) -> None:
        kernel = self.kernel

        def autograd(keys: Any, *arguments: Any) -> Any:
            if keys.raw_repr() == _PLAIN and not torch.is_grad_enabled():
                return kernel(*arguments)
            return derived(keys, *arguments)

        self.library.impl(name, _hidden(autograd), key, **options)


_PLAIN = (_C.DispatchKeySet(_C.DispatchKey.CPU) | _C.DispatchKeySet(_C.DispatchKey.AutogradCPU)).raw_repr()  # of a call, not of a tensor


def _hidden(function: Any) -> Any:
    """From Dynamo, where it is watching a backward that a compiled function started: it is to see ops, not what is in them."""
    return torch._disable_dynamo(lambda *arguments: function(*arguments))  # type: ignore[attr-defined]


class _Arguments:
    """A loss's forward, backward and derivatives as functions of an op's flat arguments."""

    def __init__(self, loss: AnyLoss) -> None:
        self.loss = loss
        self.tensors, self.saved = len(fields(loss.tensors)), len(fields(loss.saved))
        self.upstream = ["dloss"] if loss.answers == 1 else [f"d{field}" for field in fields(loss.results)[: loss.answers]]
        self._results_again = repeated(loss, self._results, self.tensors)
        self._gradients_again = repeated(loss, self._gradients, loss.answers + self.saved)

    def of_forward(self, arguments: Any) -> tuple[Any, Any]:
        return self.loss.tensors(*arguments[: self.tensors]), self.loss.options(*arguments[self.tensors :])

    def of_backward(self, arguments: Any) -> tuple[tuple[Any, ...], Any, Any, tuple[bool, ...]]:
        """Upstream gradients, saved tensors, options, needed."""
        answers, saved = self.loss.answers, self.loss.answers + self.saved
        *rest, needed = arguments
        return tuple(rest[:answers]), self.loss.saved(*rest[answers:saved]), self.loss.options(*rest[saved:]), tuple(needed)

    def dloss(self, upstream: tuple[Any, ...]) -> Any:
        """As a loss wants it."""
        return upstream if self.loss.answers > 1 else upstream[0]

    # ---- kernels

    def forward(self, *arguments: Any) -> Any:
        return _one_or_all(self._results(*arguments)[1])

    def backward(self, *arguments: Any) -> Any:
        return self._each_gradient(arguments, self._gradients(*arguments)[0])

    def repeated_forward(self, *arguments: Any) -> Any:
        return _one_or_all(self._results_again(*arguments)[1])

    def repeated_backward(self, *arguments: Any) -> Any:
        return self._each_gradient(arguments, self._gradients_again(*arguments)[0])

    def _each_gradient(self, arguments: Any, found: tuple[Tensor | None, ...]) -> Any:
        input = arguments[self.loss.answers]
        return _one_or_all(tuple([input.new_empty(0) if gradient is None else gradient for gradient in found]))

    def _results(self, *arguments: Any) -> Found:
        t, o = self.of_forward(arguments)
        self._refuse_missing(t)
        self._refuse(self.loss.misfit(t, o))
        return (), self.loss.forward(t, o)

    def _gradients(self, *arguments: Any) -> Found:
        upstream, s, o, needed = self.of_backward(arguments)
        self._refuse_missing(s, upstream)
        t = self.loss.given(s)
        self._refuse(self.loss.misfit(t, o))
        specs = dict(zip(fields(self.loss.results), self.loss.outputs(t, o), strict=True))
        for field, d, spec in zip(self.upstream, upstream, specs.values(), strict=False):
            if d is not None and tuple(d.shape) != tuple(spec.shape):
                self._refuse(f"{field} has shape {tuple(d.shape)}, the result had {tuple(spec.shape)}")
        for field, left in zip(s._fields, s, strict=True):
            declared = specs.get(field)
            if declared is not None and (left.dtype, tuple(left.shape)) != (declared.dtype, tuple(declared.shape)):
                self._refuse(f"{field} is {left.dtype} {tuple(left.shape)}, the forward left {declared.dtype} {tuple(declared.shape)}")
        return self.loss.backward(self.dloss(upstream), s, o, needed, None), ()

    def _refuse(self, misfit: str | None) -> None:
        if misfit is not None:
            raise RuntimeError(f"fastloss::{self.loss.name}: {misfit}")

    def _refuse_missing(self, named: Any, upstream: tuple[Any, ...] = ()) -> None:
        """Tensors without their memory, on different devices, or of a dtype that nothing is computed in."""
        for field, tensor in self._named(named, upstream):
            present(tensor, f"fastloss::{self.loss.name}: {field}")
        self._refuse_devices(named, upstream)
        if named[0].dtype not in COMPUTE:
            self._refuse(f"{named._fields[0]} is {named[0].dtype}, which has no kernels")

    def _refuse_devices(self, named: Any, upstream: tuple[Any, ...] = ()) -> None:
        for field, tensor in self._named(named, upstream):
            if tensor.device != named[0].device:
                self._refuse(f"{field} is on {tensor.device}, {named._fields[0]} on {named[0].device}")

    def _named(self, named: Any, upstream: tuple[Any, ...]) -> list[tuple[str, Tensor]]:
        """The tensors that there are, with their names."""
        everything = (*zip(self.upstream, upstream, strict=False), *zip(named._fields, named, strict=True))
        return [(field, tensor) for field, tensor in everything if tensor is not None]

    # ---- shapes and dtypes, for tracing without data

    def fake_forward(self, *arguments: Any) -> Any:
        t, o = self.of_forward(arguments)
        self._refuse_devices(t)
        return _one_or_all(tuple(spec.fake(t[0].device) for spec in self.loss.outputs(t, o)))

    def fake_backward(self, *arguments: Any) -> Any:
        upstream, s, o, needed = self.of_backward(arguments)
        self._refuse_devices(s, upstream)
        device = s[0].device
        found = (self.loss.gradient_spec(s, o, i).empty(device) if wanted else s[0].new_empty(0) for i, wanted in enumerate(needed))
        return _one_or_all(tuple(found))

    # ---- derivatives

    def save_for_first(self, ctx: Any, inputs: Any, output: Any) -> None:
        t, _ = self.of_forward(inputs)
        if self.loss.answers > 1:
            ctx.set_materialize_grads(False)
        for field, tensor in zip(t._fields[self.loss.differentiable :], t[self.loss.differentiable :], strict=True):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"fastloss::{self.loss.name}: there is no gradient of {field}")
        ctx.arguments = (*(None,) * self.tensors, *inputs[self.tensors :])
        ctx.save_for_backward(*self.loss.to_save(t, each(output)))

    def save_for_second(self, ctx: Any, inputs: Any, output: Any) -> None:
        tensors = self.loss.answers + self.saved
        ctx.rest = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors])

    def second(self, ctx: Any, *upstream: Any) -> Any:
        """The derivatives of the backward op, by the loss's `gradient`."""
        with torch.enable_grad():
            inputs = [
                t.detach().requires_grad_(wanted) if t is not None and wanted else t
                for t, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
            ]
            upstream_of_first, s, o, needed = self.of_backward((*inputs, *ctx.rest))
            found = self.loss.gradient(self.dloss(upstream_of_first), s, o, needed)
            pairs = [(gradient, up) for gradient, up in zip(found, upstream, strict=True) if gradient is not None]
            wanted = [t for t, w in zip(inputs, ctx.needs_input_grad, strict=False) if w]
            derivatives = iter(torch.autograd.grad([g for g, _ in pairs], wanted, [up for _, up in pairs], allow_unused=True))
        return *(next(derivatives) if w else None for w in ctx.needs_input_grad[: len(inputs)]), *(None,) * len(ctx.rest)


OPS = {loss.name: _register(loss) for loss in LOSSES}
