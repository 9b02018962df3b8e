"""Whatever Hugging Face's transformers trains by a loss that we have: its loss and gradients by ours, said by explain, and given back."""

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastloss
from fastloss.integrations.transformers import patch, unpatch

ENCODER = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL = {f"{name}_token_id": 0 for name in ("pad", "cls", "sep", "bos", "eos")}
DECODER = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}
DISTIL = {"vocab_size": 97, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
PICTURES = {**ENCODER, "image_size": 8, "patch_size": 4, "num_channels": 3}

TOKENS = torch.randint(1, 97, (4, 9), generator=torch.Generator().manual_seed(1))
PICTURE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
SOME = torch.where(torch.arange(9) % 3 == 0, TOKENS, -100)
CLASS, CLASSES = torch.tensor([0, 2, 1, 2]), (TOKENS % 3).masked_fill(TOKENS % 5 == 0, -100)
SEVERAL = (TOKENS[:, :3] % 2).float()
SPAN = {"start_positions": torch.tensor([1, 0, 8, 50]), "end_positions": torch.tensor([2, 0, 8, 60])}  # the last is outside: ignored
SEVERAL_LABELS = {"num_labels": 3, "problem_type": "multi_label_classification"}

# what is trained -> the model, its options, its config's options, the batch's labels, and whether it asks `loss_function` for its loss
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor], bool]] = {
    "causal LM": ("LlamaForCausalLM", DECODER, {"labels": TOKENS}, True),
    "causal LM, own criterion": ("BartForCausalLM", {"vocab_size": 97, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2,
                                                     "decoder_ffn_dim": 32}, {"labels": TOKENS}, False),
    "masked LM": ("ModernBertForMaskedLM", {**ENCODER, **SPECIAL}, {"labels": SOME}, True),
    "masked LM, criterion in forward": ("BertForMaskedLM", ENCODER, {"labels": SOME}, False),
    "masked LM, own criterion": ("DistilBertForMaskedLM", DISTIL, {"labels": SOME}, False),
    "sequence": ("BertForSequenceClassification", {**ENCODER, "num_labels": 3}, {"labels": CLASS}, False),
    "sequence by loss_function": ("LlamaForSequenceClassification", {**DECODER, "num_labels": 3}, {"labels": CLASS}, True),
    "several labels": ("BertForSequenceClassification", {**ENCODER, **SEVERAL_LABELS}, {"labels": SEVERAL}, False),
    "several labels by loss_function": ("LlamaForSequenceClassification", {**DECODER, **SEVERAL_LABELS}, {"labels": SEVERAL}, True),
    "tokens": ("BertForTokenClassification", {**ENCODER, "num_labels": 3}, {"labels": CLASSES}, False),
    "tokens by loss_function": ("LlamaForTokenClassification", {**DECODER, "num_labels": 3}, {"labels": CLASSES}, True),
    "answers": ("BertForQuestionAnswering", ENCODER, SPAN, False),
    "answers by loss_function": ("LlamaForQuestionAnswering", DECODER, SPAN, True),
    "pictures": ("ViTForImageClassification", {**PICTURES, "num_labels": 3}, {"labels": CLASS}, True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers imports a package `kernels` if it sees one; with PYTHONPATH at the checkout that would be our folder."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "kernels" / "cpu").is_dir()])
    pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")


def made(task: str) -> tuple[Any, dict[str, torch.Tensor]]:
    import transformers

    name, options, labels, _ = TASKS[task]
    torch.manual_seed(0)
    model = getattr(transformers, name)
    inputs = {"pixel_values": PICTURE} if "ViT" in name else {"input_ids": TOKENS}
    return model(model.config_class(**options)).eval(), {**inputs, **labels}


def step(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    found = model(**batch)
    found.loss.backward()
    return [found.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_gradients_are_those_of_the_plain_model(task: str) -> None:
    model, batch = made(task)
    expected, signature, loss_function = step(model, batch), inspect.signature(model.forward), model.loss_function
    with pytest.raises(TypeError, match="did not call a fastloss function"):
        fastloss.explain(model, **batch)
    patch(model)
    patch(model)
    assert fastloss.explain(model, **batch).path == "kernel"
    assert inspect.signature(model.forward) == signature  # a Trainer reads the columns that it may pass from there
    assert ("forward" not in model.__dict__) == (model.loss_function is not loss_function) == TASKS[task][-1]
    for mine, theirs in zip(step(model, batch), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    unpatch(model)
    unpatch(model)
    assert model.loss_function is loss_function
    assert "forward" not in model.__dict__
    assert not [name for name in model.__dict__ if "fastloss" in name or "patch" in name]
    torch.testing.assert_close(step(model, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("task", ["sequence", "sequence by loss_function"])
def test_a_copy_of_a_patched_model_is_patched_and_computes_with_its_own_weights(task: str) -> None:
    model, batch = made(task)
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.equal(twin(**batch).logits, model(**batch).logits)
    assert fastloss.explain(twin, **batch).path == "kernel"
    unpatch(twin)
    assert fastloss.explain(model, **batch).path == "kernel"
    with pytest.raises(TypeError):
        fastloss.explain(twin, **batch)


@pytest.mark.parametrize("task", ["masked LM", "tokens by loss_function"])
def test_half_precision_is_no_worse_than_the_plain_model(task: str) -> None:
    model, batch = made(task)
    model = model.bfloat16()
    exact, theirs = step(copy.deepcopy(model).double(), batch), step(model, batch)
    patch(model)
    ours = step(model, batch)
    assert ours[0].dtype == theirs[0].dtype
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert (mine.double() - true).norm() <= 1.1 * (other.double() - true).norm() + 1e-4


def test_what_our_losses_do_not_cover_stays_transformers_own() -> None:
    """Regression goes through a patched model as it did; a criterion that we do not have is refused where the model asks for it by name."""
    model, batch = made("sequence by loss_function")
    model.config.problem_type, model.config.num_labels = "regression", 3
    batch["labels"] = torch.randn(4, 3)
    expected = step(model, batch)
    patch(model)
    torch.testing.assert_close(step(model, batch), expected, rtol=0, atol=0)
    other, _ = made("pictures")
    other.loss_function = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(ValueError, match=r"patch: the loss of a ViTForImageClassification must be one of For.*, got <lambda>"):
        patch(other)


@pytest.mark.parametrize("task", [*(pytest.param(task, marks=pytest.mark.long) for task in TASKS if task != "sequence"), "sequence"])
def test_compiled(task: str) -> None:
    model, batch = made(task)
    expected = model(**batch).loss
    patch(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**batch).loss, expected)
