"""The pool of gradient memory never hands out what somebody still holds."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss import memory

SIZE = 1 << 20  # floats: one gradient is 4 MiB


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> Iterator[None]:
    """A collection looks at what these tests made, not at all that torch and Numba did."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fastloss.config, "pool_min_bytes", 1 << 16)
    gc.collect()
    memory.empty_pool()
    yield
    gc.collect()
    memory.empty_pool()


def like(size: int = SIZE) -> torch.Tensor:
    return memory.empty_like(torch.empty(size))


def test_freed_memory_is_used_again() -> None:
    first = like()
    address = first.data_ptr()
    del first
    assert memory.pool_bytes() >= 4 * SIZE
    again = like()
    assert again.data_ptr() == address
    assert memory.pool_bytes() == 0
    assert like().data_ptr() != address


HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda t: t[5:9],
    "reshape": lambda t: t.view(-1, 16).t(),
    "detach": lambda t: t.detach(),
    "numpy": lambda t: t.numpy(),
    "numpy slice": lambda t: t.numpy()[3:4],
    "storage": lambda t: t.untyped_storage(),
    "dlpack": lambda t: torch.from_dlpack(t),
    "numpy of dlpack": lambda t: np.from_dlpack(t),
    "memoryview": lambda t: memoryview(t.numpy()),
    "parameter": lambda t: torch.nn.Parameter(t),
    "data": lambda t: t.data,
    "unbound": lambda t: t.view(2, -1).unbind()[1],
    "frombuffer": lambda t: torch.frombuffer(memoryview(t.numpy()), dtype=torch.float32)[:1],
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_nothing_is_reused_while_it_is_held(kind: str) -> None:
    tensor = like()
    tensor.fill_(7)
    address = tensor.data_ptr()
    holder = HOLDERS[kind](tensor)
    del tensor
    gc.collect()
    assert memory.pool_bytes() == 0
    other = like()
    assert other.data_ptr() != address
    other.fill_(9)
    if kind != "storage":
        assert float(np.asarray(holder.detach() if isinstance(holder, torch.Tensor) else holder).reshape(-1)[0]) == 7
    del holder
    gc.collect()
    assert memory.pool_bytes() >= 4 * SIZE


def step(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    fastloss.cross_entropy(leaf, target).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_gradients_kept_across_steps_keep_their_numbers() -> None:
    target = torch.randint(100, (500,))
    batches = [torch.randn(500, 100) for _ in range(4)]
    kept = [step(logits, target) for logits in batches]
    copies = [g.clone() for g in kept]
    assert len({g.data_ptr() for g in kept}) == 4
    for logits in batches:
        step(logits, target)
    for gradient, copy in zip(kept, copies, strict=True):
        assert torch.equal(gradient, copy)


def test_training_loop_settles_on_one_block() -> None:
    target, logits = torch.randint(100, (500,)), torch.randn(500, 100)
    addresses = {step(logits, target).data_ptr() for _ in range(10)}
    assert len(addresses) == 1


def test_gradients_accumulated_by_autograd() -> None:
    leaf, target = torch.randn(500, 100, requires_grad=True), torch.randint(100, (500,))
    fastloss.cross_entropy(leaf, target).backward()
    once = leaf.grad.clone()
    for _ in range(3):
        fastloss.cross_entropy(leaf, target).backward()
    torch.testing.assert_close(leaf.grad, 4 * once)


def test_an_exception_in_the_middle_of_a_backward() -> None:
    def fail(gradient: torch.Tensor) -> None:
        raise ZeroDivisionError

    target, held = torch.randint(100, (500,)), step(torch.randn(500, 100), torch.randint(100, (500,)))
    copy = held.clone()
    for _ in range(3):
        leaf = torch.randn(500, 100, requires_grad=True)
        middle = leaf * 1
        middle.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            fastloss.cross_entropy(middle, target).backward()
    step(torch.randn(500, 100), target)
    assert torch.equal(held, copy)


def test_the_cap_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "pool_max_bytes", 10 << 20)
    tensors = [like() for _ in range(6)]
    del tensors
    gc.collect()
    assert memory.pool_bytes() <= 10 << 20
    assert memory.pool_bytes() > 0


