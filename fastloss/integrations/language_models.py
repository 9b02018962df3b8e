"""The losses of language models, with the arguments that Hugging Face's transformers gives them."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, linear
from ..routing import explain

Items = Tensor | int | None


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Items = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, with its arguments: tokens up to n predict token n.

    Args:
        logits: (..., L, vocab_size), any float dtype.
        labels: (..., L), class indices; not looked at if `shift_labels` are given.
        num_items_in_batch: what the sum of the losses is divided by, under gradient accumulation; None for the mean over this batch.
        shift_labels: (..., L), labels that are shifted already.

    Returns:
        The loss, float32 (float64 for float64 logits).
    """
    return masked_lm_loss(logits, _next_tokens(labels, shift_labels, ignore_index), vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Items = None, ignore_index: int = -100, **kwargs: Any
) -> Tensor:
    """transformers' ForMaskedLMLoss, with its arguments: `logits` (..., L, vocab_size) and `labels` (..., L) position by position.

    Returns:
        The loss, float32 (float64 for float64 logits).
    """
    rows, target = logits.reshape(-1, vocab_size), labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    return _per_item(_float32_loss(rows, target, ignore_index, reduction), num_items_in_batch)


def linear_causal_lm_loss(
    hidden_states: Tensor,
    linear_weight: Tensor,
    labels: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    num_items_in_batch: Items = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """`causal_lm_loss` of the logits that the last layer would make of `hidden_states` (..., L, D), by `fastloss.linear_cross_entropy`."""
    target = _next_tokens(labels, shift_labels, ignore_index).to(hidden_states.device)
    half = hidden_states.dtype in (torch.bfloat16, torch.float16)
    # under autocast the loss of half precision is float32
    with torch.autocast(hidden_states.device.type, hidden_states.dtype) if half else nullcontext():
        loss = linear.linear_cross_entropy(
            hidden_states.flatten(0, -2),
            linear_weight,
            target.reshape(-1),
            linear_bias=linear_bias,
            reduction="mean" if num_items_in_batch is None else "sum",
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
        )
    return _per_item(loss, num_items_in_batch)


def trainer_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Items = None) -> Tensor:
    """For `transformers.Trainer(model, ..., compute_loss_func=trainer_loss)`: the causal loss of a model's logits, without touching the
    model. The logits are there, then; `fuse` and `FusedLoss` do without them."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return causal_lm_loss(logits, labels, logits.shape[-1], num_items_in_batch)


def _next_tokens(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """What is to be predicted at each position."""
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("causal_lm_loss: labels or shift_labels must be given, got neither")
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _per_item(loss: Tensor, num_items_in_batch: Items) -> Tensor:
    """A sum over so many items, or a mean already."""
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def _float32_loss(rows: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Half-precision logits are read as they are where our kernels serve the call; else torch gets the float32 copy it wants."""
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return functional.cross_entropy(rows, target, ignore_index=ignore_index, reduction=reduction)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    if torch.compiler.is_compiling() or explain(functional.cross_entropy, rows, target, **options).path != "kernel":
        return functional.cross_entropy(rows.float(), target, ignore_index=ignore_index, reduction=reduction)
    with torch.autocast(rows.device.type, rows.dtype):  # under autocast the loss of half-precision logits is float32
        return functional.cross_entropy(rows, target, ignore_index=ignore_index, reduction=reduction)
