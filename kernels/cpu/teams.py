"""Who runs a region: the threads of the OpenMP runtime that torch brought into the process, or else a few of Python's.

A second runtime beside torch's costs whole scheduler ticks, aborts on concurrent calls (Numba's workqueue), kills forked children (its omp)
or ends the process (two copies of libomp). So only a runtime that is loaded already is called, by address: it follows
`torch.get_num_threads()`, is safe under Python threads, and behaves under fork as torch itself does.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .cache import compiled

POOL = "a pool of Python threads"
_I64 = ir.IntType(64)


class Team(NamedTuple):
    name: str
    run: Callable[[int, int, int], None]
    """Call the function at an address with an address, on so many threads, and wait for all of them."""
    share: int = 1
    """Tasks for each thread at the least: to wake one for fewer is not worth it."""


@cache
def team() -> Team:
    """The team of this process. Asked at the first launch, when torch has loaded all it wants."""
    libraries = list(_libraries())
    gnu = "GOMP_parallel", _gomp, libraries  # what comes before torch's own library takes torch's calls, too: so do preloaded runtimes
    llvm = "__kmpc_fork_call", _kmpc, libraries[::-1]  # several may be there for all to see: torch's own comes first
    for name, entry, places in (gnu, llvm):
        for library in places:
            if hasattr(library, name):
                return Team(name, entry(library))
    return Team(POOL, _Pool().run, _SHARE)


def _libraries() -> Iterator[ctypes.CDLL]:
    """Where to look: what every library of the process sees, then the OpenMP runtime in torch's folder, which others may not see."""
    with suppress(OSError, TypeError):  # Windows has no such place
        yield ctypes.CDLL(None)
    for path in sorted(Path(torch.__file__).with_name("lib").glob("*omp*")):
        with suppress(OSError):
            yield _if_loaded(path)


def _if_loaded(path: Path) -> ctypes.CDLL:
    if sys.platform == "win32":
        handle_of = ctypes.WinDLL("kernel32", use_last_error=True).GetModuleHandleW
        handle_of.argtypes, handle_of.restype = [ctypes.c_wchar_p], ctypes.c_void_p
        handle = handle_of(str(path))
        if not handle:
            raise OSError(f"{path} is not loaded")
        return ctypes.CDLL(str(path), handle=handle)
    return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)


# ---------------------------------------------------------------- OpenMP


def _gomp(library: ctypes.CDLL) -> Callable[[int, int, int], None]:
    """GNU's entry for a parallel region. libomp and libiomp5 have it, too, on Linux: it is the one that a torch built by GCC calls."""
    parallel = library.GOMP_parallel
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return lambda region, block, threads: parallel(region, block, threads, 0)


class _Ident(ctypes.Structure):
    """Where in the source a region is. The runtime reads it only to report; `flags` say that a compiler made the call."""

    _fields_ = (
        ("reserved_1", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("reserved_2", ctypes.c_int32),
        ("reserved_3", ctypes.c_int32),
        ("source", ctypes.c_char_p),
    )


def _kmpc(library: ctypes.CDLL) -> Callable[[int, int, int], None]:
    """LLVM's and Intel's own entry (libomp, libiomp5), which is what their runtime has on macOS and Windows."""
    source = b";unknown;fastloss;0;0;;"
    ident = _Ident(0, 2, 0, len(source), source)
    microtask, _ = _foreign(_microtask, 4)
    thread_number, push_num_threads, fork_call = library.__kmpc_global_thread_num, library.__kmpc_push_num_threads, library.__kmpc_fork_call
    thread_number.argtypes, thread_number.restype = [ctypes.c_void_p], ctypes.c_int32
    push_num_threads.argtypes, push_num_threads.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32], None
    fork_call.argtypes, fork_call.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p], None  # what follows is variadic

    def run(region: int, block: int, threads: int) -> None:
        here = ctypes.addressof(ident)
        push_num_threads(here, thread_number(here), threads)
        fork_call(here, 2, microtask.address, ctypes.c_void_p(region), ctypes.c_void_p(block))

    return run


# ---------------------------------------------------------------- Python's threads

