"""timm's way of training a classifier, with its mixup and label smoothing, on handwritten digits: its criteria beside ours.

    python examples/mixup_digits.py --epochs 20

Runs offline and without timm: the digits come with scikit-learn, and what is timm's is written here as timm has it. In a script of timm's
the change is two lines: `train_loss_fn = fastloss.CrossEntropyLoss()` for SoftTargetCrossEntropy (the targets of mixup are probabilities,
smoothed already), and `fastloss.CrossEntropyLoss(label_smoothing=smoothing)` for LabelSmoothingCrossEntropy, where there is no mixup.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fastloss

HELD_OUT, BATCH, CLASSES = 500, 100, 10

Criterion = Callable[[Tensor, Tensor], Tensor]


class SoftTargetCrossEntropy(nn.Module):
    """timm.loss.SoftTargetCrossEntropy."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return torch.sum(-target * F.log_softmax(x, dim=-1), dim=-1).mean()


class Mixup:
    """timm.data.Mixup, mode 'batch': every picture with that of the other end of the batch, and both classes' smoothed indicators."""

    def __init__(self, mixup_alpha: float = 0.4, label_smoothing: float = 0.1, num_classes: int = CLASSES) -> None:
        self.mixup_alpha, self.label_smoothing, self.num_classes = mixup_alpha, label_smoothing, num_classes

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.distributions.Beta(self.mixup_alpha, self.mixup_alpha).sample().item()
        return x * share + x.flip(0) * (1 - share), self.one_hot(target) * share + self.one_hot(target.flip(0)) * (1 - share)

    def one_hot(self, target: Tensor) -> Tensor:
        off = self.label_smoothing / self.num_classes
        return torch.full((len(target), self.num_classes), off).scatter_(1, target[:, None], 1 - self.label_smoothing + off)


def train_one_epoch(
    model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, loss_fn: Criterion, mixup_fn: Mixup | None
) -> float:
    """The mean loss."""
    model.train()
    losses = []
    for batch in torch.randperm(len(x)).split(BATCH):
        input, target = x[batch], y[batch]
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        loss = loss_fn(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def validate(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Criterion) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    with torch.no_grad():
        logits = model(x)
        return loss_fn(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def train(epochs: int, mixup_fn: Mixup | None, train_loss_fn: Criterion, validate_loss_fn: Criterion, label: str) -> list[float]:
    """The training loss of each epoch."""
    digits = load_digits()
    torch.manual_seed(0)
    x, y = torch.from_numpy(digits.data).float().div(16), torch.from_numpy(digits.target).long()
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    losses = [
        train_one_epoch(model, x[HELD_OUT:], y[HELD_OUT:], optimizer, train_loss_fn, mixup_fn)
        for _ in tqdm(range(epochs), desc=f"{label:22}", unit="epoch")
    ]
    loss, accuracy = validate(model, x[:HELD_OUT], y[:HELD_OUT], validate_loss_fn)
    if label.endswith("fastloss"):
        input, target = mixup_fn(x[:BATCH], y[:BATCH]) if mixup_fn is not None else (x[:BATCH], y[:BATCH])
        print(f"{label:22} {fastloss.explain(train_loss_fn, model(input), target)}")
    print(f"{label:22} training loss {losses[-1]:.4f}; {HELD_OUT} unseen digits: cross-entropy {loss:.4f}, accuracy {accuracy:.2%}")
    return losses


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--smoothing", type=float, default=0.1)
    chosen = options.parse_args(arguments)
    smooth, runs = chosen.smoothing, {}
    for library, criterion, mixed in (
        ("torch", nn.CrossEntropyLoss, SoftTargetCrossEntropy()),
        ("fastloss", fastloss.CrossEntropyLoss, fastloss.CrossEntropyLoss()),
    ):
        for way, train_loss_fn in (("mixup", mixed), ("smoothed", criterion(label_smoothing=smooth))):
            label = f"{way}, {library}"
            mixup_fn = Mixup(label_smoothing=smooth) if way == "mixup" else None
            runs[label] = train(chosen.epochs, mixup_fn, train_loss_fn, criterion(), label)
    return runs


if __name__ == "__main__":
    main()
