"""Ranks of torch.distributed for tests: four processes started once, of which a test takes the first two, three or all.

    ranks.run(3, function, *arguments) -> what function(rank, *arguments) returned on each, or the exception it raised

`function` is a top-level function of a test module or of a module beside it; `rank` says who it is. All have a timeout, so that a rank that
waits for another which does not come is an error of torch's, and no test hangs.
"""

import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

PROCESSES = 4
PATIENCE = 40  # seconds


class Rank(NamedTuple):
    number: int
    count: int
    group: Any  # None for the default group
    spare: Any  # one that a test may break: ranks 0 and 1 are in it


class Ranks:
    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(PROCESSES)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(number, theirs, str(folder / "store")), daemon=True)
            for number, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def run(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes[:count]:
            pipe.send_bytes(pickle.dumps((count, function, arguments)))
        found = []
        for number, pipe in enumerate(self.pipes[:count]):
            if not pipe.poll(PATIENCE):
                raise AssertionError(f"rank {number} of {count} does not answer")
            found.append(pickle.loads(pipe.recv_bytes()))
        return found

    def returned(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same where none may raise."""
        found = self.run(count, function, *arguments)
        for number, result in enumerate(found):
            if isinstance(result, Exception):
                raise AssertionError(f"rank {number} of {count}: {result!r}\n{getattr(result, 'where', '')}")
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(number: int, pipe: Connection, store: str) -> None:
    import launch_watch
    import torch
    import torch.distributed as dist

    import fastloss
    from fastloss import contract

    sys.stdout = sys.stderr  # gloo writes to it
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    fastloss.config.min_numel, contract.watch = 0, launch_watch.watch
    timeout = timedelta(seconds=PATIENCE / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=PROCESSES, timeout=timeout)
    spare = dist.new_group([0, 1], timeout=timeout)
    groups = {count: dist.new_group(list(range(count)), timeout=timeout) for count in range(1, PROCESSES)}
    groups[PROCESSES] = None
    while (job := pickle.loads(pipe.recv_bytes())) is not None:
        count, function, arguments = job
        torch.manual_seed(0)
        try:
            result = function(Rank(number, count, groups[count], spare), *arguments)
        except Exception as error:
            result = error
            result.where = traceback.format_exc()  # type: ignore[attr-defined]
        pipe.send_bytes(_pickled(result))
    dist.destroy_process_group()


def _pickled(result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))
