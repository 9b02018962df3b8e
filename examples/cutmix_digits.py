"""Handwritten digits, trained twice from the same seed: plainly, and with CutMix and a confidence regulariser. Curves beside each other.

    python examples/cutmix_digits.py --epochs 60 --plot cutmix.png

Runs offline: the digits come with scikit-learn. CutMix pastes a box of one picture into another: the share of the area that is left is the
probability of the picture's own class, the rest that of the other. Two classes a row are a sparse target: no tensor of ten (or 32000)
probabilities is made. The regulariser, the mean of sum p^2, is smallest for a network that is sure of nothing.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fastloss

SIDE, HELD_OUT, BATCH = 8, 500, 100


@dataclass
class Run:
    """What one training left behind: a number for each epoch, of digits that it never saw."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    """The mean of the largest probability."""


def cutmix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [N, side, side], every other time with a box of another picture in each; classes [N, 2]; the share of either class [2]."""
    other = torch.randperm(len(x))
    side = int(SIDE * (1 - torch.rand(()).item()) ** 0.5) * int(torch.rand(()) < 0.5)  # the share is uniform
    top, left = (int(torch.randint(SIDE - side + 1, ())) for _ in range(2))
    mixed = x.clone()
    mixed[:, top : top + side, left : left + side] = x[other, top : top + side, left : left + side]
    share = 1 - (side / SIDE) ** 2
    return mixed, torch.stack([y, y[other]], 1), torch.tensor([share, 1 - share])


def regularised_loss(logits: Tensor, classes: Tensor, shares: Tensor, strength: float) -> Tensor:
    """share CE(logits, y_a) + (1 - share) CE(logits, y_b) + strength mean sum p^2."""
    sum_sq_prob = fastloss.token_statistics(logits, outputs=("sum_sq_prob",)).sum_sq_prob
    return fastloss.sparse_soft_cross_entropy(logits, classes, shares) + strength * sum_sq_prob.mean()


def train(x: Tensor, y: Tensor, epochs: int, strength: float | None, label: str) -> Run:
    """A small network; without a strength of the regulariser, plainly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen, unseen, run = slice(HELD_OUT, None), slice(HELD_OUT), Run()
    for _ in tqdm(range(epochs), desc=f"{label:7}", unit="epoch"):
        for batch in torch.randperm(len(x[seen])).split(BATCH):
            pictures, digits = x[seen][batch], y[seen][batch]
            if strength is None:
                loss = fastloss.cross_entropy(model(pictures), digits)
            else:
                pictures, classes, shares = cutmix(pictures, digits)
                loss = regularised_loss(model(pictures), classes, shares, strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = model(x[unseen])
            run.losses.append(fastloss.cross_entropy(logits, y[unseen]).item())
            run.accuracies.append((logits.argmax(1) == y[unseen]).float().mean().item())
            run.confidences.append(fastloss.softmax(logits, 1).amax(1).mean().item())
    return run


def plot(runs: dict[str, Run], path: Path) -> None:
    """Loss, accuracy and confidence on unseen digits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (title, name) in zip(
        axes, (("cross-entropy", "losses"), ("accuracy", "accuracies"), ("confidence", "confidences")), strict=True
    ):
        for color, (label, run) in zip(("#D55E00", "#0072B2"), runs.items(), strict=True):
            axis.plot(getattr(run, name), color=color, linewidth=1.5, label=label)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel("epoch")
    axes[0].set_yscale("log")
    axes[1].set_ylim(0.9, 1)
    axes[0].legend(frameon=False)
    figure.suptitle("Handwritten digits that training never saw")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--epochs", type=int, default=60)
    options.add_argument("--strength", type=float, default=0.1, help="of the regulariser (default: 0.1)")
    options.add_argument("--plot", type=Path, help="a PNG file for the curves")
    chosen = options.parse_args(arguments)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(digits.images).float().div(16)[order], torch.from_numpy(digits.target).long()[order]
    runs = {
        "plain": train(x, y, chosen.epochs, None, "plain"),
        "CutMix, regularised": train(x, y, chosen.epochs, chosen.strength, "CutMix"),
    }
    for name, run in runs.items():
        last = f"accuracy {run.accuracies[-1]:.2%}  cross-entropy {run.losses[-1]:.4f}  confidence {run.confidences[-1]:.3f}"
        print(f"{name:19} of {HELD_OUT} unseen digits: {last}")
    if chosen.plot:
        plot(runs, chosen.plot)
        print(f"curves in {chosen.plot}")
    return runs


if __name__ == "__main__":
    main()
