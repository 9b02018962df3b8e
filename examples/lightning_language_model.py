"""A Lightning module whose last layer and loss are one: in training there are no logits, in prediction there are.

python examples/lightning_language_model.py
"""

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn

import fastloss

VOCABULARY, WIDTH, LENGTH = 2000, 32, 16


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.losses: list[float] = []

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens))[0]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def training_step(self, batch: Any, index: int) -> Tensor:
        tokens, following = batch
        loss = fastloss.linear_cross_entropy(self.hidden(tokens), self.head.weight, following, linear_bias=self.head.bias)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(arguments: list[str] | None = None) -> list[float]:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed")
    chosen = options.parse_args(arguments)
    torch.manual_seed(0)
    text = torch.randint(VOCABULARY, (32, LENGTH + 1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(text[:, :-1], text[:, 1:]), batch_size=8)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    model = LanguageModel()
    lightning.Trainer(max_epochs=chosen.epochs, accelerator="cpu", precision=chosen.precision, **quiet).fit(model, data)
    print(f"loss {model.losses[0]:.4f} at first, {model.losses[-1]:.4f} after {len(model.losses)} steps")
    return model.losses


if __name__ == "__main__":
    main()
