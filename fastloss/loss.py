"""What a loss says of itself. `operation` and `ops` make everything else of it: the eager path, two registered ops, all derivatives."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import memory

COMPUTE = {torch.float32: torch.float32, torch.float64: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""Storage dtype -> the dtype that its numbers are computed in. What is not here has no kernels."""

Tensors = TypeVar("Tensors", bound=tuple[Any, ...])
Options = TypeVar("Options", bound=tuple[Any, ...])
Saved = TypeVar("Saved", bound=tuple[Any, ...])


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return COMPUTE[tensor.dtype]


class Worth(NamedTuple):
    """From how many logits on the kernels are worth a call, in shares of `config.min_numel`. Measured (docs/when.md)."""

    step: float = 1.0  # with a gradient
    forward: float = 1.0  # without
    few: float = 0.125  # times these for rows of fewer than 16 classes, at most 1: torch vectorises over 16, and is ten times slower below
    half: float = 1.4  # times these for 16-bit logits, at least 1: torch moves half the bytes, our calls cost what they cost
    none: float = 3.0  # times `step` where every row keeps its loss: two visits, and an autograd that does more

    def of(self, reduction: str) -> "Worth":
        """With this reduction."""
        return self._replace(step=self.step * self.none) if reduction == "none" else self


class Spec(NamedTuple):
    """A tensor that a forward leaves behind, before it exists; with the strides of `like` where those are dense, else contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    like: Tensor | None = None

    def empty(self, device: torch.device) -> Tensor:
        """The tensor, uninitialised."""
        return self.fake(device) if self.like is not None else memory.empty(self.shape, self.dtype, device)

    def fake(self, device: torch.device) -> Tensor:
        """The same where it is traced: a fake tensor, whose memory cannot be that of the pool."""
        if self.like is not None:
            return torch.empty_like(self.like, dtype=self.dtype)
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class Loss(ABC, Generic[Tensors, Options, Saved]):
    """One loss. `Tensors`, `Options` and `Saved` are NamedTuples, whose annotations become the schema of the registered ops.

    `forward` takes the tensors as the user gave them, of any layout, and returns what `outputs` declares: the caller's answers first, of
    which a loss has one. Where there are more, upstream gradients come as a tuple, one for each, None where there is none. `Saved` names
    what the backward sees again, by the fields of `tensors` and of `results`.
    """

    name: str
    tensors: ClassVar[type[tuple[Any, ...]]]
    options: ClassVar[type[tuple[Any, ...]]]
    results: ClassVar[type[tuple[Any, ...]]]
    saved: ClassVar[type[tuple[Any, ...]]]
    typed_by: ClassVar[tuple[int, ...]] = (0,)  # the tensors whose dtypes, promoted, are that of the answer
    answers: ClassVar[int] = 1  # the first so many results are the caller's
    differentiable: ClassVar[int] = 1  # the first so many tensors have a gradient
    worth: Worth = Worth()
    one_visit: ClassVar[int] = 0  # `forward_backward` computes the gradients of the first so many

    def __init__(self, name: str) -> None:
        self.name = name
        everything = (*fields(self.tensors), *fields(self.results))
        self._saved = tuple(everything.index(field) for field in fields(self.saved))
        self.required = sum(kind is Tensor for kind in self.tensors.__annotations__.values())  # they come before the optional ones

    @abstractmethod
    def misfit(self, t: Tensors, o: Options) -> str | None:
        """In words, what about these arguments the kernels do not do; None if they fit. The tensors are plain and on one device."""

    def mixture_misfit(self, t: Tensors) -> str | None:
        """In words, which dtypes torch does not take together, though the kernels do; None if it takes them. Whether autocast is on may
        matter, so it is asked of calls alone: a compiled program runs its ops without."""
        return None

    @abstractmethod
    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        """What the forward leaves, one for each field of `results`."""

    @abstractmethod
    def definition(self, t: Tensors, o: Options) -> Tensor | tuple[Tensor, ...]:
        """The answers in plain torch, in the dtype of the first tensor: the oracle of the tests, and the way to second derivatives."""

    @abstractmethod
    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        """What `outputs` declares, by the kernels."""

    @abstractmethod
    def backward(self, dloss: Any, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the first tensors, None where not needed, by the kernels; the very first in `result` if there is one, which
        may be the memory of the first tensor."""

    def one_visit_pays(self, t: Tensors, o: Options) -> bool:
        """Whether `forward_backward` is faster, for these arguments, than forward and backward."""
        return bool(t[0].device.type == "cpu")

    def forward_backward(
        self, dloss: Any, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        """The gradients of the first tensors under this upstream gradient, and what `forward` returns, in one visit. A tensor [2] in
        place of a number says: this one, if both are the same, else any; then the gradients are to be repaired."""
        raise NotImplementedError(self.name)

    def repair(self, dloss: Tensor, foreseen: Tensor, s: Saved, o: Options, gradients: tuple[Tensor | None, ...]) -> None:
        """Make the gradients of `forward_backward` those that `backward` computes, if `dloss` is not what was foreseen, without waiting for
        the device to know."""
        raise NotImplementedError(self.name)

    def gradient(self, dloss: Any, s: Saved, o: Options, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """What `backward` computes, in torch operations that can be differentiated again."""
        return _derivative(self, self.given(s), o, dloss, needed)

    def gradient_spec(self, s: Saved, o: Options, which: int) -> Spec:
        """The gradient of one of the first tensors, before it exists."""
        like = s[which]
        return Spec(tuple(like.shape), like.dtype, like)

    def given(self, s: Any) -> Any:
        """The tensors, from what was saved of them."""
        return self.tensors(*(getattr(s, field) for field in fields(self.tensors)))

    def allocate(self, t: Tensors, o: Options) -> Any:
        """Uninitialised tensors for what `outputs` declares, as `results`."""
        device = t[0].device
        return self.results(*[spec.empty(device) for spec in self.outputs(t, o)])

    def to_save(self, t: Tensors, results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The fields of `saved`."""
        everything = (*t, *results)
        return tuple([everything[i] for i in self._saved])


def fields(named: type[tuple[Any, ...]]) -> tuple[str, ...]:
    """The names of a NamedTuple."""
    return named._fields  # type: ignore[attr-defined, no-any-return]


def each(found: Any) -> tuple[Any, ...]:
    """One answer, or the upstream gradient of one, as a tuple like those of several."""
    return found if isinstance(found, tuple) else (found,)


def _derivative(loss: Any, t: Any, o: Any, dloss: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of the definition as a graph; None where not needed."""
    inputs = [x for x, wanted in zip(t, needed, strict=False) if wanted]
    with torch.enable_grad():
        # half precision is computed in float32, as by the kernels
        wide = (x.to(compute_dtype(x)) if x is not None and x.dtype in COMPUTE else x for x in t)
        answers = zip(each(loss.definition(loss.tensors(*wide), o)), each(dloss), strict=True)
        values, upstream = zip(*((value.to(d.dtype), d) for value, d in answers if d is not None), strict=True)
        found = torch.autograd.grad(values, inputs, upstream, create_graph=torch.is_grad_enabled(), materialize_grads=True)
        found = tuple(_linked(gradient, x) for gradient, x in zip(found, inputs, strict=True))
    results = iter(found)
    return tuple(next(results) if wanted else None for wanted in needed)


def _linked(gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient that does not depend on x, as a function of x all the same, as torch has it: its derivative is 0, not an error."""
    if gradient.requires_grad or not x.requires_grad:
        return gradient
    return torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x, gradient)


def reduced(loss: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """In plain torch: 'none', 'sum', or 'mean' over the weights of the rows (their number, if there are none)."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if row_weight is None:
        return total / loss.numel()
    divisor = row_weight.sum()
    return total / divisor + 0 / divisor  # no weight at all is NaN, also where the total is not zero
