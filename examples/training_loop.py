"""A plain training loop with everything that usually surrounds a loss: autocast, gradient accumulation, gradient scaling.

    python examples/training_loop.py

A small language model (embedding, GRU, vocabulary head) learns a fixed random text. Half-precision logits go into the loss as they are:
under autocast fastloss computes in float32 and returns float32 without a float32 copy of the logits. Or there are no logits at all: the
head and the loss in one.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss

VOCABULARY, WIDTH, LENGTH, BATCH = 2000, 32, 16, 8


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens))[0]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def of_logits(cross_entropy: Callable[..., Tensor]) -> Callable[[LanguageModel, Tensor, Tensor], Tensor]:
    return lambda model, tokens, following: cross_entropy(model(tokens).flatten(0, 1), following.flatten(), reduction="sum")


def without_logits(model: LanguageModel, tokens: Tensor, following: Tensor) -> Tensor:
    head = model.head
    return fastloss.linear_cross_entropy(model.hidden(tokens), head.weight, following, linear_bias=head.bias, reduction="sum")


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and the tokens that follow them; some positions are padding (-100)."""
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(VOCABULARY, (4, BATCH, LENGTH + 1), generator=generator)
    for number in range(count):
        tokens = text[number % len(text)]
        following = tokens[:, 1:].clone()
        following[0, LENGTH // 2 :] = -100
        yield tokens[:, :-1], following


def train(
    loss_of: Callable[[LanguageModel, Tensor, Tensor], Tensor], steps: int = 40, accumulate: int = 2, dtype: torch.dtype = torch.bfloat16
) -> list[float]:
    """The loss of every optimizer step. A step is `accumulate` batches, normalised by the number of tokens in all of them."""
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # bfloat16 needs no scaling; float16 does, and the loop is the same
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
    losses = []
    stream = batches(steps * accumulate)
    for _ in range(steps):
        group = [next(stream) for _ in range(accumulate)]
        tokens_in_group = sum(int((following != -100).sum()) for _, following in group)
        total = 0.0
        for tokens, following in group:
            with torch.autocast("cpu", dtype):
                loss = loss_of(model, tokens, following) / tokens_in_group
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    chosen = options.parse_args(arguments)
    found = {}
    ways = {"fastloss": of_logits(fastloss.cross_entropy), "fastloss without logits": without_logits, "torch": of_logits(F.cross_entropy)}
    for name, loss_of in ways.items():
        found[name] = train(loss_of, chosen.steps, dtype=getattr(torch, chosen.dtype))
        print(f"{name:24} loss {found[name][0]:.4f} at first, {found[name][-1]:.4f} after {chosen.steps} steps")
    return found


if __name__ == "__main__":
    main()
