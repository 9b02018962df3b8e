"""Threads, forks and places that cannot be written: no crash, no hang, the same bits."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import class_inputs, kernel_call

import fastloss
import fastloss.kernels

PREAMBLE = """
import os, sys, threading, torch, fastloss
import torch.nn.functional as F
fastloss.config.min_numel = 0
torch.manual_seed(0)
X, Y = torch.randn(300, 40), torch.randint(40, (300,))
def step(loss=fastloss.cross_entropy):
    x = X.clone().requires_grad_()
    value = loss(x, Y)
    value.backward()
    return value.item(), x.grad
"""
# where kernels are compiled that nobody keeps: step(fastloss.nll_loss), whose four take one second in place of five


def run(script: str, timeout: int = 120, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,  # not the checkout's root, whose fastloss/ would come before any other
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_first_calls_from_many_threads_at_once(tmp_path: Path) -> None:
    """Compilation included: the cache is empty."""
    script = """
torch.set_num_threads(2)
barrier, results, errors = threading.Barrier(6), [], []
def work():
    try:
        barrier.wait()
        for _ in range(5):
            results.append(step(fastloss.nll_loss))
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work) for _ in range(6)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not errors, errors
assert len(results) == 30 and len({loss for loss, _ in results}) == 1
assert all(torch.equal(g, results[0][1]) for _, g in results)
assert abs(results[0][0] - F.nll_loss(X, Y).item()) < 1e-6
print("fine")
"""
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == "fine"


def test_threads_with_different_losses_at_once() -> None:
    torch.set_num_threads(2)
    tensors = [class_inputs((400, 30), torch.float32) for _ in range(4)]
    expected = [F.cross_entropy(t["input"], t["target"]) for t in tensors]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.allclose(fastloss.cross_entropy(tensors[i]["input"], tensors[i]["target"]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("before", ["step()", ""], ids=["after use", "before use"])
def test_fork(before: str) -> None:
    """The child computes with one thread, as torch itself must after a fork."""
    script = f"""
torch.set_num_threads(1)
{before}
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if abs(step()[0] - F.cross_entropy(X, Y).item()) < 1e-6 else 1)
    children.append(child)
assert all(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) == 0 for c in children)
assert abs(step()[0] - F.cross_entropy(X, Y).item()) < 1e-6
print("fine")
"""
    assert run(script) == "fine"


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(tmp_path: Path, start: str) -> None:
    """A data set that computes a loss in its workers, after the parent used its threads."""
    path = tmp_path / "workers.py"
    path.write_text(
        PREAMBLE
        + f"""
class Losses(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return step()[0]
if __name__ == "__main__":
    torch.set_num_threads(2)
    first = step()[0]
    loader = torch.utils.data.DataLoader(Losses(), num_workers=2, multiprocessing_context={start!r}, timeout=100)
    values = [v.item() for v in loader]
    assert len(values) == 8 and all(abs(v - first) < 1e-6 for v in values)
    print("fine")
"""
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 5000])
@pytest.mark.parametrize("classes", [5, 70, 9000])
def test_same_bits_for_every_number_of_threads(rows: int, classes: int) -> None:
    if rows * classes > 10**6:
        rows = 100
    tensors = class_inputs((rows, classes), torch.float32, weighted=True)
    runs = []
    for threads in (1, 2, 3, 8, 2, 1):
        torch.set_num_threads(threads)
        leaf = tensors["input"].clone().requires_grad_()
        loss = kernel_call("cross_entropy", leaf, tensors["target"], tensors["weight"])
        loss.backward()
        runs.append((loss.item(), leaf.grad))
    for loss, gradient in runs[1:]:
        assert loss == runs[0][0]
        assert torch.equal(gradient, runs[0][1])


def test_number_of_threads_may_change_at_any_time() -> None:
    expected = F.cross_entropy(torch.ones(64, 9), torch.zeros(64, dtype=torch.long))
    for threads in (1, 4, 2, 8, 1, 3):
        torch.set_num_threads(threads)
        torch.testing.assert_close(fastloss.cross_entropy(torch.ones(64, 9), torch.zeros(64, dtype=torch.long)), expected)


@pytest.mark.skipif(os.name == "nt", reason="permissions work differently")
@pytest.mark.parametrize("place", [pytest.param("home", marks=pytest.mark.long), "home and cache"])
def test_places_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    """Neither a home nor a cache, nor a package folder: compiled again in every process, and correct."""
    package = tmp_path / "site" / "fastloss"
    leave_out = shutil.ignore_patterns("__pycache__", "bench", "kernels")
    shutil.copytree(Path(fastloss.__file__).parent, package, ignore=leave_out)
    kernels = Path(fastloss.kernels.__file__).parent  # beside the package in a checkout, inside it when installed
    shutil.copytree(kernels, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    nowhere = tmp_path / "file"
    nowhere.write_text("not a folder")  # works for root too, whom permissions do not stop
    for folder in (package / "kernels" / "cpu", package / "kernels"):
        (folder / "__pycache__").write_text("not a folder")
    environment = {"PYTHONPATH": str(package.parent), "HOME": str(nowhere / "home"), "XDG_CACHE_HOME": str(nowhere / "cache")}
    if place == "home and cache":
        environment["NUMBA_CACHE_DIR"] = str(nowhere / "numba")
    script = f"assert fastloss.__file__.startswith({str(tmp_path)!r})\n"
    script += "assert abs(step(fastloss.nll_loss)[0] - F.nll_loss(X, Y).item()) < 1e-6\nprint('fine')"
    assert run(script, **environment) == "fine"


def test_reruns_give_the_same_bits_in_another_process() -> None:
    script = "torch.set_num_threads({}); loss, g = step(); print(loss.hex(), hash(g.numpy().tobytes()))"
    outputs = {run(script.format(threads), PYTHONHASHSEED="0") for threads in (1, 2)}
    assert len(outputs) == 1
