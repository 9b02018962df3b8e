"""What is not a large batch: the price of a small call, from which size on it pays, more threads, a new process, fewer instructions."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch

from .cases import Case, make_inputs
from .child import child
from .crossover import crossover
from .providers import COMPILED, EAGER, FASTLOSS, PROVIDERS
from .runner import Runner, Times, configured
from .timing import Step, interleave

SMALL = Case("cross_entropy", (32, 10))
AVX2, NATIVE = "AVX2", "AVX-512"
TARGETED = (
    Case("cross_entropy", (4096, 32000)),
    Case("cross_entropy", (4096, 32000), "bfloat16"),
    Case("cross_entropy, probabilities", (4096, 32000)),
    Case("cross_entropy", (65536, 128)),
    Case("cross_entropy", (8, 21, 512, 512)),
    Case("binary_cross_entropy_with_logits", (65536, 1000)),
    Case("softmax", (4096, 32000)),
)
SCALED = (Case("cross_entropy", (4096, 32000)), Case("binary_cross_entropy_with_logits", (65536, 1000)))


def overhead(calls: int = 200) -> dict[str, Any]:
    """Microseconds of a step on 32 x 10 logits; fastloss as it routes by default (to torch), and with its kernels forced."""
    inputs = make_inputs(SMALL, 4)
    settings: dict[str, tuple[str, dict[str, int]]] = {
        FASTLOSS: (FASTLOSS, {}),
        "fastloss, kernels forced": (FASTLOSS, {"min_numel": 0}),
        EAGER: (EAGER, {}),
        COMPILED: (COMPILED, {}),
    }
    steps = {name: _many(Runner(PROVIDERS[of], SMALL, inputs), config, calls) for name, (of, config) in settings.items()}
    series = interleave(steps, seconds=4, least=7, most=25)
    return {"case": SMALL.key, "seconds": {name: asdict(one.spread()) for name, one in series.items()}}


def _many(runner: Runner, config: dict[str, int], calls: int) -> Step:
    def step(turn: int) -> Times:
        forward = backward = 0.0
        with configured(config):
            for call in range(calls):
                times = runner.step(turn + call)
                forward, backward = forward + times.forward, backward + times.backward
        return Times(forward / calls, backward / calls)

    return step


def scaling(seconds: float = 6) -> dict[str, Any]:
    """How many times as fast a step is with all threads as with one, for fastloss and for torch."""
    most = torch.get_num_threads()
    counts = sorted({1, most, *(2**n for n in range(1, most.bit_length()) if 2**n <= most)})
    found: dict[str, Any] = {}
    for case in SCALED:
        inputs = make_inputs(case, 2)
        steps: dict[str, Step] = {}
        for name in (FASTLOSS, EAGER):
            for count in counts:
                steps[f"{name}@{count}"] = Runner(PROVIDERS[name], case, inputs, count).step
        series = interleave(steps, seconds, least=3)
        found[case.key] = {
            name: {str(count): asdict(series[f"{name}@{count}"].ratio_to(series[f"{name}@1"])) for count in counts}
            for name in (FASTLOSS, EAGER)
        }
    return found


def avx2(seconds: float = 6) -> dict[str, Any]:
    """Seconds of a step whose kernels are compiled for a CPU that has AVX2 and no more, beside this CPU's own, and the ratio of the two.

    Nothing where this CPU has no AVX-512. Who runs them is this CPU: one that has only AVX2 may do so faster or slower.
    """
    from llvmlite.binding import get_host_cpu_features

    found: dict[str, Any] = {}
    if not get_host_cpu_features().get("avx512f"):
        return found
    with tempfile.TemporaryDirectory() as cache:
        haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": cache}
        for case in TARGETED:
            with ExitStack() as processes:
                steps: dict[str, Step] = {}
                for name, environment in {AVX2: haswell, NATIVE: {}}.items():
                    process = processes.enter_context(child(environment))
                    process.ask(do="prepare", provider=FASTLOSS, case=case.key, inputs=2, threads=torch.get_num_threads())
                    steps[name] = lambda turn, process=process: Times(*process.ask(do="step", turn=turn))  # type: ignore[misc]
                series = interleave(steps, seconds, least=7)
            found[case.key] = {name: asdict(one.spread()) for name, one in series.items()}
            found[case.key]["speed"] = asdict(series[AVX2].ratio_to(series[NATIVE]))
    return found


def startup() -> dict[str, Any]:
    """Seconds of the first steps in a new process: with empty caches of compiled code, with what that process left there, and with what
    `fastloss warmup` leaves in empty ones; and the seconds that this command takes."""
    case = Case("cross_entropy", (4096, 1000))
    found: dict[str, Any] = {"case": case.key, "imports": _imports()}
    for name in (FASTLOSS, EAGER, COMPILED):
        with tempfile.TemporaryDirectory() as caches:
            environment = {"NUMBA_CACHE_DIR": os.path.join(caches, "numba"), "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor")}
            for state in ("cold", "warm"):
                found.setdefault(name, {})[state] = _first_steps(environment, name, case)
    with tempfile.TemporaryDirectory() as caches:
        environment = {"NUMBA_CACHE_DIR": caches}
        start = perf_counter()
        subprocess.run([sys.executable, "-m", "fastloss", "warmup"], stdout=subprocess.DEVNULL, check=True, env=_environment(environment))
        found["fastloss warmup"] = perf_counter() - start
        found[FASTLOSS]["after fastloss warmup"] = _first_steps(environment, FASTLOSS, case)
    return found


def _first_steps(environment: dict[str, str], provider: str, case: Case) -> Any:
    with child(environment) as process:
        return process.ask(do="startup", provider=provider, case=case.key)


def _environment(more: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **(more or {})}


def _imports() -> dict[str, float]:
    """Seconds to import torch, and fastloss after it, in a process that does nothing else."""
    code = "from time import perf_counter as t; a = t(); import torch; b = t(); import fastloss; print(b - a, t() - b)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment()).stdout
    return dict(zip(("torch", "fastloss"), map(float, text.split()), strict=True))


EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {
    "overhead": overhead,
    "crossover": crossover,
    "scaling": scaling,
    "startup": startup,
    "avx2": avx2,
}


def names(chosen: Sequence[str]) -> list[str]:
    """`chosen` in the order they are run."""
    return [name for name in EXTRAS if name in chosen]
