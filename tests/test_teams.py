"""Who runs a region: OpenMP by either entry, or a pool of Python threads. The same bits from all, and nobody waits for ever."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import class_inputs

import fastloss
from fastloss.kernels.cpu import launch, teams

Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
COUNTS = (1, 2, 3, 5)
WAIT = 60  # seconds, for what happens at once


@pytest.fixture(scope="module")
def pool() -> teams._Pool:
    return teams._Pool()


def address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


# ---------------------------------------------------------------- losses


def losses() -> Iterator[tuple[str, Callable[[torch.Tensor], Any], torch.Tensor]]:
    """Of several tasks: many rows, few long rows, rows in lanes, elements; and regions whose workers have memory of their own."""
    many, long, few = (class_inputs(shape, torch.float32, weighted=True) for shape in ((700, 300), (3, 70000), (9000, 20)))
    soft = class_inputs((700, 300), torch.float32, soft=True)["target"]
    indices, probabilities = torch.randint(300, (700, 4)), torch.rand(700, 4)
    for name, t in {"many rows": many, "few rows": long, "rows in lanes": few}.items():
        yield name, lambda x, t=t: fastloss.cross_entropy(x, t["target"], t["weight"]), t["input"]
    yield "probabilities", lambda x: fastloss.cross_entropy(x, soft), many["input"]
    yield "binary", lambda x: fastloss.binary_cross_entropy_with_logits(x, soft), many["input"]
    yield "softmax", lambda x: fastloss.softmax(x, 1), many["input"]
    yield "sparse", lambda x: fastloss.sparse_soft_cross_entropy(x, indices, probabilities), many["input"]
    yield "statistics", lambda x: sum(t.sum() for t in fastloss.token_statistics(x, long["target"])[:3]), long["input"]


def bits() -> list[tuple[str, bytes, bytes]]:
    """Loss and gradient of everything in `losses`."""
    torch.manual_seed(0)
    found = []
    for name, call, logits in losses():
        leaf = logits.clone().requires_grad_()
        value = call(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, value.detach())
        found.append((name, value.detach().numpy().tobytes(), gradient.numpy().tobytes()))
    return found


def kmpc_of_a_stub(calls: list[int]) -> Callable[[int, int, int], None]:
    """The entry of LLVM's runtime over one that only starts threads: C functions of the true ones' signatures."""
    number = ctypes.c_int32
    Microtask = ctypes.CFUNCTYPE(None, ctypes.POINTER(number), ctypes.POINTER(number), ctypes.c_void_p, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, number, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    def fork_call(ident: int, count: int, microtask: int, region: int, block: int) -> None:
        assert (ident, count) == (idents[-1], 2)
        crew = [threading.Thread(target=Microtask(microtask), args=(number(n), number(n), region, block)) for n in range(calls[-1])]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, number, number)
    def push_num_threads(ident: int, thread: int, threads: int) -> None:
        assert thread == 7
        idents.append(ident)
        calls.append(threads)

    idents: list[int] = []
    thread_number = ctypes.CFUNCTYPE(number, ctypes.c_void_p)(lambda ident: 7)
    entries = {"global_thread_num": thread_number, "push_num_threads": push_num_threads, "fork_call": fork_call}
    return teams._kmpc(SimpleNamespace(**{f"__kmpc_{name}": entry for name, entry in entries.items()}))  # type: ignore[arg-type]


@pytest.mark.parametrize("team", [teams.POOL, "LLVM's entry, over a stub"])
def test_the_same_bits(team: str, pool: teams._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bits()
    calls: list[int] = []
    run = pool.run if team == teams.POOL else kmpc_of_a_stub(calls)
    monkeypatch.setattr(launch, "team", lambda: teams.Team(team, lambda *launch: (launched.append(launch[2]), run(*launch))[0]))
    for threads in COUNTS:
        launched: list[int] = []
        torch.set_num_threads(threads)
        assert bits() == expected
        assert (max(launched, default=1), calls[-1:]) == (threads, launched[-1:] if calls else [])


# ---------------------------------------------------------------- the pool


@pytest.mark.parametrize("threads", COUNTS)
def test_as_many_threads_as_wanted_come(threads: int, pool: teams._Pool) -> None:
    barrier, came = threading.Barrier(threads), []

    @Region
    def region(block: int) -> None:
        barrier.wait(WAIT)
        came.append((threading.get_ident(), block))

    pool.run(address(region), 42, threads)
    assert len({thread for thread, _ in came}) == len(came) == threads
    assert {block for _, block in came} == {42}


def test_nobody_waits_for_a_busy_worker() -> None:
    """A caller inside another call, and callers beside a worker that does not come back, do their tasks themselves."""
    pool = teams._Pool()
    leave, entered, done = threading.Event(), threading.Event(), []
    caller = threading.get_ident()

    @Region
    def inner(block: int) -> None:
        done.append(threading.get_ident())

    @Region
    def outer(block: int) -> None:
        if threading.get_ident() != caller:
            entered.set()
            assert leave.wait(WAIT)
            return
        assert entered.wait(WAIT)
        for _ in range(1000):
            pool.run(address(inner), 0, 2)
        leave.set()

    pool.run(address(outer), 0, 2)
    assert done == [caller] * 1000
    barrier = threading.Barrier(2)  # the worker throws the old tickets away, and comes
    pool.run(address(Region(lambda block: barrier.wait(WAIT))), 0, 2)


@pytest.mark.parametrize("by", ["keyboard", "another signal"])
def test_an_interrupted_caller_waits_for_the_workers(by: str, pool: teams._Pool) -> None:
    """The memory that a region writes to is the caller's to let go."""
    entered, left = threading.Event(), []
    caller = threading.get_ident()
    number = signal.SIGINT if by == "keyboard" else signal.SIGTERM

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    @Region
    def region(block: int) -> None:
        if threading.get_ident() == caller:
            assert entered.wait(WAIT)
            return
        entered.set()
        for _ in range(3):
            signal.raise_signal(number)
            threading.Event().wait(0.05)
        left.append(True)

    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run(address(region), 0, 2)
    finally:
        signal.signal(number, before)
    assert left == [True]


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool, came = teams._Pool(), []
    monkeypatch.setattr(threading.Thread, "start", refuse)
    pool.run(address(Region(lambda block: came.append(block))), 1, 4)
    assert came == [1]


