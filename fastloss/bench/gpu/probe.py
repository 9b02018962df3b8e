"""The first stage: which machine this is, how fast it moves bytes, and whether our kernels would serve a call at all."""

from statistics import median

import torch

import fastloss

from .. import machine
from ..clock import clock_of
from .stage import Day

_ROUNDS = 20


def probe(day: Day) -> None:
    """Facts, copy rate, read rate. Stops the day where no kernel of ours can run."""
    if day.device == "cuda" and not torch.cuda.is_available():
        day.stop("torch sees no CUDA device")
    here = machine.describe()
    day.save(machine=here, commit=here["commit"])
    backend = fastloss.backends.backend_of(day.device)
    assert backend is not None
    problem = fastloss.backends.unavailable(backend)
    if problem:
        day.stop(f"{backend}: {problem}")
    rows = 4096 if not day.tiny else 64
    with fastloss.use_backend(backend):
        route = fastloss.explain(
            fastloss.cross_entropy,
            torch.empty(rows, rows, device=day.device),
            torch.zeros(rows, dtype=torch.int64, device=day.device),
        )
    if route.backend != backend:
        day.stop(f"a call goes to {route.backend}, not to {backend}: {route.reason}")
    size = 1 << 20 if day.tiny else None
    moved, times = machine.copy_times(day.device, size, _ROUNDS)
    day.save(copy_gb_s=moved / median(times) / 1e9, best_copy_gb_s=moved / min(times) / 1e9, read_gb_s=_read_rate(day.device, moved // 2))


def _read_rate(device: str, size: int) -> float:
    """GB/s of a sum, which only reads."""
    x, clock = torch.ones(size // 4, device=device), clock_of(device)
    x.sum()
    clock.start(ahead=2e-3)
    for _ in range(_ROUNDS):
        x.sum()
        clock.mark()
    return size / median(clock.laps()) / 1e9
