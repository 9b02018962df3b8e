"""A softmax classifier by gradient descent, twice: with bare weight tensors, and as an nn.Module. Prints the cost of both.

python examples/softmax_classifier.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastloss

X = torch.tensor([[1, 2, 1, 1], [2, 1, 3, 2], [3, 1, 3, 4], [4, 1, 5, 5], [1, 7, 5, 5], [1, 2, 5, 6], [1, 6, 6, 6], [1, 7, 7, 7]]).float()
Y = torch.tensor([2, 2, 2, 1, 1, 1, 0, 0])
EPOCHS, RATE, EVERY = 1000, 0.1, 100


def low_level() -> list[float]:
    """Weights and bias start at zero."""
    weight, bias = torch.zeros(4, 3, requires_grad=True), torch.zeros(1, requires_grad=True)
    return _descend([weight, bias], lambda: fastloss.cross_entropy(X @ weight + bias, Y))


def as_module() -> list[float]:
    """The same with nn.Linear and fastloss's module; weights start at random."""
    torch.manual_seed(1)
    model, criterion = nn.Linear(4, 3), fastloss.CrossEntropyLoss()
    return _descend(list(model.parameters()), lambda: criterion(model(X), Y))


def _descend(parameters: list[Tensor], cost_of_now: Callable[[], Tensor]) -> list[float]:
    """The cost at every epoch, the one before the first step included."""
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    costs = []
    for epoch in range(EPOCHS + 1):
        cost = cost_of_now()
        costs.append(cost.item())
        if epoch < EPOCHS:
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
    return costs


def main() -> None:
    low, module = low_level(), as_module()
    print("epoch   tensors    nn.Module")
    for epoch in range(0, EPOCHS + 1, EVERY):
        print(f"{epoch:5}  {low[epoch]:.6f}   {module[epoch]:.6f}")


if __name__ == "__main__":
    main()