def test_off_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "pool_max_bytes", 0)
    tensor = like()
    del tensor
    assert memory.pool_bytes() == 0
    assert step(torch.randn(500, 100), torch.randint(100, (500,))).isfinite().all()


def test_only_memory_that_is_kept_is_written_past_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastloss.kernels.cpu import rows

    source, cpu = torch.empty(1, device="cpu"), torch.device("cpu")
    assert rows.bypass_caches(source, memory.empty((1 << 23,), torch.float32, cpu)) == 1
    monkeypatch.setattr(fastloss.config, "pool_max_bytes", 0)
    assert rows.bypass_caches(source, memory.empty((1 << 23,), torch.float32, cpu)) == 0


def test_small_tensors_do_not_come_from_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "pool_min_bytes", 1 << 22)
    tensor = like(1000)
    del tensor
    assert memory.pool_bytes() == 0


def test_empty_pool_gives_memory_back() -> None:
    tensor = like()
    del tensor
    memory.empty_pool()
    assert memory.pool_bytes() == 0


def test_a_block_much_too_large_is_not_wasted() -> None:
    large = like(64 * SIZE)
    del large
    assert like(SIZE).numel() == SIZE
    assert memory.pool_bytes() >= 4 * 64 * SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_shape_dtype_and_strides_are_those_of_torch_empty_like(dtype: torch.dtype) -> None:
    base = torch.empty(300, 40, 10, dtype=dtype)
    for tensor in (base, base.transpose(0, 2), base.permute(1, 0, 2), base[:, ::2], base[:, :1].expand(300, 40, 10), base[10:]):
        mine, theirs = memory.empty_like(tensor), torch.empty_like(tensor)
        assert (mine.shape, mine.dtype, mine.stride(), mine.requires_grad) == (theirs.shape, theirs.dtype, theirs.stride(), False)


@pytest.mark.parametrize("pool_min_bytes", [0, 1 << 40], ids=["pooled", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_tensor_is_a_base(pool_min_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """autograd refuses to edit a view that a Function made."""
    monkeypatch.setattr(fastloss.config, "pool_min_bytes", pool_min_bytes)
    cpu, base = torch.device("cpu"), torch.empty(8, 6, 4, dtype=dtype)
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "empty": lambda: memory.empty((8, 6, 4), dtype, cpu),
        "scalar": lambda: memory.empty((), dtype, cpu),
        "nothing": lambda: memory.empty((8, 0, 4), dtype, cpu),
        "like": lambda: memory.empty_like(base),
        "like transposed": lambda: memory.empty_like(base.transpose(0, 2)),
        "like a parameter": lambda: memory.empty_like(torch.nn.Parameter(base)),
    }
    modes: dict[str, Callable[[], Any]] = {
        "grad": torch.enable_grad,
        "no grad": torch.no_grad,
        "inference": torch.inference_mode,
        "device": lambda: torch.device("meta"),
    }
    for name, make in makers.items():
        for mode, context in modes.items():
            with context():
                fresh = make()
                assert not fresh._is_view(), (name, mode)
                assert (fresh.dtype, fresh.device, fresh.requires_grad, fresh.is_leaf) == (dtype, cpu, False, True), (name, mode)
                assert fresh.is_inference() == (mode == "inference"), (name, mode)
                assert (fresh.storage_offset(), fresh.untyped_storage().nbytes()) == (0, fresh.numel() * dtype.itemsize), (name, mode)


def test_pooled_tensors_can_shrink_and_not_grow() -> None:
    """docs/memory.md says why."""
    tensor = like()
    assert tensor.resize_(4, 5).shape == (4, 5)
    assert torch.neg(torch.ones(4, 5), out=tensor).sum() == -20
    for grow in (lambda: tensor.resize_(2 * SIZE), lambda: tensor.untyped_storage().resize_(0)):
        with pytest.raises(RuntimeError, match="storage that is not resizable"):
            grow()


def classes(*shape: int) -> torch.Tensor:
    return torch.randint(shape[1], (shape[0], *shape[2:]))


PER_ROW: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda f, x: f.cross_entropy(x, classes(*x.shape), reduction="none"),
    "smoothed": lambda f, x: f.cross_entropy(x, classes(*x.shape), label_smoothing=0.1, reduction="none"),
    "probabilities": lambda f, x: f.cross_entropy(x, torch.rand_like(x), reduction="none"),
    "nll_loss": lambda f, x: f.nll_loss(x, classes(*x.shape), reduction="none"),
    "bce_with_logits": lambda f, x: f.binary_cross_entropy_with_logits(x, torch.rand_like(x), reduction="none"),
    "bce": lambda f, x: f.binary_cross_entropy(x.sigmoid(), torch.rand_like(x), reduction="none"),
}
PER_ELEMENT: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "softmax": lambda f, x: f.softmax(x, dim=1),
    "log_softmax": lambda f, x: f.log_softmax(x, dim=1),
}


