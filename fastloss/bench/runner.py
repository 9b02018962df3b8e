"""One provider on one case: a step that can be taken again and again, timed in its two halves."""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastloss

from .cases import Case, Inputs
from .clock import clock_of, wait
from .providers import Provider


class Times(NamedTuple):
    """Seconds."""

    forward: float
    backward: float

    @property
    def step(self) -> float:
        return self.forward + self.backward


class _FromBuffer(torch.autograd.Function):
    """Logits that are no leaf and whose producer wants nothing back: what an in-place backward needs, at no cost of its own."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Any:  # type: ignore[override]
        return None, None


class Runner:
    """Takes steps f(x, y).backward(). Leaf logits as a user's test would have; those of in-place providers are no leaf.

    On CUDA, `step` is what the device takes with its queue full, `latency` what it takes with an empty queue until it is done, and `host`
    how long the host is busy queueing. On CPU the three are one.
    """

    def __init__(self, provider: Provider, case: Case, inputs: list[Inputs], threads: int = 0) -> None:
        self.provider, self.case, self.inputs, self.threads = provider, case, inputs, threads
        self.function = provider.bind(case.spec)
        self.device = inputs[0].input.device.type
        self._clock = clock_of(self.device)
        self._ahead = 0.0 if self.device == "cpu" else math.nan  # seconds of the host in a step: measured before the first that is timed
        self._buffer = torch.empty_like(inputs[0].input) if provider.inplace else None
        self._handle = torch.zeros((), device=self.device, requires_grad=True)

    def step(self, turn: int) -> Times:
        """One forward and one backward on input number `turn`; what came out is dropped, untimed."""
        if math.isnan(self._ahead):
            self._ahead = 0.0
            self.results(turn)  # compiles
            self._ahead = min(self.host(turn) for _ in range(3))
        return self.results(turn)[2]

    def results(self, turn: int, keep: bool = False) -> tuple[Tensor, Tensor | None, Times]:
        """The output and, with `keep`, the gradient of one step, and how long its halves took."""
        one = self.inputs[turn % len(self.inputs)]
        with configured(self.provider.settings, self.threads):
            logits, given = self._logits(one), self._options(one)
            grads: list[Tensor] = []
            if self._buffer is not None and keep:
                logits.register_hook(lambda grad: grads.append(grad.clone()))
            self._clock.start(0.0 if math.isnan(self._ahead) else self._ahead)
            output = self.case.spec.call(self.function, logits, one.target, given)
            self._clock.mark()
            output.backward(one.upstream)  # type: ignore[no-untyped-call]
            self._clock.mark()
            forward, backward = self._clock.laps()
        gradient = (grads[0] if grads else logits.grad) if keep else None
        return output.detach(), gradient, Times(forward, backward)

    def latency(self, turn: int) -> float:
        """Seconds of a step from an idle device to an idle device, by the host's clock."""
        return self._by_the_host(turn, until_done=True)

    def host(self, turn: int) -> float:
        """Seconds until the host has queued a step."""
        return self._by_the_host(turn, until_done=False)

    def _by_the_host(self, turn: int, until_done: bool) -> float:
        one = self.inputs[turn % len(self.inputs)]
        with configured(self.provider.settings, self.threads):
            logits, given = self._logits(one), self._options(one)
            wait(self.device)
            start = perf_counter()
            output = self.case.spec.call(self.function, logits, one.target, given)
            output.backward(one.upstream)  # type: ignore[no-untyped-call]
            if until_done:
                wait(self.device)
            return perf_counter() - start

    def _logits(self, one: Inputs) -> Tensor:
        if self._buffer is None:
            return one.input.detach().requires_grad_()
        self._buffer.copy_(one.input)
        logits: Tensor = _FromBuffer.apply(self._handle, self._buffer)  # type: ignore[no-untyped-call]
        return logits

    def _options(self, one: Inputs) -> dict[str, Any]:
        """With the layer of a linear loss as a fresh leaf."""
        head = one.options.get("linear_weight")
        return one.options if head is None else {**one.options, "linear_weight": head.detach().requires_grad_()}


@contextmanager
def configured(settings: dict[str, int], threads: int = 0) -> Iterator[None]:
    """fastloss.config and torch's thread count for the length of a with block."""
    before = {name: getattr(fastloss.config, name) for name in settings}
    threads_before = torch.get_num_threads()
    for name, value in settings.items():
        setattr(fastloss.config, name, value)
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(fastloss.config, name, value)
        if threads:
            torch.set_num_threads(threads_before)


def release_memory() -> None:
    """Give freed memory back to the system, ours and malloc's, so that the next measurement starts from the same place."""
    import gc

    gc.collect()
    fastloss.memory.empty_pool()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
