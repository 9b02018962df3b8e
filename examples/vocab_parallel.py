"""A small language model whose head is sharded over ranks: its loss curve is that of the unsharded one.

torchrun --nproc-per-node 2 examples/vocab_parallel.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastloss

VOCABULARY, WIDTH, STEPS, EVERY = 1000, 32, 60, 10


class FromReplicated(torch.autograd.Function):
    """The body's output, the same on every rank, goes into every slice of the head: coming back, the slices' gradients are added."""

    @staticmethod
    def forward(ctx, features):
        return features.view_as(features)

    @staticmethod
    def backward(ctx, dfeatures):
        dfeatures = dfeatures.contiguous()
        dist.all_reduce(dfeatures)
        return dfeatures


def train(classes: slice, sharded: bool) -> list[float]:
    """The loss at every step of a model that predicts the token after the next from one token, with these classes in its head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    head = nn.Parameter(nn.Linear(WIDTH, VOCABULARY, bias=False).weight[classes].detach().clone())
    optimizer = torch.optim.AdamW([*body.parameters(), head], lr=3e-2)
    tokens = torch.randint(VOCABULARY, (4, 64))  # every rank has the same rows
    successor = torch.randperm(VOCABULARY)
    losses = []
    for _ in range(STEPS):
        features = body(tokens).flatten(0, 1)
        target = successor[tokens].flatten()
        loss = sharded_loss(features, head, target) if sharded else fastloss.cross_entropy(features @ head.t(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded_loss(features: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """This rank's logits, and the loss of all ranks' logits."""
    logits = FromReplicated.apply(features) @ head.t()
    return fastloss.vocab_parallel_cross_entropy(logits, target)


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(VOCABULARY * rank // ranks, VOCABULARY * (rank + 1) // ranks)
    curve, whole = train(mine, sharded=True), train(slice(0, VOCABULARY), sharded=False)
    if rank == 0:
        print(f"step  head in {ranks} slices  head in one")
        for step in range(0, STEPS, EVERY):
            print(f"{step:4d}  {curve[step]:16.6f}  {whole[step]:11.6f}")
        print(f"largest difference {max(abs(a - b) for a, b in zip(curve, whole, strict=True)):.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
