"""How fast each launcher is: the bytes it cannot do without, per second, as a share of what this device's own copy moves."""

from collections.abc import Callable
from math import prod
from statistics import quantiles
from typing import Any

import torch

from ..cases import DTYPES
from ..clock import clock_of, wait
from ..machine import cache_of, nvidia_smi
from .compiled import watched
from .launches import Launch, kernel_package, planned
from .stage import Day

_FLUSH = 256 << 20  # bytes written before each launch, so that its inputs are in no cache
_SECONDS, _FEWEST, _MOST = 0.04, 10, 60  # a series of launches: how long, and how many


def speed(day: Day) -> None:
    """All launchers; those that the deadline leaves no time for are counted."""
    stopwatch, copy = Stopwatch(day.device, day.tiny), day.before.get("copy_gb_s")
    launches = planned(day.tiny)
    found: list[dict[str, Any]] = []
    for number, launch in enumerate(launches):
        if day.left() < 5 or (found and "failed" in found[-1] and not _works(day.device)):
            day.save(kernels_left_out=len(launches) - number)
            break
        found.append(_measured(launch, stopwatch, day.device, copy))
        day.save(kernels=found)
    day.save(clocks_after_speed=nvidia_smi())


def _works(device: str) -> bool:
    """False after an access out of bounds: nothing more can be done on the device in this process."""
    try:
        wait(device)
    except RuntimeError:
        return False
    return True


def _measured(launch: Launch, stopwatch: "Stopwatch", device: str, copy: float | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": launch.name, "dtype": launch.dtype, "shape": list(launch.shape)}
    try:
        launcher, arguments = getattr(kernel_package(device), launch.name), launch.arguments(device)
        if device == "cuda":
            with watched() as noted:
                launcher(*arguments)
            facts["launches"] = noted
        low, middle, high = stopwatch.times(lambda: launcher(*arguments))
    except Exception as problem:
        return facts | {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    necessary = launch.bytes()
    moves_all = necessary >= prod(launch.shape) * DTYPES[launch.dtype].itemsize  # what reads little waits for latency, not for bytes
    share = necessary / middle / 1e9 / copy if copy and moves_all else None
    return facts | {"us": middle * 1e6, "low": low * 1e6, "high": high * 1e6, "bytes": necessary, "share": share}


class Stopwatch:
    """Times calls one by one, on a device whose queue is full and whose caches hold something else."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.most = device, 3 if tiny else _MOST
        self.rubbish = torch.empty(1 if tiny else max(_FLUSH, 4 * cache_of(device)), dtype=torch.int8, device=device)

    def times(self, call: Callable[[], Any]) -> tuple[float, float, float]:
        """Seconds: the lower quartile, the median, the upper quartile."""
        call()
        wait(self.device)
        once = self._series(call, 3, ahead=1e-3)
        several = min(self.most, max(_FEWEST, int(_SECONDS / max(min(once), 1e-9))))
        low, middle, high = quantiles(self._series(call, several, ahead=several * 2e-4), n=4, method="inclusive")
        return low, middle, high

    def _series(self, call: Callable[[], Any], count: int, ahead: float) -> list[float]:
        clock = clock_of(self.device)
        clock.start(ahead)
        for _ in range(count):
            self.rubbish.zero_()
            clock.mark()
            call()
            clock.mark()
        return clock.laps()[1::2]
