"""Calls of a registered op like one before.

A compiled step calls the same op with tensors of the same shapes, strides and dtypes every time. Whether they fit, and what is launched,
was found out by the first call of a kind; the second one is recorded (`replay`), and those after it are its launches with new addresses.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import config, contract, replay

Kind = tuple[Any, ...]

_MOST_KINDS = 1 << 10
_NEW: Any = object()
_SEEN: Any = object()  # once
_remembered: dict[Kind, replay.Program | None] = {}


class Repeated:
    """A function that finds gradients and results from an op's flat arguments, the first so many of which are tensors. It is called with
    plain tensors on CPU alone, under no mode."""

    def __init__(self, find: Callable[..., replay.Found], tensors: int) -> None:
        self.find, self.tensors = find, tensors

    def __call__(self, *arguments: Any) -> replay.Found:
        if contract.watch is not None:
            return self.find(*arguments)
        tensors = arguments[: self.tensors]
        kind = self._kind(tensors, arguments[self.tensors :])
        program = _remembered.get(kind, _NEW)
        if program is _SEEN:
            found, _remembered[kind] = replay.record(lambda: self.find(*arguments), tensors)
            return found
        if program is _NEW:
            found = self.find(*arguments)
            if len(_remembered) >= _MOST_KINDS:
                _remembered.clear()
            _remembered[kind] = _SEEN
            return found
        return (program and program.run(tensors)) or self.find(*arguments)

    def _kind(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Kind:
        found: list[Any] = [self, torch.get_num_threads(), config.pool_min_bytes]
        for t in tensors:
            found += (None,) if t is None else (t.shape, t.stride(), t.dtype, t.requires_grad)
        found += (tuple(a) if type(a) is list else a for a in options)
        return tuple(found)
