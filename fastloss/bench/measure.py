"""A case from inputs to numbers: check everybody, time who is right, measure memory. The result is plain data, ready for JSON."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from . import accuracy, floor, footprint
from .cases import Case, Inputs, inputs_to_miss, make_inputs
from .child import child
from .clock import clock_of
from .machine import cache_of
from .providers import EAGER, PROVIDERS, Provider
from .runner import Runner, Times, release_memory
from .timing import Series, Spread, Step, interleave

COPY = "copy"


def measure(
    case: Case,
    names: Sequence[str],
    seconds: float,
    device: str = "cpu",
    memory: bool = True,
    least: int = 5,
    now: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """The result of one case: a dictionary for every provider, and what a copy of the logits costs. `now` is told what is being done."""
    now("making inputs and the float64 truth")
    turnover = 1.25 if device == "cpu" else 4  # a GPU's cache does not forget in order
    inputs = make_inputs(case, inputs_to_miss(case, cache_of(device), turnover), device)
    true = accuracy.truth(case, inputs[0])
    eager = _checked(Runner(PROVIDERS[EAGER], case, inputs), true)
    limit = accuracy.allowed(case, eager)
    providers: dict[str, dict[str, Any]] = {}
    runners: dict[str, Runner] = {}
    steps: dict[str, Step] = {COPY: _copier(inputs), **floor.steps(case.loss, inputs, device)}
    nobody = set(steps)
    with ExitStack() as processes:
        for name in names:
            provider = PROVIDERS[name]
            reason = provider.absent(case.spec, device)
            if reason is not None:
                providers[name] = {"status": "skipped", "reason": reason}
                continue
            now(f"checking {name}")
            try:
                if provider.environment:
                    error, step = _elsewhere(provider, case, len(inputs), true, processes)
                else:
                    runner = Runner(provider, case, inputs)
                    error, step = (eager if name == EAGER else _checked(runner, true)), runner.step
                    runners[name] = runner
            except Exception as problem:  # a rival must never break the rest; if it is us, the suite fails in the end
                providers[name] = {"status": "failed", "reason": _first_line(problem)}
                continue
            providers[name] = {"status": "timed", "error": asdict(error)}
            if error.output > limit.output or error.gradient > limit.gradient:
                providers[name] |= {"status": "wrong", "reason": f"error {error.worst:.1e}, torch eager has {eager.worst:.1e}: not timed"}
                continue
            steps[name] = step
        now(f"timing {len(steps) - len(nobody)} providers in turn, {seconds:g} s")
        series = interleave(steps, seconds, least)
    least_possible = floor.of(case.loss, series)
    for name in steps.keys() - nobody:
        rivals = {other: times for other, times in series.items() if other not in nobody}
        providers[name] |= _numbers(case, rivals, name, series[COPY], least_possible)
        if device == "cuda":
            providers[name] |= _of_the_host(runners[name])
            if memory:
                providers[name]["memory"] = footprint.peak_memory_on_gpu(runners[name].step)
    copied = series[COPY].spread()
    result: dict[str, Any] = {
        "key": case.key,
        "title": case.title,
        "loss": case.loss,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "bytes": case.bytes,
        "rounds": len(series[COPY].times),
        "inputs": len(inputs),
        "copy": asdict(copied) | {"bytes_per_second": 2 * case.bytes / copied.middle},
        "floor": _floor(series, least_possible),
        "providers": {name: providers[name] for name in names},
    }
    del inputs, steps, runners, series, true
    release_memory()
    if memory and device == "cpu" and footprint.can_measure():
        _add_memory(case, result["providers"], now)
    return result


def _checked(runner: Runner, true: accuracy.Truth) -> accuracy.Error:
    output, gradient, _ = runner.results(0, keep=True)
    return accuracy.error_of(true, output, gradient)


def _copier(inputs: list[Inputs]) -> Step:
    """dst.copy_(logits) into memory that is mapped already: the least any step can cost is a little more than this."""
    sink = torch.zeros_like(inputs[0].input)
    clock = clock_of(sink.device.type)

    def copy(turn: int) -> Times:
        clock.start(ahead=1e-4)
        sink.copy_(inputs[turn % len(inputs)].input)
        clock.mark()
        return Times(clock.laps()[0], 0.0)

    return copy


def _elsewhere(provider: Provider, case: Case, inputs: int, true: accuracy.Truth, processes: ExitStack) -> tuple[accuracy.Error, Step]:
    """A provider that lives in a process with other environment variables; its steps are taken in turn with ours all the same."""
    process = processes.enter_context(child(provider.environment))
    process.ask(do="prepare", provider=provider.name, case=case.key, inputs=inputs, threads=torch.get_num_threads())
    with NamedTemporaryFile() as file:
        torch.save(true, file)
        file.flush()
        error = accuracy.Error(*process.ask(do="check", truth=file.name))
    return error, lambda turn: Times(*process.ask(do="step", turn=turn))


def _floor(series: dict[str, Series], floor_series: Series | None) -> dict[str, Any] | None:
    """Seconds of the two kernels that compute nothing, and of what the loss needs of them."""
    if floor_series is None:
        return None
    parts = {"read": series[floor.READ], "read and write": series[floor.READ_AND_WRITE], "step": floor_series}
    return {part: asdict(times.spread()) for part, times in parts.items()}


def _numbers(case: Case, series: dict[str, Series], name: str, copy: Series, least: Series | None) -> dict[str, Any]:
    """Times in seconds; `slower` is how many times longer another took; `copies` the step in copies of the logits; `share_of_floor` how
    much of it the machine would need in any case."""
    mine = series[name]
    copies = copy.ratio_to(mine)
    return {
        "forward": asdict(mine.spread("forward")),
        "backward": asdict(mine.spread("backward")),
        "step": asdict(mine.spread("step")),
        "copies": asdict(copies),
        "share_of_copy_speed": case.spec.passes / (2 * copies.middle),
        "share_of_floor": None if least is None else asdict(mine.ratio_to(least)),
        "bytes_per_logit": 2 * case.torch_dtype.itemsize * copies.middle,
        "slower": {other: asdict(mine.ratio_to(theirs)) for other, theirs in series.items() if other != name},
    }


def _of_the_host(runner: Runner, turns: int = 15) -> dict[str, Any]:
    """On CUDA: seconds of a step that starts and ends with an idle device, and of queueing it. Those of `_numbers` are the device's."""
    return {
        "latency": asdict(Spread.of([runner.latency(turn) for turn in range(turns)])),
        "host": asdict(Spread.of([runner.host(turn) for turn in range(turns)])),
    }


def _add_memory(case: Case, providers: dict[str, dict[str, Any]], now: Callable[[str], None]) -> None:
    """Peak memory, in a fresh process: nothing of this one's may be in the way. Huge pages change when memory is mapped, not how much."""
    with child() as process:
        for name, found in providers.items():
            if found["status"] != "timed" or PROVIDERS[name].environment:
                continue
            now(f"peak memory of {name}")
            try:
                found["memory"] = process.ask(do="memory", provider=name, case=case.key, threads=torch.get_num_threads())
            except RuntimeError as problem:
                found["reason"] = f"peak memory: {_first_line(problem)}"


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"
