"""`python -m fastloss doctor`: what is installed, who will compute and why, and whether it computes rightly here."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

from .backends import BackendName
from .bench import machine

Status = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    topic: str
    status: Status
    text: str


def main(arguments: Sequence[str]) -> int:
    """Print the report. The exit status is 0 if nothing failed, else 1; 2 for a wrong command line."""
    if set(arguments) - {"--json"}:
        print("usage: fastloss doctor [--json]", file=sys.stderr)
        return 2
    found = examine()
    failed = any(finding.status == "FAIL" for finding in found)
    if arguments:
        report = {"healthy": not failed, "machine": machine.describe(), "findings": [asdict(finding) for finding in found]}
        print(json.dumps(report, indent=1))
    else:
        width = max(len(finding.topic) for finding in found)
        print("\n".join(f"{finding.status:5}{finding.topic:{width}}  {finding.text}" for finding in found))
        print("\n" + ("something is wrong: see FAIL above" if failed else "fastloss is sound on this machine"))
    return 1 if failed else 0


def examine() -> list[Finding]:
    """All findings. A check that cannot be made is a finding, not an exception."""
    checks = (_versions, _devices, _backends, _threads, _cache, _pool, _self_checks, _speed)
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except Exception as problem:
            found.append(Finding(check.__name__.strip("_"), "FAIL", f"{type(problem).__name__}: {problem}"))
    return found


def _versions() -> list[Finding]:
    installed = {name: machine.version(name) for name in ("fastloss", "torch", "numba", "llvmlite", "triton", "numpy")}
    text = ", ".join(f"{name} {version or '(none)'}" for name, version in installed.items())
    return [
        Finding("versions", "ok", f"{text}, Python {sys.version.split()[0]}"),
        Finding("installed in", "ok", str(Path(__file__).parent)),
    ]


def _devices() -> list[Finding]:
    found = [Finding("processor", "ok", f"{machine.processor()}, {os.cpu_count()} cores")]
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(Finding(f"cuda:{index}", "ok", f"{name}, compute capability {major}.{minor}"))
    return found


def _backends() -> list[Finding]:
    """For each device there is, where an ordinary call goes; for each kernel package, why it cannot run."""
    found = [Finding("chosen backend", "ok", f"{fastloss.get_backend()!r} (set_backend, use_backend or FASTLOSS_BACKEND)")]
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        logits, target = torch.zeros(1024, 64, device=device), torch.zeros(1024, dtype=torch.int64, device=device)
        route = fastloss.explain(fastloss.cross_entropy, logits, target)
        mine = route.backend != "torch" or fastloss.get_backend() == "torch"
        found.append(Finding(f"on {device}", "ok" if mine else "FAIL", f"{route.backend} ({route.reason})"))
    for name in ("numba", "triton"):
        problem = fastloss.backends.unavailable(name)  # type: ignore[arg-type]
        if problem is not None:
            found.append(Finding(name, "note", f"not usable: {problem}"))
    return found


def _threads() -> list[Finding]:
    runtimes = sorted(set(re.findall(r"\S*/(lib(?:gomp|iomp|omp)[^/\s]*)", _read("/proc/self/maps"))))
    more = f"; OpenMP runtime {', '.join(runtimes)}" if runtimes else "; no OpenMP runtime seen"
    status: Status = "note" if len(runtimes) > 1 else "ok"
    found = [Finding("threads", "ok", f"torch {torch.get_num_threads()} of {os.cpu_count()} cores{more}")]
    if status == "note":
        found.append(Finding("OpenMP", "note", f"{len(runtimes)} runtimes in one process: they spin against each other"))
    if os.environ.get("OMP_NUM_THREADS"):
        found.append(Finding("OMP_NUM_THREADS", "note", os.environ["OMP_NUM_THREADS"]))
    return found


def _cache() -> list[Finding]:
    """Where Numba keeps compiled kernels: without a writable place every process compiles again."""
    if fastloss.backends.unavailable("numba") is not None:
        return []
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or Path(fastloss.backends.kernels("numba").__file__ or "").parent / "__pycache__")  # type: ignore[attr-defined]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as problem:
        return [Finding("compiled kernels", "note", f"{folder} cannot be written ({problem.strerror}): set NUMBA_CACHE_DIR")]
    return [Finding("compiled kernels", "ok", f"kept in {folder}")]


def _pool() -> list[Finding]:
    policy = machine.huge_pages()
    status: Status = "ok" if policy in ("always", "madvise") else "note"
    limit = fastloss.config.pool_max_bytes
    pool = f"keeps up to {limit >> 20} MiB, holds {fastloss.memory.pool_bytes() >> 20} MiB now" if limit > 0 else "turned off"
    return [Finding("huge pages", status, policy), Finding("gradient pool", "ok", pool)]


def _self_checks() -> list[Finding]:
    """Every function on every backend that can run, against float64."""
    found = []
    backends: list[tuple[BackendName, str]] = [("numba", "cpu"), ("triton", "cuda")]
    for backend, device in backends:
        if fastloss.backends.unavailable(backend) is not None:
            continue
        start = perf_counter()
        with fastloss.use_backend(backend):
            wrong = [name for name, error, limit in _errors(device) if not error <= limit]
        took = f"{perf_counter() - start:.1f} s with compiling"
        text = f"wrong: {', '.join(wrong)}" if wrong else f"losses and gradients agree with float64 ({took})"
        found.append(Finding(f"{backend} self-check", "FAIL" if wrong else "ok", text))
    return found


def _errors(device: str) -> list[tuple[str, float, float]]:
    """Name, error and what is allowed, for each function in two dtypes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 257, generator=generator) * 3
    target = torch.randint(257, (64,), generator=generator)
    target[5] = -100
    labels = torch.rand(64, 257, generator=generator)
    calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "cross_entropy": lambda f, x: f.cross_entropy(x, target.to(x.device)),
        "cross_entropy (smoothed)": lambda f, x: f.cross_entropy(x, target.to(x.device), label_smoothing=0.1),
        "cross_entropy (probabilities)": lambda f, x: f.cross_entropy(x, labels.to(x)),
        "nll_loss": lambda f, x: f.nll_loss(x, target.to(x.device)),
        "binary_cross_entropy_with_logits": lambda f, x: f.binary_cross_entropy_with_logits(x, labels.to(x)),
        "binary_cross_entropy": lambda f, x: f.binary_cross_entropy(x.sigmoid(), labels.to(x)),
        "softmax": lambda f, x: f.softmax(x, dim=1).square().sum(),
        "log_softmax": lambda f, x: f.log_softmax(x, dim=1).square().sum(),
    }
    found = []
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x = logits.to(device, dtype)
        for name, call in calls.items():
            if dtype == torch.bfloat16 and not name.startswith(("cross_entropy", "binary_cross_entropy_with")):
                continue
            ours, truth = _with_gradient(fastloss, call, x), _with_gradient(F, call, x.double())
            error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, truth, strict=True))
            found.append((f"{name} {str(dtype).removeprefix('torch.')}", error, limit))
    return found


def _with_gradient(library: Any, call: Callable[[Any, Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = call(library, leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _speed() -> list[Finding]:
    """One line; the benchmark is another command."""
    logits, target = torch.randn(4096, 4000, requires_grad=True), torch.randint(4000, (4096,))

    def step(function: Callable[..., Tensor]) -> float:
        logits.grad = None
        start = perf_counter()
        function(logits, target).backward()  # type: ignore[no-untyped-call]
        return perf_counter() - start

    pairs = [(step(fastloss.cross_entropy), step(F.cross_entropy)) for _ in range(7)][2:]
    ours, theirs = (sorted(times)[2] for times in zip(*pairs, strict=True))
    text = f"cross_entropy 4096x4000 float32, forward and backward: {ours * 1e3:.1f} ms, torch eager {theirs * 1e3:.1f} ms"
    return [Finding("speed sample", "ok", f"{text} ({theirs / ours:.1f} times as long)")]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
