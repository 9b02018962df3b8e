"""Calls of a registered op like one before.

A compiled step calls the same op with tensors of the same shapes, strides and dtypes at every step. Whether they fit, and what is launched,
was found out the first time; the second call of a kind is recorded (`replay`), and those after it are its launches with new addresses.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import config, contract, replay

_MOST_KINDS = 1 << 10
_SEEN: Any = object()  # of this kind there was one call


class Repeated:
    """A function of an op's flat arguments, the first so many of which are tensors, that finds gradients and results. Called with plain
    tensors on CPU only, under no mode."""

    def __init__(self, find: Callable[..., replay.Found], tensors: int) -> None:
        self.find, self.tensors = find, tensors
        self.programs: dict[tuple[Any, ...], replay.Program | None] = {}

    def __call__(self, *arguments: Any) -> replay.Found:
        if contract.watch is not None:
            return self.find(*arguments)
        tensors = arguments[: self.tensors]
        kind: Any = [torch.get_num_threads(), config.pool_min_bytes]
        for t in tensors:
            kind += (None,) if t is None else (t.shape, t.stride(), t.dtype, t.requires_grad)
        kind += (tuple(a) if type(a) is list else a for a in arguments[self.tensors :])
        kind = tuple(kind)
        program = self.programs.get(kind, self)
        if program is _SEEN:
            found, self.programs[kind] = replay.record(lambda: self.find(*arguments), tensors)
            return found
        if program is self:
            found = self.find(*arguments)
            if len(self.programs) >= _MOST_KINDS:
                self.programs.clear()
            self.programs[kind] = _SEEN
            return found
        return (program and program.run(tensors)) or self.find(*arguments)
