"""The first call of each loss compiles for seconds. `warmup` and `fastloss warmup` do that beforehand."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import torch

from . import backends, memory
from .loss import COMPUTE
from .usual_calls import USES, Shape, calls, make

USUAL = ("cross_entropy", "binary_cross_entropy_with_logits")


class Warmed(NamedTuple):
    """What `warmup` did for one loss and dtype."""

    loss: str
    dtype: torch.dtype
    device: str
    compiled: int
    """Kernels that were compiled, and kept on disk where that is possible."""
    found: int
    """Kernels that were on disk already, and were loaded. Those that this process has used before are not counted at all."""
    seconds: float


def warmup(
    losses: str | Sequence[str] = USUAL,
    dtypes: torch.dtype | Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    device: str | torch.device | None = None,
    *,
    shapes: Sequence[Shape] | None = None,
    progress: bool = True,
) -> list[Warmed]:
    """Compile the kernels of these losses, or load them where they have been compiled before, so that no step of a program has to.

    Each loss is called with and without gradients on zeros, up to 32 MiB of logits at a time. On CPU that is enough for logits of any
    shape, (N, C) and (N, C, d1, ...), whose rows or positions lie without gaps. On CUDA kernels differ with the number of classes, too:
    give `shapes` as your program has them.

    Compiled kernels are kept on disk. Of processes that want the same ones at the same time, one compiles them and the others wait for it.

    Args:
        losses: names of fastloss's functions, or 'all'. `cross_entropy` is that of class indices; with label smoothing it is
            'smoothed_cross_entropy' here, with class probabilities 'soft_cross_entropy', each with kernels of its own.
        dtypes: of the logits.
        device: None: 'cuda' if there is one, else 'cpu'.
        shapes: of the logits (those of a linear layer, too), (N, C) or (N, C, d1, ...), in place of those that are tried by default.
        progress: whether to draw a bar on stderr, where that is a terminal.

    Returns:
        What was done, one entry for each loss and dtype.

    Raises:
        BackendError: the kernels for this device cannot run on this machine.
        TypeError: a dtype that the kernels do not have.
        ValueError: a name that is no loss, or a shape with fewer than two dimensions.

    >>> import fastloss
    >>> done = fastloss.warmup("binary_cross_entropy_with_logits", torch.float32, "cpu")
    >>> done[0].loss, done[0].dtype
    ('binary_cross_entropy_with_logits', torch.float32)
    """
    names, wanted = _names(losses), _dtypes(dtypes)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    for shape in shapes or ():
        if len(shape) < 2:
            raise ValueError(f"shapes must be (N, C) or (N, C, d1, ...), got {tuple(shape)}")
    backend = backends.backend_of(where.type)
    if backend is None:
        raise backends.BackendError(f"there are no kernels for device {where}")
    jobs = [(name, dtype, calls(USES[name], dtype, shapes)) for name in names for dtype in wanted]
    bar = _Bar(sum(len(of) for _, _, of in jobs), progress and sys.stderr.isatty())
    done, kept = [], memory.pool_bytes()
    quiet = torch.inference_mode(False), torch.enable_grad(), torch.autocast(where.type, enabled=False)
    with bar, backends.use_backend(backend), quiet[0], quiet[1], quiet[2]:
        for name, dtype, of in jobs:
            start = perf_counter()
            with _counted(backend) as counts:
                for call in of:
                    bar.step(f"{name} {_short(dtype)}")
                    make(call, USES[name], dtype, where)
            done.append(Warmed(name, dtype, str(where), counts[False], counts[True], perf_counter() - start))
    if not kept:
        memory.empty_pool()
    return done


def _names(losses: str | Sequence[str]) -> list[str]:
    names = list(USES) if losses == "all" else [losses] if isinstance(losses, str) else list(losses)
    for name in names:
        if name not in USES:
            raise ValueError(f"losses must be 'all' or among {', '.join(USES)}, got {name!r}")
    return names


def _dtypes(dtypes: torch.dtype | Sequence[torch.dtype]) -> list[torch.dtype]:
    wanted = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
    for dtype in wanted:
        if dtype not in COMPUTE:
            raise TypeError(f"dtypes must be among {', '.join(map(_short, COMPUTE))}, got {dtype}")
    return wanted


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _counted(backend: str) -> Iterator[dict[bool, int]]:
    """How many kernels are compiled within (False), and found on disk (True)."""
    counts = {False: 0, True: 0}
    if backend == "numba":
        from .kernels.cpu.launch import built

        before = len(built)
        yield counts
        for one in built[before:]:
            counts[one.found] += 1
        return
    from triton import knobs

    listener = knobs.compilation.listener

    def noting(**event: object) -> None:
        counts[bool(event["cache_hit"])] += 1
        if listener is not None:
            listener(**event)

    knobs.compilation.listener = noting
    try:
        yield counts
    finally:
        knobs.compilation.listener = listener


class _Bar:
    """One line that is drawn again and again."""

    WIDTH = 24

    def __init__(self, steps: int, shown: bool) -> None:
        self._steps, self._shown, self._done, self._start = steps, shown, 0, perf_counter()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *problem: object) -> None:
        self._draw("")

    def step(self, what: str) -> None:
        """Begin the next step."""
        share = self._done / self._steps
        self._done += 1
        filled = int(share * self.WIDTH)
        self._draw(f"{share:4.0%} |{'#' * filled}{' ' * (self.WIDTH - filled)}| {perf_counter() - self._start:.0f} s  {what}")

    def _draw(self, line: str) -> None:
        if self._shown:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """The command. The exit status is 0; 1 if the kernels cannot run here, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="fastloss warmup", description="Compile the kernels of losses before they are used.")
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=f"{', '.join(USES)}; default: {' '.join(USUAL)}")
    parser.add_argument("--all", action="store_true", help="all of them")
    names = [_short(dtype) for dtype in COMPUTE]
    parser.add_argument("--dtype", nargs="+", choices=names, default=["float32", "bfloat16"], help="default: float32 bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--shape", nargs="+", metavar="NxC", help="of the logits, for CUDA: 8192x128256")
    chosen = parser.parse_args(arguments)
    start = perf_counter()
    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in chosen.shape] if chosen.shape else None
        dtypes = [getattr(torch, name) for name in chosen.dtype]
        done = warmup("all" if chosen.all else chosen.losses or USUAL, dtypes, chosen.device, shapes=shapes)
    except ValueError as problem:
        parser.error(str(problem))
    except backends.BackendError as problem:
        print(f"fastloss warmup: {problem}", file=sys.stderr)
        return 1
    for one in done:
        print(f"{one.loss:34}{_short(one.dtype):10}{one.compiled:4} compiled {one.found:4} found {one.seconds:7.1f} s")
    print(f"{sum(one.compiled for one in done)} kernels compiled, {sum(one.found for one in done)} found, {perf_counter() - start:.1f} s")
    return 0
