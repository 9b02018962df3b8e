"""How a kernel runs: a region of tasks on a team of threads (`teams`).

Tasks are handed out one by one, and no result depends on who ran which, so every team and every number of threads gives the same bits.
"""

import ctypes
import hashlib
import signal
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from . import half
from .arguments import HEADER, Arguments, packer, word
from .cache import compiled
from .teams import team

# Words at the start of a launch's argument block; FLAG is not 0 if something is wrong
_TASKS, _NEXT, FLAG, _WORKERS, _DONE = range(HEADER)
_I64 = ir.IntType(64)


@cache
def _sources() -> str:
    """A fingerprint of this package, of the groups, and of the instructions that were found. Part of every region's signature, so Numba's
    cache on disk never outlives a change in any file, or in what LLVM can do."""
    digest = hashlib.sha256(" ".join(sorted(half.instructions())).encode())
    here = Path(__file__).parent
    for path in (here.parent / "groups.py", *sorted(here.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@intrinsic
def next_task(typingctx: Any, block: Any) -> Any:
    """The number of a task that nobody has taken yet, or -1 when none is left."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        task = builder.atomic_rmw("add", word(builder, args[0], _NEXT), ir.Constant(_I64, 1), "monotonic")
        left = builder.icmp_signed("<", task, builder.load(word(builder, args[0], _TASKS)))
        return builder.select(left, task, ir.Constant(_I64, -1))

    return types.int64(block), codegen


@intrinsic
def last_task(typingctx: Any, block: Any) -> Any:
    """Whether all tasks are done, now that one more is; true once, and what they all have written can be read then. Ask after each."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        done = builder.atomic_rmw("add", word(builder, args[0], _DONE), ir.Constant(_I64, 1), "acq_rel")
        return builder.icmp_signed("==", builder.add(done, ir.Constant(_I64, 1)), builder.load(word(builder, args[0], _TASKS)))

    return types.boolean(block), codegen


@intrinsic
def next_worker(typingctx: Any, block: Any) -> Any:
    """The number of the calling thread, 0, 1, ... in the order in which they ask: for memory that each has to itself. Ask once."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", word(builder, args[0], _WORKERS), ir.Constant(_I64, 1), "monotonic")

    return types.int64(block), codegen


@intrinsic
def raise_flag(typingctx: Any, block: Any) -> Any:
    """Tell the launcher that something is wrong; exceptions cannot leave compiled code that a team called."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(ir.Constant(_I64, 1), word(builder, args[0], FLAG))
        return context.get_dummy_value()

    return types.void(block), codegen


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this block: what Numba has begun to register when an exception comes is lost for good."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


class Launch(NamedTuple):
    """What a region was launched with."""

    region: "Region"
    version: tuple[Any, ...]
    tasks: int
    arguments: Any
    words: bytes


class _Recorded(threading.local):
    launches: list[Launch] | None = None


recorded = _Recorded()
"""Every launch of this thread is put into `recorded.launches`, where there is a list."""


class Built(NamedTuple):
    """A version of a region that this process has compiled, or found compiled on disk."""

    region: "Region"
    version: tuple[Any, ...]
    seconds: float
    found: bool


built: list[Built] = []
"""All of them, in order."""


class Region:
    """A compiled loop over tasks, one version for each dtype (each mixture, where its block has `Floats`) and each value of what its block
    has as `Known`, compiled at first use and cached on disk where that is possible."""

    def __init__(self, body: Callable[[Any], None], block: Any) -> None:
        self.body, self.block = body, block
        self._pack = packer(block)
        self._compiled: dict[tuple[Any, ...], tuple[Any, Callable[[int], None]]] = {}
        self._lock = threading.Lock()

    def signature(self, *version: Any) -> Any:
        """Numba's, for a version: dtypes, that of the logits first, and numbers."""
        return types.void(Arguments(self.block, version, _sources()))

    def compile(self, *version: Any) -> tuple[Any, Callable[[int], None]]:
        """Numba's compiled function for this version, and the same as a function of an address."""
        with self._lock, _uninterrupted():
            if version not in self._compiled:
                start = perf_counter()
                function = compiled(self.body, self.signature(*version))
                self._compiled[version] = function, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)
                built.append(Built(self, version, perf_counter() - start, bool(function.cache_hits)))
            return self._compiled[version]

    def __call__(self, tasks: int, arguments: Any) -> bool:
        """Run all tasks and wait. True if one of them raised the flag."""
        version, words = self._pack(tasks, arguments)
        if recorded.launches is not None:
            recorded.launches.append(Launch(self, version, tasks, arguments, words))
        block = array("q", words)
        self.bound(version, tasks)(block.buffer_info()[0])
        return block[FLAG] != 0

    def bound(self, version: tuple[Any, ...], tasks: int) -> Callable[[int], None]:
        """A function of the address of a packed block that runs all tasks and waits. Another number of threads wants another."""
        function, on_this_thread = self._compiled.get(version) or self.compile(*version)
        threads = min(tasks // team().share, torch.get_num_threads()) if tasks > 1 else 1
        run, address = team().run, function.address
        return (lambda block: run(address, block, threads)) if threads > 1 else on_this_thread


def region(block: Any) -> Callable[[Callable[[Any], None]], Region]:
    """Make a function of an argument block into a Region whose `arguments` are of this kind."""
    return lambda body: Region(body, block)
