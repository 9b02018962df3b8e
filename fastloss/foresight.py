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
    """The upstream gradient that a forward expects, None if it trusts no number; and the gradient for it, until the backward takes it."""

    def __init__(self, kind: tuple[Any, ...]) -> None:
        number, trusted = _last.get(kind, (1.0, True))
        self.expected = number if trusted else None
        self._kind = kind
        self._gradients: list[Tensor] = []

    def keep(self, gradient: Tensor) -> None:
        _waiting[id(self)] = gradient.numel() * gradient.element_size()
        self._gradients.append(gradient)

    def take(self, dloss: Tensor) -> Tensor | None:
        """The gradient, if it is that for `dloss` and nobody took it before. Without it, its memory is free for another."""
        number = float(dloss)
        last, _ = _last.get(self._kind, (1.0, True))
        _last[self._kind] = number, number == last and number != 0  # there are two zeros
        _waiting.pop(id(self), None)
        try:
            gradient = self._gradients.pop()  # one of two threads gets it
        except IndexError:
            return None
        return gradient if number == self.expected else None

    def forget(self) -> None:
        _waiting.pop(id(self), None)
        self._gradients.clear()

    def __del__(self) -> None:
        _waiting.pop(id(self), None)


def foresee(loss: str, logits: Tensor, reduction: str) -> Foresight | None:
    """None where a gradient ahead of time would be useless or in the way."""
    size = logits.numel() * logits.element_size()
    if (
        reduction == "none"
        or not logits.requires_grad
        or not torch.is_grad_enabled()
        or logits.device.type != "cpu"  # elsewhere the backward could not look at the number without waiting for the device
        or not 0 < size <= config.foresight_max_bytes
        or (_waiting and size + sum(_waiting.copy().values()) > config.foresight_waiting_bytes)
        # saved tensors are moved or dropped until the backward (offloading, checkpointing): memory is scarce
        or _saved_tensors_are_hooked()
    ):
        return None
    return Foresight((loss, logits.dtype, logits.shape[min(1, logits.dim() - 1)] if logits.dim() else 1, reduction))


def _saved_tensors_are_hooked() -> bool:
    """True too where torch cannot tell: before 2.8."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