# ---------------------------------------------------------------- processes

PREAMBLE = """
import ctypes, hashlib, os, signal, sys, threading
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in HIDDEN:
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = Library
import torch, fastloss
fastloss.config.min_numel = 0
from fastloss.kernels.cpu.teams import team
torch.manual_seed(0)
X, Y = torch.randn(8000, 300, requires_grad=True), torch.randint(300, (8000,))
def step():
    loss = fastloss.cross_entropy(X, Y)
    (gradient,) = torch.autograd.grad(loss, X)  # kernels alone: torch's own functions would hang after a fork
    return hashlib.sha256(loss.detach().numpy().tobytes() + gradient.numpy().tobytes()).hexdigest()
torch.set_num_threads(1)
EXPECTED = step()
def same(threads, times=1):
    torch.set_num_threads(threads)
    return all(step() == EXPECTED for _ in range(times))
assert all(same(threads) for threads in (1, 2, 3, 5))
"""
LIFE = """
wrong = []
def work(times):
    wrong.extend("thread" for _ in range(times) if step() != EXPECTED)
def at_once(count):
    crew = [threading.Thread(target=work, args=(10,)) for _ in range(count)]
    [t.start() for t in crew]; [t.join() for t in crew]
at_once(8)

torch.set_num_threads(2)
for _ in range(3):  # after use
    child = os.fork()
    if child == 0:
        before = threading.active_count()
        fine = all(step() == EXPECTED for _ in range(5)) and threading.active_count() == before + 1
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

class Stop(Exception): pass
def stop(number, frame): raise Stop
signal.signal(signal.SIGALRM, stop)
stopped = 0
for k in range(200):  # anywhere in a step
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-5 * k)
        step()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Stop:
        stopped += 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert stopped > 20, stopped
assert same(2, 5) and not wrong

# the interpreter ends while a worker, and a caller that is not waited for, are in a region. (In torch's functions that ends in abort().)
sleep = ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p).value
threading.Thread(target=team().run, args=(sleep, 1000, 2), daemon=True).start()
"""


def run(script: str, hidden: tuple[str, ...], **environment: str) -> str:
    before = f"HIDDEN = {hidden!r}\n"
    command = [sys.executable, "-c", before + PREAMBLE + script + "\nprint(team().name, EXPECTED)"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, **environment}, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_without_openmp() -> None:
    assert run(LIFE, ("GOMP_parallel",)).startswith(f"{teams.POOL} ")


def runtimes() -> list[Path]:
    """LLVM's and Intel's OpenMP on this machine, loaded by nobody: distributions' and pip's `intel-openmp`."""
    found = [path for pattern in ("llvm-*/lib/libomp.so", "*-linux-gnu/libomp.so.5") for path in Path("/usr/lib").glob(pattern)]
    found += map(Path, filter(None, [os.environ.get("FASTLOSS_TEST_LIBOMP")]))
    try:
        files = metadata.files("intel-openmp") or []
    except metadata.PackageNotFoundError:
        files = []
    return found + [Path(str(file.locate())).resolve() for file in files if file.name == "libiomp5.so"]


@pytest.mark.skipif(sys.platform != "linux" or not runtimes(), reason="no libomp or libiomp5 on this machine")
def test_llvm_and_intel_by_their_own_entry() -> None:
    for library in runtimes():
        found = run("", ("GOMP_parallel",), LD_PRELOAD=str(library))
        assert found.startswith("__kmpc_fork_call "), library


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with GNU's runtime on Linux only")
def test_gnu_is_found_in_torchs_folder_where_the_process_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if not list(Path(torch.__file__).with_name("lib").glob("*gomp*")):
        pytest.skip("this torch has no OpenMP runtime in its folder")
    everything = list(teams._libraries())
    assert len(everything) > 1
    monkeypatch.setattr(teams, "_libraries", lambda: iter(everything[1:]))
    found = teams.team.__wrapped__()
    barrier = threading.Barrier(2)
    found.run(address(Region(lambda block: barrier.wait(WAIT))), 0, 2)
    assert found.name == "GOMP_parallel"


def test_a_library_that_nobody_has_loaded(tmp_path: Path) -> None:
    """A second runtime beside torch's would end the process."""
    with pytest.raises(OSError, match=r"libomp\.so"):
        teams._if_loaded(tmp_path / "libomp.so")
