"""What the benchmark does on a GPU, on a GPU that is made up: a queue, and two clocks that stand still between calls."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastloss.bench import cli, clock, footprint, machine, runner, tables
from fastloss.bench.cases import Case, inputs_to_miss, make_inputs
from fastloss.bench.presets import PRESETS, Preset
from fastloss.bench.providers import EAGER, PROVIDERS

HERTZ = 1e9
FACTS = SimpleNamespace(
    name="Made up", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20, total_memory=80 << 30, clock_rate=HERTZ / 1e3
)


class Gpu:
    """Does what it is given one after the other; the host does not wait for it unless it says so."""

    def __init__(self) -> None:
        self.host, self.device, self.waits, self.held = 0.0, 0.0, 0, 0.0  # seconds; what the device is busy until

    def launch(self, on_host: float, on_device: float) -> None:
        self.host += on_host
        self.device = max(self.host, self.device) + on_device

    def synchronize(self, *which: Any) -> None:
        self.host, self.waits = max(self.host, self.device), self.waits + 1

    def sleep(self, cycles: int) -> None:
        self.held += cycles / HERTZ
        self.launch(0.0, cycles / HERTZ)

    def event(self, enable_timing: bool) -> Any:
        found = SimpleNamespace(at=math.nan, synchronize=self.synchronize)
        found.record = lambda: setattr(found, "at", max(self.host, self.device))
        found.elapsed_time = lambda later: (later.at - found.at) * 1e3
        return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", found.sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: FACTS)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    return found


def test_with_a_full_queue_the_device_is_timed_and_not_the_host(gpu: Gpu) -> None:
    """Kernels of 3 ms that the host takes 5 ms each to launch."""
    watch = clock.clock_of("cuda")
    for ahead, seconds in ((0.0, 0.005), (0.010, 0.003)):
        watch.start(ahead)
        for _ in range(2):
            gpu.launch(on_host=0.005, on_device=0.003)
            watch.mark()
        assert watch.laps()[1] == pytest.approx(seconds)
    assert watch.laps()[0] == pytest.approx(0.003)  # the first lap begins when what held the device is done


def test_a_device_is_never_held_for_long(gpu: Gpu) -> None:
    clock.hold(3600)
    assert gpu.held <= 0.02


def test_a_step_is_timed_behind_as_much_as_the_host_takes_to_queue_it(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step` by the device, `latency` from idle to idle, `host` until it is queued."""
    case = Case("cross_entropy", (8, 5))
    found = runner.Runner(PROVIDERS[EAGER], case, make_inputs(case, 2))
    found.device, found._clock, found._ahead = "cuda", clock.clock_of("cuda"), math.nan
    monkeypatch.setattr(runner, "perf_counter", lambda: gpu.host)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gpu.launch(on_host=0.004, on_device=0.001)
        return torch.nn.functional.cross_entropy(x, y)

    found.function = loss
    times = found.step(0)
    assert gpu.held == pytest.approx(1.5 * 0.004)
    assert (times.forward, times.backward) == pytest.approx((0.001, 0.0))
    assert found.host(1) == pytest.approx(0.004)
    assert found.latency(1) == pytest.approx(0.005)


def test_inputs_are_rotated_past_four_times_the_cache_of_the_gpu(gpu: Gpu) -> None:
    assert machine.cache_of("cuda") == 50 << 20
    case = Case("cross_entropy", (65536, 10), "bfloat16")
    assert inputs_to_miss(case, machine.cache_of("cuda"), turnover=4) * case.bytes >= 4 * (50 << 20)


def test_memory_of_a_step_is_what_the_allocator_says(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(allocated=100, peak=500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: now.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(now, "peak", now.allocated))
    found = footprint.peak_memory_on_gpu(lambda turn: (setattr(now, "peak", 180), setattr(now, "allocated", 110)))
    assert found == {"peak": 80, "kept": 10}


SMI = """#!/bin/sh
echo "580.65.06, 1980 MHz, 2619 MHz, 1980 MHz, 112.10 W, 700.00 W, 34"
"""


def test_a_gpu_is_described_by_what_changes_its_numbers(gpu: Gpu, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine.gpu()
    assert (found["name"], found["processors"], found["cache_mib"], found["free_gib"]) == ("Made up", 132, 50, 70.0)
    assert (found["driver_version"], found["clocks.sm"], found["temperature.gpu"]) == ("580.65.06", "1980 MHz", "34")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.nvidia_smi() == {}


def test_a_copy_of_a_checkout_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"


def test_the_three_times_of_a_step_are_named() -> None:
    spread = {"low": 1e-3, "middle": 1e-3, "high": 1e-3}
    timed = {"status": "timed", "forward": spread, "backward": spread, "step": spread, "copies": spread, "bytes_per_logit": 4.0}
    case = {"bytes": 1, "providers": {"fastloss": timed}}
    assert "latency ms" not in tables.providers(case)[0]
    timed |= {"latency": {**spread, "middle": 5e-3}, "host": {**spread, "middle": 4e-3}}
    header, lines = tables.providers(case)
    found = dict(zip(header, lines[0], strict=True))
    assert (found["step ms"], found["latency ms"], found["host ms"]) == ("1.00", "5.00", "4.00")


def test_extras_are_left_out_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would compile the CPU's kernels for a minute, and time the CPU."""
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: 1.0)
    assert cli.run(Preset("", (), extras=("overhead", "startup")), device="cuda")["extras"] == {}


def test_the_preset_for_a_gpu_has_no_small_case() -> None:
    """Two microseconds of copying are not a measurement; and two inputs with all that eager allocates fit into 78 GiB."""
    for case in PRESETS["gpu"].cases:
        assert 64 << 20 <= case.bytes <= 5 << 30, case.key


def test_inputs_are_made_where_they_are_used() -> None:
    """The meta device stands in for one that is not here. Nothing is made on the CPU and moved."""
    for loss in ("cross_entropy, smoothed and weighted", "cross_entropy, probabilities", "binary_cross_entropy_with_logits", "softmax"):
        (one,) = make_inputs(Case(loss, (64, 40)), 1, "meta")
        tensors = [one.input, one.target, one.upstream, *one.options.values()]
        assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
