"""Handwritten digits, trained twice from the same seed: with torch's cross-entropy and with fastloss's. The curves coincide.

    python examples/train_digits.py --epochs 30 --plot digits.png

Runs offline: the digits come with scikit-learn. A digit has 64 pixels and ten classes, far too few for the loss to matter; so that there is
something to time, every epoch is one batch of all digits, repeated --repeat times.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fastloss


@dataclass
class Run:
    """What one training left behind."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """In the loss, forward and backward down to the logits."""
    accuracy: float = 0.0


def train(loss_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, epochs: int, label: str) -> Run:
    """Full-batch training of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    run = Run()
    for _ in tqdm(range(epochs), desc=f"{label:9}", unit="epoch"):
        logits = model(x)
        # cut here, so that the clock sees the loss and nothing else
        cut = logits.detach().requires_grad_()
        start = perf_counter()
        loss = loss_of(cut, y)
        loss.backward()
        run.seconds += perf_counter() - start
        optimizer.zero_grad()
        logits.backward(cut.grad)
        optimizer.step()
        run.losses.append(loss.item())
    run.accuracy = (model(x).argmax(1) == y).float().mean().item()
    return run


def plot(runs: dict[str, Run], path: Path) -> None:
    """Both curves above, their difference below: where they coincide, one cannot be seen under the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (first, ours), (second, theirs) = runs.items()
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    above.plot(theirs.losses, color="#D55E00", linewidth=5, alpha=0.4, label=second)
    above.plot(ours.losses, color="#0072B2", linewidth=1.5, label=first)
    above.set_yscale("log")
    above.set_ylabel("cross-entropy (log scale)")
    above.legend(frameon=False)
    above.set_title("Handwritten digits: two trainings from one seed", loc="left", fontweight="bold")
    below.plot([abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)], color="#333333", linewidth=1)
    below.set_ylabel("difference")
    below.set_xlabel("epoch")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--epochs", type=int, default=60)
    options.add_argument("--repeat", type=int, default=20, help="how often each of the 1797 digits is in the batch (default: 20)")
    options.add_argument("--plot", type=Path, help="a PNG file for the curves")
    chosen = options.parse_args(arguments)
    digits = load_digits()
    x = torch.from_numpy(digits.data).float().div(16).repeat(chosen.repeat, 1)
    y = torch.from_numpy(digits.target).long().repeat(chosen.repeat)
    fastloss.cross_entropy(torch.zeros(len(y), 10, requires_grad=True), y).backward()  # compiles before the clock runs
    losses = {"fastloss": fastloss.cross_entropy, "torch": F.cross_entropy}
    runs = {name: train(loss_of, x, y, chosen.epochs, name) for name, loss_of in losses.items()}
    apart = max(abs(a - b) for a, b in zip(runs["fastloss"].losses, runs["torch"].losses, strict=True))
    route = fastloss.explain(fastloss.cross_entropy, torch.zeros(len(y), 10), y)
    print(f"\n{len(y)} digits, {chosen.epochs} epochs; fastloss computed by {route.backend} ({route.reason})")
    for name, run in runs.items():
        per_step = run.seconds / chosen.epochs * 1e3
        print(f"{name:9} last loss {run.losses[-1]:.6f}  accuracy {run.accuracy:.2%}  loss layer {per_step:.2f} ms per step")
    print(f"largest difference between the loss curves: {apart:.1e}")
    if chosen.plot:
        plot(runs, chosen.plot)
        print(f"curves in {chosen.plot}")
    return runs


if __name__ == "__main__":
    main()
