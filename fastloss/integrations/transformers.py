"""Hugging Face transformers: make a causal language model's loss ours, and undo it.

    from fastloss.integrations.transformers import fuse, patch, unfuse, unpatch
    patch(model)          # model(input_ids, labels=labels).loss now comes from fastloss
    unpatch(model)
    fuse(model)           # in training, the same without the logits: last layer and loss in one. A Trainer needs nothing else
    unfuse(model)

What it changes beside speed: half-precision logits are not copied to float32 first. The loss is computed in float32 and is float32, and the
gradient is rounded to the logits' dtype once, as before.
"""

import functools
import inspect
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, linear
from ..chunks import all_logits
from ..routing import explain

_SAVED = "_loss_function_before_fastloss"
_FUSED = "_forward_before_fastloss"


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
    rows, target = logits.reshape(-1, vocab_size), _next_tokens(labels, shift_labels, ignore_index).reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    return _per_item(_float32_loss(rows, target, ignore_index, reduction), num_items_in_batch)


def linear_causal_lm_loss(
    hidden_states: Tensor,
    linear_weight: Tensor,
    labels: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
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


def patch(model: Any) -> None:
    """Let this model compute its loss by fastloss. Patching twice does no harm.

    Raises ValueError for a model whose loss is not transformers' ForCausalLMLoss: we would change what it computes.
    """
    if model.loss_function is causal_lm_loss:
        return
    _refuse_other_losses(model, "patch")
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


def fuse(model: Any) -> None:
    """Let this model, in training and with labels, compute its loss from its last hidden states; the logits of its output are None.

    A pass over two tokens first makes sure that its logits are what we take them for: its head, and where the config has them a scale and
    a softcap. Fusing twice does no harm.

    Raises ValueError for a model of which that is not so, or which adds something to its loss.
    """
    if _FUSED in model.__dict__:
        return
    if model.loss_function is not causal_lm_loss:
        _refuse_other_losses(model, "fuse")
    config = model.config.get_text_config()
    options: dict[str, Any] = {"logit_scale": _scale(config), "logit_softcap": getattr(config, "final_logit_softcapping", None)}
    if getattr(config, "output_router_logits", False):
        raise ValueError(f"fuse: the loss of a {type(model).__name__} must be that of its logits alone, got one with the routers' loss")
    _refuse_other_logits(model, options)
    original, signature = model.forward, inspect.signature(model.forward)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
        no_labels = labels is None and shifted is None
        if no_labels or not model.training or given.pop("logits_to_keep", 0) or given.get("return_dict") is False:
            return original(*args, **kwargs)
        items, ignored = given.pop("num_items_in_batch", None), given.pop("ignore_index", -100)
        outputs, head = model.base_model(**given), model.get_output_embeddings()
        loss = linear_causal_lm_loss(
            outputs[0],
            head.weight,
            labels,
            linear_bias=head.bias,
            num_items_in_batch=items,
            ignore_index=ignored,
            shift_labels=shifted,
            **options,
        )
        from transformers.modeling_outputs import CausalLMOutputWithPast

        kept = {name: value for name, value in outputs.items() if name in CausalLMOutputWithPast.__dataclass_fields__}
        return CausalLMOutputWithPast(loss=loss, logits=None, **kept)

    setattr(model, _FUSED, original)
    model.forward = forward


def unfuse(model: Any) -> None:
    """Give the model its own forward back. A model that was not fused is left alone."""
    if model.__dict__.pop(_FUSED, None) is not None:
        del model.forward


def _scale(config: Any) -> float:
    """What the model multiplies its logits by: Cohere has logit_scale, Granite divides by logits_scaling."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return float(1 if scale is None else scale) / float(divisor or 1)


def _refuse_other_losses(model: Any, what: str) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", repr(model.loss_function))
        raise ValueError(f"{what}: the loss of a {type(model).__name__} must be ForCausalLMLoss, got {name}")


def _refuse_other_logits(model: Any, options: dict[str, Any]) -> None:
    head, modes = model.get_output_embeddings(), {module: module.training for module in model.modules()}
    if type(head) is not torch.nn.Linear:
        raise ValueError(f"fuse: the output embeddings of a {type(model).__name__} must be an nn.Linear, got {type(head).__name__}")
    tokens = torch.tensor([[0, 1]], device=head.weight.device)
    try:
        model.eval()
        with torch.no_grad():
            theirs = model(input_ids=tokens, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=tokens, use_cache=False)[0]
            ours = all_logits(hidden, head.weight, head.bias, options["logit_scale"], options["logit_softcap"] or 0.0).float()
    finally:
        for module, training in modes.items():
            module.training = training
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        raise ValueError(
            f"fuse: the logits of a {type(model).__name__} must be head(last hidden states), scaled and capped as its config says"
        )


def _next_tokens(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("causal_lm_loss: labels or shift_labels must be given, got neither")
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _per_item(loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
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
