"""pytest-benchmark over the table of providers and the cases of the CPU targets.

    pytest bench --benchmark-enable -k "32000 and float32" --benchmark-group-by=group

A provider is checked against float64 before it is timed, as everywhere. pytest-benchmark times one provider after the other: for ratios
on a machine with other load use bench/run.py, which takes turns.
"""

import pytest

from fastloss.bench import accuracy
from fastloss.bench.cases import Case, make_inputs
from fastloss.bench.presets import PRESETS
from fastloss.bench.providers import EAGER, PROVIDERS
from fastloss.bench.runner import Runner, release_memory

CASES = {case.key: case for case in PRESETS["cpu-table"].cases}
# those that run in this process, on this device
NAMES = [name for name, provider in PROVIDERS.items() if "cpu" in provider.devices and not provider.environment]


@pytest.fixture(scope="module", params=CASES)
def prepared(request):
    """A case with its inputs, the truth, and the errors that are allowed."""
    case: Case = CASES[request.param]
    inputs = make_inputs(case, 2)
    true = accuracy.truth(case, inputs[0])
    output, gradient, _ = Runner(PROVIDERS[EAGER], case, inputs).results(0, keep=True)
    yield case, inputs, true, accuracy.allowed(case, accuracy.error_of(true, output, gradient))
    del inputs, true, output, gradient
    release_memory()


@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, prepared, name):
    case, inputs, true, limit = prepared
    reason = PROVIDERS[name].absent(case.spec, "cpu")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    runner = Runner(PROVIDERS[name], case, inputs)
    output, gradient, _ = runner.results(0, keep=True)
    error = accuracy.error_of(true, output, gradient)
    assert error.output <= limit.output
    assert error.gradient <= limit.gradient
    del output, gradient
    turns = iter(range(1 << 30))
    benchmark.group = case.key
    benchmark.extra_info["error"] = error.worst
    benchmark.pedantic(lambda: runner.step(next(turns)), rounds=5, iterations=1, warmup_rounds=1)
