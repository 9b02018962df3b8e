"""Hugging Face transformers: make a model's loss ours, and undo it.

    from fastloss.integrations.transformers import fuse, patch, unfuse, unpatch
    patch(model)          # model(..., labels=labels).loss now comes from fastloss
    unpatch(model)
    fuse(model)           # causal language models, in training: the same without the logits, last layer and loss in one
    unfuse(model)

`patch` takes language models (causal and masked), sequence, token, multi-label, image and audio classification, question answering and
semantic segmentation. What it changes beside speed: half-precision logits of language models are not copied to float32 first. Their loss is
computed in float32 and is float32, and the gradient is rounded to the logits' dtype once, as before.

With a Trainer: `fuse(model)` before it is made is all; or `class MyTrainer(FusedLoss, Trainer)`, which does that; or, where the model must
stay as it is, `Trainer(..., compute_loss_func=trainer_loss)`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .. import functional
from . import forwards
from .fused_transformers import FusedLoss, fuse, unfuse
from .language_models import causal_lm_loss, linear_causal_lm_loss, masked_lm_loss, trainer_loss

__all__ = [
    "FusedLoss",
    "causal_lm_loss",
    "fuse",
    "linear_causal_lm_loss",
    "masked_lm_loss",
    "patch",
    "trainer_loss",
    "unfuse",
    "unpatch",
]

_SAVED = "_loss_function_before_fastloss"
_PATCHED = "patch"


def patch(model: Any) -> None:
    """Let this model compute its loss by fastloss. Patching twice does no harm.

    A model that asks `model.loss_function` for its loss gets ours, with the same arguments. One that makes its criterion in its forward
    (BERT's and GPT-2's classifiers do) has `torch.nn.functional.cross_entropy`, `nll_loss`, `binary_cross_entropy` and
    `binary_cross_entropy_with_logits` answered by ours as long as its forward runs. `fastloss.explain(model, **batch)` says who computes.

    Raises ValueError for a model whose `loss_function` is none that we know: we would change what it computes.
    """
    if _SAVED in model.__dict__ or forwards.replaced(model, _PATCHED):
        return
    if not _asks_for_its_loss(model):
        forwards.replace(model, _PATCHED, _with_our_functions)
        return
    theirs, known = model.loss_function, _known_losses()
    if theirs in known.values():
        return
    if theirs not in known:
        names = ", ".join(sorted(loss.__name__ for loss in known))
        name = getattr(theirs, "__name__", repr(theirs))
        raise ValueError(f"patch: the loss of a {type(model).__name__} must be one of {names}, got {name}")
    setattr(model, _SAVED, model.__dict__.get("_loss_function"))
    model.loss_function = known[theirs]


def unpatch(model: Any) -> None:
    """Give the model its own loss back. A model that was not patched is left alone."""
    forwards.restore(model, _PATCHED)
    if _SAVED not in model.__dict__:
        return
    before = model.__dict__.pop(_SAVED)
    if before is None:
        del model._loss_function
    else:
        model.loss_function = before


class _OurFunctions(TorchFunctionMode):
    """Calls of torch's losses go to ours, which take the same arguments; all else goes where it went."""

    OURS: ClassVar = {
        F.cross_entropy: functional.cross_entropy,
        F.nll_loss: functional.nll_loss,
        F.binary_cross_entropy: functional.binary_cross_entropy,
        F.binary_cross_entropy_with_logits: functional.binary_cross_entropy_with_logits,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.OURS.get(func, func)(*args, **(kwargs or {}))


def _with_our_functions(model: Any, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _OurFunctions():
        return theirs(*args, **kwargs)


@functools.cache
def _known_losses() -> dict[Any, Callable[..., Any]]:
    """transformers' losses and ours. Where it makes no copy of large logits its own function says what is computed, and calls ours."""
    from transformers.loss import loss_utils as theirs

    def ours(loss: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loss)
        def with_our_functions(*args: Any, **kwargs: Any) -> Any:
            return _with_our_functions(None, loss, *args, **kwargs)

        return with_our_functions

    others = ("ForSequenceClassificationLoss", "ForTokenClassification", "ForQuestionAnsweringLoss", "ForSemanticSegmentationLoss")
    return {
        theirs.ForCausalLMLoss: causal_lm_loss,
        theirs.ForMaskedLMLoss: masked_lm_loss,
        **{loss: ours(loss) for loss in (getattr(theirs, name, None) for name in others) if loss is not None},
    }


def _asks_for_its_loss(model: Any) -> bool:
    """Whether its forward calls `self.loss_function`, or merely inherits that."""
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
