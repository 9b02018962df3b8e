"""Every test runs on the kernels, with nothing left over in memory that a kernel did not write."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import launch_watch
import pytest
import torch

import fastloss
from fastloss import contract

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process that compiles starts others, which import torch, too

gc.set_threshold(20_000, 20, 20)  # torch.compile and Numba make so many objects that a twentieth of the time went into looking for garbage

ON_ANY_DEVICE = ("cross_entropy", "bce", "softmax", "nll_loss", "numerics", "property", "inplace", "sigmoid_focal_loss")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the parity tests make their tensors: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))  # before the test modules make their tensors


# float16 has its loads and stores, as bfloat16 has, in one file; half of the suite's time goes into compiling kernels for each dtype
FLOAT16_IS_LONG = (
    "batch_invariance",
    "bce",
    "cross_entropy",
    "layouts",
    "linear_token_statistics",
    "nll_loss",
    "numerics",
    "softmax",
    "sparse_soft_cross_entropy",
    "token_statistics",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        spec = getattr(item, "callspec", None)
        if spec is not None and item.path.stem.removeprefix("test_") in FLOAT16_IS_LONG and "float16" in spec.id.split("-"):
            item.add_marker(pytest.mark.long)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """On another device, only the tests that do not speak of threads, pointers or the CPU; the others are not even imported."""
    elsewhere = config.getoption("--device") != "cpu" and collection_path.suffix == ".py"
    return True if elsewhere and collection_path.stem.removeprefix("test_") not in ON_ANY_DEVICE else None


@pytest.fixture(autouse=True)
def forced_kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """No input is too small for the kernels, every launch is watched, random numbers are the same every time, and fresh memory holds NaN.

    One thread: test_concurrency has more, and results do not depend on their number.
    """
    monkeypatch.setattr(fastloss.config, "min_numel", 0)
    monkeypatch.setattr(contract, "watch", launch_watch.watch)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny inputs on busy cores: libgomp's barriers would take twenty times the work
    # with fill_uninitialized_memory: torch.empty holds NaN. On CUDA some of torch's own losses have no deterministic form
    elsewhere = request.config.getoption("--device") != "cpu" or request.node.get_closest_marker("gpu") is not None
    torch.use_deterministic_algorithms(True, warn_only=elsewhere)
    with fastloss.use_backend("auto"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
