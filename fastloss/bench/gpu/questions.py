"""What was decided without a device, asked again: each answer is a table of microseconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..cases import Case, make_inputs
from ..providers import EAGER, FASTLOSS, PROVIDERS
from ..runner import Runner, configured
from .launches import Launch, kernel_package
from .speed import Stopwatch
from .stage import Day

Answer = list[dict[str, Any]]
_FORWARD, _BACKWARD, _BOTH = "cross_entropy_forward", "cross_entropy_backward", "cross_entropy_forward_backward"


def questions(day: Day) -> None:
    """Each on its own: one that fails says why, and the next is asked."""
    asked: dict[str, Callable[[Day, Stopwatch], Answer]] = {
        "one visit against two kernels": one_visit,
        "from how many classes on a row is long": long_row,
        "block and warps of long rows": blocks,
        "from how many logits on fastloss is faster": threshold,
    }
    stopwatch, answers = Stopwatch(day.device, day.tiny), dict[str, Any]()
    for question, ask in asked.items():
        try:
            answers[question] = ask(day, stopwatch)
        except Exception as problem:
            answers[question] = f"{type(problem).__name__}: {problem}"[:300]
        day.save(questions=answers)


def rows_in_registers(tiny: bool) -> list[Launch]:
    """What `one_visit` times."""
    shapes = [(24, 1040)] if tiny else [(32768, 2048), (16384, 4096), (8192, 8192), (8192, 16384)]
    return [
        Launch(name, shape, dtype)
        for shape in shapes
        for dtype in (["float32"] if tiny else ["bfloat16", "float32"])
        for name in (_BOTH, _FORWARD, _BACKWARD)
    ]


def one_visit(day: Day, stopwatch: Stopwatch) -> Answer:
    """Rows that wait in registers between loss and gradient, 2 passes over the logits, against two kernels, 3 passes."""
    found: dict[tuple[Any, str], dict[str, Any]] = {}
    for launch in rows_in_registers(day.tiny):
        line = found.setdefault((launch.shape, launch.dtype), {"shape": list(launch.shape), "dtype": launch.dtype})
        line[launch.name] = _microseconds(stopwatch, day, launch)
    return list(found.values())


def long_row(day: Day, stopwatch: Stopwatch) -> Answer:
    """Whether rows of 512 to 1023 classes get a program of their own."""
    from ...kernels.cuda import plan

    found = []
    for shape in [(24, 70)] if day.tiny else [(65536, 1000), (131072, 512)]:
        for least in (512, 1024):
            with changed(plan, LONG_ROW=least):
                times = {name: _microseconds(stopwatch, day, Launch(name, shape, _dtype(day))) for name in (_FORWARD, _BACKWARD)}
            found.append({"shape": list(shape), "LONG_ROW": least, **times})
    return found


def blocks(day: Day, stopwatch: Stopwatch) -> Answer:
    """Classes in one step of a program that walks a long row, and warps to do it."""
    from ...kernels.cuda import plan

    shape, found = (24, 70) if day.tiny else (8192, 128256), []
    for block in (2048, 4096, 8192):
        for warps in (4, 8):
            with changed(plan, BLOCK=block, warps=lambda threads, device, count=warps: count):
                times = {name: _microseconds(stopwatch, day, Launch(name, shape, _dtype(day))) for name in (_FORWARD, _BACKWARD)}
            found.append({"BLOCK": block, "warps": warps, **times})
    return found


def threshold(day: Day, stopwatch: Stopwatch) -> Answer:
    """Steps from an idle device to an idle device: config.min_numel was found on a CPU."""
    found = []
    for power in (12,) if day.tiny else range(14, 21):
        case = Case("cross_entropy", (1 << (power - 8), 256))
        inputs = make_inputs(case, 2, day.device)
        line: dict[str, Any] = {"logits": 1 << power}
        with configured({"min_numel": 0}):
            for name in (FASTLOSS, EAGER):
                runner = Runner(PROVIDERS[name], case, inputs)
                times = sorted(runner.latency(turn) for turn in range(8 if day.tiny else 40))
                line[name] = times[len(times) // 4] * 1e6
        found.append(line)
    return found


def _dtype(day: Day) -> str:
    return "float32" if day.tiny else "bfloat16"


def _microseconds(stopwatch: Stopwatch, day: Day, launch: Launch) -> float:
    launcher, arguments = getattr(kernel_package(day.device), launch.name), launch.arguments(day.device)
    return stopwatch.times(lambda: launcher(*arguments))[1] * 1e6


@contextmanager
def changed(module: ModuleType, **values: Any) -> Iterator[None]:
    """Other constants in a module for the length of a with block. Raises AttributeError for a name that is not there."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)
