"""Calls of a registered op, and backwards, like one before.

A compiled step calls the same op with tensors of the same shapes, strides and dtypes every time. Whether they fit, and what is launched,
was found out by the first call of a kind; the second one is recorded (`record`), and those after it are its launches with new addresses.
To name a kind takes 3 us of Python, so those that were recorded last are known by a guard, torch's own for compiled programs. (Calls of
our functions are asked for more, since more can be around them: `calls`.)
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import config, contract, replay
from .guards import Recent
from .loss import Loss, fields
from .record import record

Kind = tuple[Any, ...]

_MOST_KINDS = 1 << 10
_NEW: Any = object()
_SEEN: Any = object()  # once
_remembered: dict[Kind, replay.Program | None] = {}
_recent: dict["Repeated", Recent[replay.Program]] = defaultdict(Recent)


def repeated(loss: Loss[Any, Any, Any], find: Callable[..., replay.Found], tensors: int) -> Callable[..., replay.Found]:
    """`Repeated`, if what the loss does is launches. What ranks say to one another is none."""
    return find if "group" in fields(loss.options) else Repeated(find, tensors)


class Repeated:
    """A function that finds gradients and results from flat arguments, the first so many of which are tensors. It is called with plain
    tensors on CPU alone, under no mode."""

    def __init__(self, find: Callable[..., replay.Found], tensors: int) -> None:
        self.find, self.tensors = find, tensors

    def __call__(self, *arguments: Any) -> replay.Found:
        if contract.watch is not None:
            return self.find(*arguments)
        tensors, options = arguments[: self.tensors], arguments[self.tensors :]
        asked = [list(map(type, tensors)), options, torch.get_num_threads(), config.pool_min_bytes, config.pool_max_bytes]
        program = _recent[self].find(asked, tensors)
        if program is None:
            return self._by_kind(arguments, tensors, asked)
        return program.run(tensors) or self.find(*arguments)

    def _by_kind(self, arguments: tuple[Any, ...], tensors: tuple[Tensor | None, ...], asked: list[Any]) -> replay.Found:
        types, options, *settings = asked
        each = (tuple(a) if type(a) is list else a for a in options)
        kind = (self, *types, *each, *settings, *((t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors if t is not None))
        known = _remembered.get(kind, _NEW)
        if known is _NEW:
            found = self.find(*arguments)
            if len(_remembered) >= _MOST_KINDS:
                _remembered.clear()
            _remembered[kind] = _SEEN
            return found
        again, program = record(lambda: self.find(*arguments), tensors) if known is _SEEN else (None, known)
        _remembered[kind] = program
        if program is not None:
            _recent[self].came_again(kind, asked, tensors, program)
        return again or (program and program.run(tensors)) or self.find(*arguments)
