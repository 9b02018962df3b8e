"""Whether a forward computes the gradient too, and for which upstream gradient.

A mean or a sum has one upstream gradient, a number, and a training loop sends the same one at every step: 1, or 1 / accumulation steps,
or a loss scale. So a forward whose logits want a gradient computes it for the number that came last, in the same visit to the logits.
The backward compares. If another number came it computes the gradient as it would have anyway, to the same bits, and no forward trusts
that number until it has come twice.

Elsewhere than on CPU the host would have to wait for that number, so it never looks: the last two numbers stay on the device, a kernel
makes the gradient if they are the same, and in the backward a kernel that compares leaves it or makes it anew (`Loss.repair`).

A gradient that waits is memory that torch would not need yet. So one may wait, of any size up to `config.foresight_max_bytes`, and more
of them only up to `config.foresight_waiting_bytes` together: the losses of many micro-batches, summed before one backward, keep one.
"""

from typing import Any, NamedTuple

import torch
from torch import _C, Tensor

from . import config
from .loss import COMPUTE

_last: dict[tuple[Any, ...], tuple[float, bool]] = {}  # kind of loss -> the number that came last, and whether to trust it
_waiting: dict[int, int] = {}  # bytes of every gradient that waits. Without a lock: a dict's single steps are atomic


_last_on: dict[tuple[Any, ...], "_LastNumbers"] = {}  # kind of loss, with its device -> the numbers that came last


class Foresight:
    """What a forward expects as upstream gradient, None if it trusts no number; and the gradients for it, until the backward takes them."""

    __slots__ = ("_gradients", "_kind", "_size", "expected")

    expected: float | Tensor | None

    def __init__(self, kind: tuple[Any, ...], size: int) -> None:
        number, trusted = _last.get(kind, (1.0, True))
        self.expected = number if trusted else None
        self._kind, self._size = kind, size  # bytes
        self._gradients: list[tuple[Tensor | None, ...]] = []

    def keep(self, gradients: tuple[Tensor | None, ...]) -> None:
        _waiting[id(self)] = self._size
        self._gradients.append(gradients)

    def take(self, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, if they are those for `dloss` and nobody took them before; else (). Their memory is free for others then."""
        number = float(dloss)
        last, _ = _last.get(self._kind, (1.0, True))
        _last[self._kind] = number, number == last and number != 0  # there are two zeros
        gradients = self._take()
        return gradients if number == self.expected else ()

    def _take(self) -> tuple[Tensor | None, ...]:
        _waiting.pop(id(self), None)
        try:
            return self._gradients.pop()  # one of two threads gets them
        except IndexError:
            return ()

    def forget(self) -> None:
        _waiting.pop(id(self), None)
        self._gradients.clear()

    def __del__(self) -> None:
        _waiting.pop(id(self), None)


class _LastNumbers:
    """The last two upstream gradients of a kind, on the device; 1 and 1 before any came. A captured graph keeps this memory in use."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.numbers = torch.ones(2, dtype=dtype, device=device)
        self._next = 0

    def put(self, number: Tensor) -> None:
        self.numbers[self._next].copy_(number)
        self._next = 1 - self._next


class ForesightOnDevice(Foresight):
    """`expected`, [2], is what the last numbers were when the forward began. The gradients that are taken may be those for another number,
    or none at all, until they are repaired."""

    __slots__ = ("_last",)

    expected: Tensor

    def __init__(self, last: _LastNumbers, size: int) -> None:
        self.expected = last.numbers.clone()
        self._last, self._size = last, size
        self._gradients = []

    def take(self, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to repair, if nobody took them before; else ()."""
        self._last.put(dloss)
        return self._take()


class Subject(NamedTuple):
    """What there is to foresee of a kind of call."""

    kind: tuple[Any, ...]
    size: int  # bytes of the gradients
    dtype: torch.dtype
    device: torch.device
    device_type: str  # of it: every call asks


def subject_of(loss: str, tensors: tuple[Tensor | None, ...], reduction: str) -> Subject | None:
    """The gradients of these tensors; None where they would be useless ahead of time."""
    first = tensors[0]
    size = sum(t.nbytes for t in tensors if t is not None and t.requires_grad)
    if reduction == "none" or not size or first is None:
        return None
    classes = first.shape[min(1, first.dim() - 1)] if first.dim() else 1
    return Subject((loss, first.dtype, classes, reduction), size, first.dtype, first.device, first.device.type)


def foresee(subject: Subject) -> Foresight | None:
    """None where gradients ahead of time would be in the way."""
    if (
        subject.size > config.foresight_max_bytes
        or (_waiting and subject.size + sum(_waiting.copy().values()) > config.foresight_waiting_bytes)
        # saved tensors are moved or dropped until the backward (offloading, checkpointing): memory is scarce
        or _saved_tensors_hooks(False) is not None
    ):
        return None
    return Foresight(subject.kind, subject.size) if subject.device_type in _LOOKED_AT else _on_device(subject)


_LOOKED_AT = {"cpu"}


def _perhaps_hooks(ignore_is_tracing: bool) -> bool:
    """Before 2.8 torch cannot tell."""
    return True


_saved_tensors_hooks: Any = getattr(_C._autograd, "_top_saved_tensors_default_hooks", _perhaps_hooks)


def _on_device(subject: Subject) -> Foresight | None:
    kind = (*subject.kind, subject.device)
    if kind not in _last_on:
        if subject.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # what is made now holds nothing until the graph is replayed
        _last_on[kind] = _LastNumbers(COMPUTE[subject.dtype], subject.device)
    return ForesightOnDevice(_last_on[kind], subject.size)
