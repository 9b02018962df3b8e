"""Cross-entropy of sharded classes on gloo ranks of one machine: a step, beside what one rank's half takes alone, and beside torch's.

    python bench/vocab_parallel.py --ranks 2 --rows 4096 --classes 32000 --rounds 15

Every round runs all ways, one after the other, with a barrier before each; a way's time is that of the slowest rank, and the median counts.
Cores are shared out among the ranks.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel

import fastloss

SLOW = "torch, loss_parallel"
FEW = 5  # rounds of it


def ways_of(rows: int, classes: int) -> dict[str, Callable[[], object]]:
    """What is timed. Every rank has classes / ranks of the logits, in float32."""
    ranks, width = dist.get_world_size(), classes // dist.get_world_size()
    logits, target = torch.randn(rows, width).requires_grad_(), torch.randint(classes, (rows,))
    dist.broadcast(target, 0)
    own = target % width
    sent, gathered = torch.empty(3 * rows), torch.empty(3 * rows * ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    tensor = DTensor.from_local(logits.detach(), mesh, [Shard(1)]).requires_grad_()

    def step(loss_of: Callable[[], torch.Tensor]) -> None:
        logits.grad = tensor.grad = None
        loss_of().backward()

    def by_torch() -> None:
        with loss_parallel():
            step(lambda: F.cross_entropy(tensor, target))

    return {
        "vocab_parallel_cross_entropy": lambda: step(lambda: fastloss.vocab_parallel_cross_entropy(logits, target)),
        "the same, smoothed": lambda: step(lambda: fastloss.vocab_parallel_cross_entropy(logits, target, label_smoothing=0.1)),
        "cross_entropy of the slice, one visit": lambda: step(lambda: fastloss.cross_entropy(logits, own)),
        "cross_entropy of the slice, two visits": lambda: step(lambda: fastloss.cross_entropy(logits, own, reduction="none").sum()),
        "all_gather": lambda: dist.all_gather_into_tensor(gathered, sent),
        SLOW: by_torch,
    }


def measure(rank: int, a: argparse.Namespace, threads: int, store: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=a.ranks)
    times: dict[str, list[float]] = {}
    ways = ways_of(a.rows, a.classes)
    for number in range(a.rounds + 2):  # the first two compile and foresee
        for name, way in ways.items():
            if name == SLOW and number > FEW:
                continue
            dist.barrier()
            start = time.perf_counter()
            way()
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if number > 1:
                times.setdefault(name, []).append(taken.item() * 1e3)
    if rank == 0:
        report(a, times)
    dist.destroy_process_group()


def report(a: argparse.Namespace, times: dict[str, list[float]]) -> None:
    print(f"{a.rows} x {a.classes} float32 over {a.ranks} ranks, ms: median, least")
    found = {name: statistics.median(taken) for name, taken in times.items()}
    for name, taken in times.items():
        print(f"{name:40s}{found[name]:10.2f}{min(taken):10.2f}")
    ours, one, two, gather, torchs = (found[name] for name in list(times) if name != "the same, smoothed")
    print(f"ours / (one visit + all_gather)   {ours / (one + gather):6.2f}")
    print(f"ours / (two visits + all_gather)  {ours / (two + gather):6.2f}")
    print(f"torch / ours                      {torchs / ours:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("rows", 4096), ("classes", 32000), ("rounds", 15), ("port", 29641)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    mp.spawn(measure, (a, max(1, torch.get_num_threads() // a.ranks), f"tcp://127.0.0.1:{a.port}"), nprocs=a.ranks)


if __name__ == "__main__":
    main()