def edit(result: torch.Tensor) -> None:
    result[0] = 0
    result *= 3
    result += 1
    result.relu_()


@pytest.mark.parametrize("pool_min_bytes", [0, 1 << 40], ids=["pooled", "plain"])
@pytest.mark.parametrize("shape", [(60, 20), (6, 20, 10)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # torch's gradient of transposed logits
@pytest.mark.parametrize("name", [*PER_ROW, *PER_ELEMENT])
def test_results_and_gradients_can_be_edited_in_place(
    name: str, layout: str, shape: tuple[int, ...], pool_min_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastloss.config, "pool_min_bytes", pool_min_bytes)
    call = (PER_ROW | PER_ELEMENT)[name]
    values = torch.randn(shape) if layout == "contiguous" else torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    found = []
    for library in (fastloss, F):
        torch.manual_seed(1)
        leaf = values.detach().requires_grad_()
        result = call(library, leaf)
        if name in PER_ROW:
            edit(result)
        upstream = torch.randn(result.shape)
        (gradient,) = torch.autograd.grad(result, leaf, upstream)
        if library is fastloss:  # torch's own are views for (N, C, ...): "Can't detach views in-place"
            result.detach_()
            gradient.detach_()
        edit(gradient)
        leaf.grad = gradient
        found += [result.detach(), gradient.clone()]
        optimizer = torch.optim.SGD([leaf], lr=0.1)
        optimizer.zero_grad(set_to_none=False)
        assert not leaf.grad.any()
        call(library, leaf).sum().backward()
        edit(leaf.grad)
        found.append(leaf.grad)
    for mine, theirs in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_python_threads_share_nothing() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(40):
            tensor = like(1 << 16)
            tensor.fill_(number)
            view = tensor[::3]
            del tensor
            other = like(1 << 16)
            other.fill_(-number)
            if not bool((view == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_parent_and_child_do_not_see_each_others_gradients() -> None:
    script = """
import os, torch, fastloss
from fastloss import memory
fastloss.config.pool_min_bytes = 1 << 16
torch.set_num_threads(1)
mine = memory.empty_like(torch.empty(1 << 20)); mine.fill_(1)
idle = memory.empty_like(torch.empty(1 << 20)); del idle
child = os.fork()
other = memory.empty_like(torch.empty(1 << 20))
other.fill_(2 if child else 3)
mine.add_(0 if child else 10)
if child == 0:
    os._exit(0 if (other == 3).all() and (mine == 11).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (other == 2).all() and (mine == 1).all()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


def test_interpreter_exit_with_pooled_memory_alive() -> None:
    script = """
import torch, fastloss
from fastloss import memory
fastloss.config.pool_min_bytes = 1
keep = memory.empty_like(torch.empty(1 << 20))
class Late:
    def __del__(self, t=keep): t.sum()
late = Late()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "fine", "")
