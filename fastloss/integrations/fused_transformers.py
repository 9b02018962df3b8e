"""Causal language models of Hugging Face's transformers whose last layer and loss are one; imported by `transformers`."""

import inspect
from typing import Any

import torch

from ..chunks import all_logits
from . import forwards
from .language_models import causal_lm_loss, linear_causal_lm_loss

_FUSED = "fuse"


def fuse(model: Any) -> None:
    """Let this model, in training and with labels, compute its loss from its last hidden states; the logits of its output are None.

    A pass over two tokens first makes sure that its logits and its loss are what we take them for: its head, and where the config has them
    a scale and a softcap; the mean over the next tokens. Fusing twice does no harm.

    Raises ValueError for a model of which that is not so, or which adds something to its loss.
    """
    if forwards.replaced(model, _FUSED):
        return
    config, signature = model.config.get_text_config(), inspect.signature(model.forward)
    options: dict[str, Any] = {"logit_scale": _scale(config), "logit_softcap": getattr(config, "final_logit_softcapping", None)}
    if getattr(config, "output_router_logits", False):
        raise ValueError(f"fuse: the loss of a {type(model).__name__} must be that of its logits alone, got one with the routers' loss")
    _refuse_other_losses(model)
    _refuse_other_logits(model, options)

    def fused(model: Any, theirs: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
        no_labels = labels is None and shifted is None
        if no_labels or not model.training or given.pop("logits_to_keep", 0) or given.get("return_dict") is False:
            return theirs(*args, **kwargs)
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

    forwards.replace(model, _FUSED, fused)


def unfuse(model: Any) -> None:
    """Give the model its own forward back. A model that was not fused is left alone."""
    forwards.restore(model, _FUSED)


class FusedLoss:
    """A mixin for transformers' Trainer and what is made of it: `class MyTrainer(FusedLoss, Trainer)` fuses its model.

    The model computes the loss in its own forward, so DDP, FSDP, autocast and gradient accumulation do what they always do.

    Raises ValueError for a model that `fuse` refuses, and for `compute_loss_func` and `label_smoothing_factor`, with which a Trainer
    computes its loss from logits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("compute_loss_func", "label_smoother"):
            if getattr(self, name, None) is not None:
                raise ValueError(f"FusedLoss: {name} must be None, got {getattr(self, name)!r}: it needs the logits")
        fuse(self.model)  # type: ignore[attr-defined]

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """The model that `model_init` makes, for each trial of a search for hyperparameters, fused."""
        model = super().call_model_init(*args, **kwargs)  # type: ignore[misc]
        fuse(model)
        return model


def _scale(config: Any) -> float:
    """What the model multiplies its logits by: Cohere has logit_scale, Granite divides by logits_scaling."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return float(1 if scale is None else scale) / float(divisor or 1)


def _refuse_other_losses(model: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function not in (ForCausalLMLoss, causal_lm_loss):
        name = getattr(model.loss_function, "__name__", repr(model.loss_function))
        raise ValueError(f"fuse: the loss of a {type(model).__name__} must be ForCausalLMLoss, got {name}")


def _refuse_other_logits(model: Any, options: dict[str, Any]) -> None:
    head, modes = model.get_output_embeddings(), {module: module.training for module in model.modules()}
    if type(head) is not torch.nn.Linear:
        raise ValueError(f"fuse: the output embeddings of a {type(model).__name__} must be an nn.Linear, got {type(head).__name__}")
    tokens = torch.tensor([[0, 1]], device=head.weight.device)
    try:
        model.eval()
        with torch.no_grad():
            found = model(input_ids=tokens, labels=tokens, use_cache=False)
            hidden = model.base_model(input_ids=tokens, use_cache=False)[0]
            ours = all_logits(hidden, head.weight, head.bias, options["logit_scale"], options["logit_softcap"] or 0.0).float()
            loss = causal_lm_loss(found.logits, tokens, found.logits.shape[-1])
    finally:
        for module, training in modes.items():
            module.training = training
    theirs = found.logits.float()
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        raise ValueError(
            f"fuse: the logits of a {type(model).__name__} must be head(last hidden states), scaled and capped as its config says"
        )
    if not torch.allclose(loss.float(), found.loss.float(), rtol=1e-2):
        raise ValueError(
            f"fuse: the loss of a {type(model).__name__} must be that of each next token and nothing else: of two tokens "
            f"{float(loss):.6g}, got {float(found.loss):.6g}"
        )