_STATE, _INSIDE = range(2)  # words of a gate; the states of a region are to come, open and over
_OPEN, _OVER = 1, 2
_SHARE = 8  # tasks are 3 to 15 us; shared with one worker, a step of 256x1000 (8 tasks) took 1.1 times as long, of 2048x1000 (32) 0.8
_PATIENCE = 1000  # times that a worker who is there before its caller lets others run: who wakes another is often put to sleep for it


class _Pool:
    """Threads that wait for tickets to a region. The caller works at once and waits for nobody who has not come in: a worker that is busy,
    or late, finds the region over. So callers cannot wait for one another.

    A region is open no longer than the one foreign call in which the caller works and then waits. Python raises no exception in there, so
    whatever interrupts the caller, the memory that a region writes to is its own until the last worker is out.
    """

    def __init__(self) -> None:
        self._code, (self._lead, self._join) = zip(_foreign(_lead, 4), _foreign(_join, 4), strict=True)
        self._give_way = ctypes.cast(_give_way(), ctypes.c_void_p).value
        self._start_anew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_anew)

    def _start_anew(self) -> None:
        self._lock = threading.RLock()  # a finalizer may call a loss in the middle of hiring
        self._workers = 0
        self._tickets: SimpleQueue[tuple[int, int, Any]] = SimpleQueue()

    def run(self, region: int, block: int, threads: int) -> None:
        if self._workers < threads - 1:
            self._hire(threads - 1)
        gate = (ctypes.c_int64 * 2)()
        for _ in range(threads - 1):
            self._tickets.put((region, block, gate))
        self._lead(region, block, ctypes.addressof(gate), self._give_way)

    def _hire(self, workers: int) -> None:
        with self._lock, suppress(RuntimeError):  # no more threads, or the interpreter is ending: with those there are
            while self._workers < workers:
                threading.Thread(target=self._work, args=(self._tickets,), name="fastloss", daemon=True).start()
                self._workers += 1

    def _work(self, tickets: "SimpleQueue[tuple[int, int, Any]]") -> None:
        while True:
            region, block, gate = tickets.get()
            if gate[_STATE] < _OVER:
                self._join(region, block, ctypes.addressof(gate), self._give_way)
            del gate


def _give_way() -> Any:
    """The system's function with which a thread that waits lets others run."""
    if sys.platform == "win32":
        return ctypes.WinDLL("kernel32").SwitchToThread
    return ctypes.CDLL(None).sched_yield


# ---------------------------------------------------------------- compiled


@intrinsic
def _call(typingctx: Any, function: Any, argument: Any) -> Any:
    """Call the function at an address with an address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = ir.FunctionType(ir.VoidType(), [_I64]).as_pointer()
        builder.call(builder.inttoptr(args[0], pointer), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _add(typingctx: Any, gate: Any, word: Any, number: Any) -> Any:
    """Add to a word of a gate; what it was before. All threads see all such additions in one order."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = builder.gep(builder.inttoptr(args[0], _I64.as_pointer()), [args[1]])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), codegen


def _microtask(thread: Any, bound: Any, region: Any, block: Any) -> None:
    """What LLVM's runtime calls on every thread: with the addresses of two numbers of the thread, then what was given."""
    _call(region, block)


def _lead(region: Any, block: Any, gate: Any, give_way: Any) -> None:
    _add(gate, _STATE, 1)
    _call(region, block)
    _add(gate, _STATE, 1)
    while _add(gate, _INSIDE, 0) > 0:
        _call(give_way, 0)


def _join(region: Any, block: Any, gate: Any, give_way: Any) -> None:
    _add(gate, _INSIDE, 1)  # before the look: who ends the region after the look sees this
    waits = 0
    while _add(gate, _STATE, 0) < _OPEN and waits < _PATIENCE:
        _call(give_way, 0)
        waits += 1
    if _add(gate, _STATE, 0) == _OPEN:
        _call(region, block)
    _add(gate, _INSIDE, -1)


def _foreign(body: Callable[..., None], parameters: int) -> tuple[Any, Callable[..., None]]:
    """Numba's compiled function, and the same to be called from Python, which lets go of its lock meanwhile."""
    made = compiled(body, types.void(*[types.int64] * parameters))
    return made, ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * parameters)(made.address)
