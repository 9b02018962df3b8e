"""Hugging Face transformers: make a causal language model's loss ours, and undo it.

    from fastloss.integrations.transformers import patch, unpatch
    patch(model)          # model(input_ids, labels=labels).loss now comes from fastloss
    unpatch(model)

What it changes beside speed: half-precision logits are not copied to float32 first. The loss is computed in float32 and is float32, and the
gradient is rounded to the logits' dtype once, as before.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..routing import explain

_SAVED = "_loss_function_before_fastloss"


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
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
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss: labels or shift_labels must be given, got neither")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows, target = logits.reshape(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = _float32_loss(rows, target, ignore_index, reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def patch(model: Any) -> None:
    """Let this model compute its loss by fastloss. Patching twice does no harm.

    Raises ValueError for a model whose loss is not transformers' ForCausalLMLoss: we would change what it computes.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is causal_lm_loss:
        return
    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", repr(model.loss_function))
        raise ValueError(f"patch: the loss of a {type(model).__name__} must be ForCausalLMLoss, got {name}")
    setattr(model, _SAVED, model.__dict__.get("_loss_function"))
    model.loss_function = causal_lm_loss


def unpatch(model: Any) -> None:
    """Give the model its own loss back. A model that was not patched is left alone."""
    if _SAVED not in model.__dict__:
        return
    before = model.__dict__.pop(_SAVED)
    if before is None:
        del model._loss_function
    else:
        model.loss_function = before


def _float32_loss(rows: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Half-precision logits are read as they are where our kernels serve the call; else torch gets the float32 copy it wants."""
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return functional.cross_entropy(rows, target, ignore_index=ignore_index, reduction=reduction)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    if torch.compiler.is_compiling() or explain(functional.cross_entropy, rows, target, **options).path != "kernel":
        return functional.cross_entropy(rows.float(), target, ignore_index=ignore_index, reduction=reduction)
    with torch.autocast(rows.device.type, rows.dtype):  # under autocast the loss of half-precision logits is float32
        return functional.cross_entropy(rows, target, ignore_index=ignore_index, reduction=reduction)
