"""Taking the time of work on a device. Work on a GPU is queued: the host's clock times Python there, unless it waits, and no training loop
waits. So there the device takes the time itself, and is held up first until its queue is full."""

from time import perf_counter
from typing import Protocol

import torch

_LONGEST_HOLD = 0.02  # seconds: a provider that waits for the device itself cannot be queued at all


class Clock(Protocol):
    """A stopwatch: `start`, work, `mark`, work, `mark`, and the `laps` in seconds."""

    def start(self, ahead: float = 0.0) -> None: ...
    def mark(self) -> None: ...
    def laps(self) -> list[float]: ...


class HostClock:
    """For a device that is done when the call returns."""

    def start(self, ahead: float = 0.0) -> None:
        self._marks = [perf_counter()]

    def mark(self) -> None:
        self._marks.append(perf_counter())

    def laps(self) -> list[float]:
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


class EventClock:
    """For CUDA: the device's own marks between pieces of work. `ahead`: seconds that the host needs to queue all of it; for half as long
    again the device is kept busy with nothing before the first mark."""

    def start(self, ahead: float = 0.0) -> None:
        torch.cuda.synchronize()
        self._marks: list[torch.cuda.Event] = []
        if ahead > 0:
            hold(1.5 * ahead)
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def laps(self) -> list[float]:
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in zip(self._marks, self._marks[1:], strict=False)]


def clock_of(device: str) -> Clock:
    return EventClock() if device == "cuda" else HostClock()


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def hold(seconds: float) -> None:
    """Keep the current stream of the current GPU busy for about so long."""
    kilohertz = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "clock_rate", 2_000_000)
    torch.cuda._sleep(int(min(seconds, _LONGEST_HOLD) * kilohertz * 1e3))
