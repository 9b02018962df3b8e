"""`python -m fastloss doctor`: what is installed, who will compute and why, and whether it computes rightly here."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

from .backends import BackendName, KernelsName
from .bench import machine
from .self_checks import errors, short

Status = Literal["ok", "note", "FAIL"]
DEVICES = ("cpu", "cuda")

_TOPIC_WIDTH = len("NUMBA_DISABLE_JIT")


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    topic: str
    status: Status
    text: str


def main(arguments: Sequence[str]) -> int:
    """Print the report. The exit status is 0 if nothing failed, else 1; 2 for a wrong command line."""
    as_json, chosen = "--json" in arguments, [word for word in arguments if word != "--json"]
    if chosen not in ([], ["--device", "cpu"], ["--device", "cuda"]):
        print("usage: fastloss doctor [--device cpu|cuda] [--json]", file=sys.stderr)
        return 2
    found: list[Finding] = []
    for finding in examine(tuple(chosen[1:]) or DEVICES):
        found.append(finding)
        if not as_json:  # line by line: where nothing is compiled yet, the self-checks take a minute
            print(f"{finding.status:5}{finding.topic:{_TOPIC_WIDTH}}  {finding.text}", flush=True)
    failed = any(finding.status == "FAIL" for finding in found)
    if as_json:
        report = {"healthy": not failed, "machine": machine.describe(), "findings": [asdict(finding) for finding in found]}
        print(json.dumps(report, indent=1))
    else:
        print("\n" + ("something is wrong: see FAIL above" if failed else "fastloss is sound on this machine"))
    return 1 if failed else 0


def examine(devices: Sequence[str] = DEVICES) -> Iterator[Finding]:
    """All findings as they come, with the kernels of these devices tried out. What cannot be checked is a finding, not an exception."""
    checks: dict[str, Callable[[], list[Finding]]] = {
        "versions": _versions, "devices": _devices, "environment": _environment, "backends": _backends, "threads": _threads,
        "openmp": _openmp, "cache": _cache, "self_checks": lambda: _self_checks(devices),
    }  # fmt: skip
    if "cpu" in devices:
        checks |= {"speed": _speed, "pool": _pool}  # the pool last: by then it has been used
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as problem:
            yield Finding(name, "FAIL", short(problem))


def _versions() -> list[Finding]:
    installed = {name: machine.version(name) for name in ("fastloss", "torch", "numba", "llvmlite", "triton", "numpy")}
    text = ", ".join(f"{name} {version or '(none)'}" for name, version in installed.items())
    found = [
        Finding("versions", "ok", f"{text}, Python {sys.version.split()[0]}"),
        Finding("installed in", "ok", str(Path(__file__).parent)),
    ]
    torch_version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if torch_version < (2, 6):
        found.append(Finding("torch", "FAIL", f"{torch.__version__} is too old, 2.6 is needed"))
    elif torch_version < (2, 8):
        text = "no gradient is computed ahead of the backward (docs/memory.md), and the Triton it brings is too old for our CUDA kernels"
        found.append(Finding("torch", "note", f"{torch.__version__} is older than 2.8: {text}"))
    return found


def _devices() -> list[Finding]:
    found = [Finding("processor", "ok", f"{machine.processor()}, {os.cpu_count()} cores")]
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(Finding(f"cuda:{index}", "ok", f"{name}, compute capability {major}.{minor}"))
    return found


def _environment() -> list[Finding]:
    """Variables that change what is computed, or how fast, and are easily forgotten."""
    found = []
    if os.environ.get("OMP_NUM_THREADS"):
        found.append(Finding("OMP_NUM_THREADS", "note", os.environ["OMP_NUM_THREADS"]))
    if _jit_is_disabled():
        found.append(Finding("NUMBA_DISABLE_JIT", "FAIL", "is set: Numba compiles nothing, and no kernel of ours runs on CPU. Unset it"))
    return found


def _jit_is_disabled() -> bool:
    return os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def _problem(name: BackendName) -> str | None:
    """Why these kernels cannot run. Unlike `backends.unavailable` it never raises: the package may be there and broken."""
    try:
        problem = fastloss.backends.unavailable(name)
    except Exception as broken:
        return short(broken)
    return "NUMBA_DISABLE_JIT is set" if problem is None and name == "numba" and _jit_is_disabled() else problem


def _backends() -> list[Finding]:
    """Whether the choice can be served; for each kernel package, why it cannot run; for each device, where an ordinary call goes."""
    choice = fastloss.get_backend()
    problem = _problem(choice) if choice in ("numba", "triton") else None
    text = f"{choice!r} (set_backend, use_backend or FASTLOSS_BACKEND)" + (f", which cannot run here: {problem}" if problem else "")
    found = [Finding("chosen backend", "FAIL" if problem else "ok" if choice == "auto" else "note", text)]
    for name in get_args(KernelsName):
        problem = _problem(name)
        if problem is not None:
            found.append(Finding(name, "note", f"not usable: {problem}"))
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            found.append(_on(device, choice))
        except Exception as broken:
            found.append(Finding(f"on {device}", "FAIL", short(broken)))
    return found


def _on(device: str, choice: BackendName) -> Finding:
    """Where a call goes that is large enough for the kernels."""
    limit = fastloss.config.min_numel
    logits = torch.empty(limit // 32 + 1024, 64, device=device)
    route = fastloss.explain(fastloss.cross_entropy, logits, torch.zeros(len(logits), dtype=torch.int64, device=device))
    if route.backend != "torch":
        small = f"; torch below config.min_numel = {limit} logits" if choice == "auto" else ""
        return Finding(f"on {device}", "ok", f"{route.backend} ({route.reason}){small}")
    if choice in ("auto", "torch"):
        return Finding(f"on {device}", "ok" if choice == "torch" else "FAIL", f"torch ({route.reason})")
    return Finding(f"on {device}", "note", f"BackendError (backend {choice!r} was chosen, but {route.reason})")


def _threads() -> list[Finding]:
    runtimes = sorted(set(re.findall(r"\S*/(lib(?:gomp|iomp|omp)[^/\s]*)", _read("/proc/self/maps"))))
    more = f"; OpenMP runtime {', '.join(runtimes)}" if runtimes else "; no OpenMP runtime seen"
    status: Status = "note" if len(runtimes) > 1 else "ok"
    found = [Finding("threads", "ok", f"torch {torch.get_num_threads()} of {os.cpu_count()} cores{more}")]
    if status == "note":
        found.append(Finding("OpenMP", "note", f"{len(runtimes)} runtimes in one process: they spin against each other"))
    return found


def _openmp() -> list[Finding]:
    """Whose threads run the kernels."""
    if _problem("numba") is not None:
        return []
    from .kernels.cpu.teams import POOL, team

    name = team().name
    if name == POOL:
        return [Finding("OpenMP", "note", f"torch's process has no GOMP_parallel or __kmpc_fork_call: our kernels run on {POOL}")]
    return [Finding("OpenMP", "ok", f"our kernels run on its threads, called by {name}")]


def _cache() -> list[Finding]:
    """Where Numba keeps compiled kernels: without a writable place every process compiles again."""
    if _problem("numba") is not None:
        return []
    from numba.core.caching import FunctionCache

    from .kernels.cpu import launch

    try:
        folder = FunctionCache(launch.region).cache_path  # that of every function in its folder
    except RuntimeError:
        return [_nothing_kept("no folder can be written")]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as problem:  # a full disk, a quota
        return [_nothing_kept(f"nothing can be kept in {folder} ({problem.strerror})")]
    return [Finding("compiled kernels", "ok", f"kept in {folder}")]


def _nothing_kept(why: str) -> Finding:
    text = f"{why}, so this check and every process compile their kernels again (seconds each): set NUMBA_CACHE_DIR"
    return Finding("compiled kernels", "note", text)


def _self_checks(devices: Sequence[str]) -> list[Finding]:
    """Every function on every backend that can run on these devices, against float64."""
    found = []
    for device in devices:
        backend = fastloss.backends.backend_of(device)
        if backend is None or _problem(backend) is not None:
            continue
        start = perf_counter()
        with fastloss.use_backend(backend):
            wrong = [name for name, error, limit in errors(device) if not error <= limit]
        took = f"{perf_counter() - start:.1f} s with compiling"
        text = (
            f"wrong: {', '.join(wrong)}. Delete the compiled kernels and try again"
            if wrong
            else f"losses and gradients agree with float64 ({took})"
        )
        found.append(Finding(f"{backend} self-check", "FAIL" if wrong else "ok", text))
    return found


def _speed() -> list[Finding]:
    """One line, half a second; the benchmark is another command."""
    logits, target = torch.randn(2048, 4000, requires_grad=True), torch.randint(4000, (2048,))
    if _problem("numba") is not None or fastloss.explain(fastloss.cross_entropy, logits, target).backend == "torch":
        return []

    def step(function: Callable[..., Tensor]) -> float:
        logits.grad = None
        start = perf_counter()
        function(logits, target).backward()  # type: ignore[no-untyped-call]
        return perf_counter() - start

    pairs = [(step(fastloss.cross_entropy), step(F.cross_entropy)) for _ in range(7)][2:]
    ours, theirs = (sorted(times)[2] for times in zip(*pairs, strict=True))
    text = f"cross_entropy 2048x4000 float32, forward and backward: {ours * 1e3:.1f} ms, torch eager {theirs * 1e3:.1f} ms"
    return [Finding("speed sample", "ok", f"{text} ({theirs / ours:.1f} times as long)")]


def _pool() -> list[Finding]:
    """Huge pages as the kernel's policy has them, and as it answered the speed sample."""
    policy, refused, limit = machine.huge_pages(), fastloss.memory.huge_pages_refused(), fastloss.config.pool_max_bytes
    if refused is not None:
        huge = Finding("huge pages", "note", f"refused by the kernel ({refused}): the first use of a gradient's memory is slower")
    elif policy in ("always", "madvise"):
        huge = Finding("huge pages", "ok", policy)
    else:
        where = "for this process (PR_SET_THP_DISABLE)" if policy == "off" else f"in {machine.HUGE_PAGES} ('madvise' is enough)"
        huge = Finding("huge pages", "note", f"{policy} {where}: the first use of a gradient's memory is slower")
    pool = f"keeps up to {limit >> 20} MiB, holds {fastloss.memory.pool_bytes() >> 20} MiB now" if limit > 0 else "turned off"
    return [huge, Finding("gradient pool", "ok", pool)]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
