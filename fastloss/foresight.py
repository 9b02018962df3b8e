"""Whether a forward computes the gradient too, and for which upstream gradient.

A mean or a sum has one upstream gradient, a number, and a training loop sends the same one at every step: 1, or 1 / accumulation steps,
or a loss scale. So a forward whose logits want a gradient computes it for the number that came last, in the same visit to the logits.
The backward compares. If another number came it computes the gradient as it would have anyway, to the same bits, and no forward trusts
that number until it has come twice.

A gradient that waits is memory that torch would not need yet. So one may wait, of any size up to `config.foresight_max_bytes`, and more
of them only up to `config.foresight_waiting_bytes` together: the losses of many micro-batches, summed before one backward, keep one.
"""

from typing import Any

import torch
from torch import Tensor

from . import config

_last: dict[tuple[Any, ...], tuple[float, bool]] = {}  # kind of loss -> the number that came last, and whether to trust it
_waiting: dict[int, int] = {}  # bytes of every gradient that waits. Without a lock: a dict's single steps are atomic


class Foresight:
    """What a forward expects as upstream gradient, None if it trusts no number; and the gradients for it, until the backward takes them."""

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
        _waiting.pop(id(self), None)
        try:
            gradients = self._gradients.pop()  # one of two threads gets them
        except IndexError:
            return ()
        return gradients if number == self.expected else ()

    def forget(self) -> None:
        _waiting.pop(id(self), None)
        self._gradients.clear()

    def __del__(self) -> None:
        _waiting.pop(id(self), None)


def foresee(loss: str, tensors: tuple[Tensor | None, ...], reduction: str) -> Foresight | None:
    """For the gradients of these tensors; None where they would be useless ahead of time, or in the way."""
    if reduction == "none" or not torch.is_grad_enabled():
        return None
    size, first = 0, tensors[0]
    assert first is not None
    for t in tensors:
        if t is not None and t.requires_grad:
            size += t.nbytes
    if (
        not 0 < size <= config.foresight_max_bytes
        or not first.is_cpu  # elsewhere the backward could not look at the number without waiting for the device
        or (_waiting and size + sum(_waiting.copy().values()) > config.foresight_waiting_bytes)
        # saved tensors are moved or dropped until the backward (offloading, checkpointing): memory is scarce
        or _saved_tensors_are_hooked()
    ):
        return None
    return Foresight((loss, first.dtype, first.shape[min(1, first.dim() - 1)] if first.dim() else 1, reduction), size)


def _saved_tensors_are_hooked() -> bool:
    """True too where torch cannot tell: before 2.8."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
