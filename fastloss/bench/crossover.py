"""From which size on our kernels pay: small calls with kernels forced, and as used, each beside torch's."""

from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import Any

from .cases import Case, make_inputs
from .providers import EAGER, FASTLOSS, PROVIDERS
from .runner import Runner, Times, configured
from .timing import Step, interleave

_CE, _BCE = "cross_entropy", "binary_cross_entropy_with_logits"
FORCED, USED = "kernels forced", "as used"
_SHAPES: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {
    (_CE, "float32"): (
        *((32, 16), (128, 128), (2048, 16), (512, 64), (128, 256), (32, 1024), (8, 4096), (64, 1000), (1024, 100)),
        *((128, 10), (256, 10), (512, 10)),
    ),
    (_CE, "bfloat16"): ((32, 1024), (48, 1024), (128, 1000)),
    ("cross_entropy, probabilities", "float32"): ((16, 1000), (32, 1024)),
    ("cross_entropy, smoothed and weighted", "float32"): ((16, 1000), (32, 1024)),
    (_BCE, "float32"): ((32, 80), (64, 80), (96, 80), (256, 80)),
    (_BCE, "bfloat16"): ((128, 80), (256, 80)),
    ("binary_cross_entropy", "float32"): ((8, 80), (20, 80), (64, 80)),
    ("sigmoid_focal_loss", "float32"): ((4, 80),),
    ("softmax", "float32"): ((128, 1000), (400, 1000), (800, 1000), (700, 10)),
    ("log_softmax", "float32"): ((128, 1000), (250, 1000), (700, 10)),
    ("nll_loss", "float32"): ((16384, 64), (65536, 64)),
}
CASES = tuple(Case(loss, shape, dtype) for (loss, dtype), shapes in _SHAPES.items() for shape in shapes)


def crossover(seconds: float = 1.0) -> dict[str, Any]:
    """For each case, how many times as long as ours torch's eager step takes, and torch's forward where no gradient is wanted. Each time is
    that of the second of two calls, as in a loop of a training program that does much else between."""
    found: dict[str, Any] = {}
    for case in CASES:
        inputs = make_inputs(case, 1)
        runners = {name: Runner(PROVIDERS[name], case, inputs) for name in (FASTLOSS, EAGER)}
        forced: dict[str, int] = {"min_numel": 0}
        used: dict[str, int] = {}
        ratios = {}
        for part, time in (("step", _step), ("forward", _forward)):
            steps: dict[str, Step] = {
                FORCED: _second(time, runners[FASTLOSS], forced),
                USED: _second(time, runners[FASTLOSS], used),
                EAGER: _second(time, runners[EAGER], used),
            }
            series = interleave(steps, seconds, least=7, most=250, warm=5)
            ratios[part] = {name: asdict(series[name].ratio_to(series[EAGER])) for name in (FORCED, USED)}
        found[case.key] = ratios
    return found


def _second(time: Callable[[Runner], Times], runner: Runner, settings: dict[str, int]) -> Step:
    def step(turn: int) -> Times:
        with configured(settings):
            time(runner)
            return time(runner)

    return step


def _step(runner: Runner) -> Times:
    return runner.step(0)


def _forward(runner: Runner) -> Times:
    one = runner.inputs[0]
    start = perf_counter()
    runner.case.spec.call(runner.function, one.input, one.target, one.options)
    return Times(perf_counter() - start, 0.0)
