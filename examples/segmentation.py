"""torchvision's way of training a segmentation model: two heads, an ignored class for borders, IoU; with torch's loss and with ours.

    python examples/segmentation.py --epochs 16

Runs offline and without torchvision: the pictures are discs and squares on noise, and what is torchvision's is written here as its
references/segmentation/train.py has it. The change is one line, in `criterion`. Logits are (N, C, H, W): no transposing, no flattening.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fastloss

SIDE, CLASSES, IGNORED, BATCH = 48, 3, 255, 8

CrossEntropy = Callable[..., Tensor]


class TwoHeads(nn.Module):
    """A small network that answers as torchvision's FCN and DeepLab do: {'out': (N, C, H, W), 'aux': the same}."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 5, padding=2), nn.ReLU())
        self.classifier, self.aux_classifier = nn.Conv2d(width, CLASSES, 1), nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        near = self.first(x)
        heads = {"out": self.classifier(self.second(near)), "aux": self.aux_classifier(near)}
        return {name: F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False) for name, y in heads.items()}


def criterion(inputs: dict[str, Tensor], target: Tensor, cross_entropy: CrossEntropy) -> Tensor:
    losses = {name: cross_entropy(x, target, ignore_index=IGNORED) for name, x in inputs.items()}
    if len(losses) == 1:
        return losses["out"]
    return losses["out"] + 0.5 * losses["aux"]


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, SIDE, SIDE) of a disc (class 1) and a square (class 2) each, and their classes, borders ignored."""
    chance = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    x, y = torch.randn(count, 3, SIDE, SIDE, generator=chance) * 0.5, torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for number in range(count):
        for shape in (1, 2):
            top, left = torch.randint(8, SIDE - 8, (2,), generator=chance)
            size = torch.randint(5, 9, (), generator=chance)
            down, right = (rows - top).abs(), (columns - left).abs()
            distance = (down**2 + right**2).sqrt() if shape == 1 else torch.maximum(down, right)
            y[number][distance < size] = shape
            y[number][(distance - size).abs() < 1] = IGNORED
            x[number, shape][distance < size] += 1.0
    return x, y


def mean_iou(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean over the classes of intersection over union."""
    model.eval()
    with torch.no_grad():
        found = model(x)["out"].argmax(1)
    kept = y != IGNORED
    confusion = torch.bincount(CLASSES * y[kept] + found[kept], minlength=CLASSES**2).view(CLASSES, CLASSES).float()
    hits = confusion.diagonal()
    return (hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean().item()


def train(cross_entropy: CrossEntropy, epochs: int, label: str) -> tuple[list[float], float]:
    """The loss of each step, and the IoU on pictures that training never saw."""
    torch.manual_seed(0)
    model, (x, y), losses = TwoHeads(), pictures(64, seed=1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in tqdm(range(epochs), desc=f"{label:8}", unit="epoch"):
        model.train()
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = criterion(model(x[batch]), y[batch], cross_entropy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    iou = mean_iou(model, *pictures(16, seed=2))
    print(f"{label:8} loss {losses[0]:.3f} -> {losses[-1]:.3f}, mean IoU {iou:.3f}")
    return losses, iou


def main(arguments: list[str] | None = None) -> dict[str, tuple[list[float], float]]:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--epochs", type=int, default=16)
    epochs = options.parse_args(arguments).epochs
    return {"torch": train(F.cross_entropy, epochs, "torch"), "fastloss": train(fastloss.cross_entropy, epochs, "fastloss")}


if __name__ == "__main__":
    main()
