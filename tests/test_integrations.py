"""fastloss inside real libraries, with the real libraries: small, random, offline."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import fastloss
from fastloss.integrations.transformers import causal_lm_loss, patch, unpatch


@pytest.fixture
def forced(monkeypatch):
    """Kernels, however small the input."""
    monkeypatch.setattr(fastloss.config, "min_numel", 0)


@pytest.fixture
def without_checkout(monkeypatch):
    """transformers imports a package `kernels` if it sees one; with PYTHONPATH at the checkout that would be our folder."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "kernels" / "cpu").is_dir()])


@pytest.fixture
def model(without_checkout):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=311, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(311, (3, 9), generator=generator)
    labels = tokens.clone()
    labels[0, 5:] = -100
    return {"input_ids": tokens, "labels": labels}


def _loss_and_gradient(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), model.lm_head.weight.grad.clone()


@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)], ids=["mean", "num_items int", "num_items tensor"])
def test_patched_model_gives_the_loss_and_gradient_of_the_plain_one(model, batch, items, forced):
    extra = {} if items is None else {"num_items_in_batch": items}
    expected = _loss_and_gradient(model, **batch, **extra)
    patch(model)
    assert model.loss_function is causal_lm_loss
    torch.testing.assert_close(_loss_and_gradient(model, **batch, **extra), expected)
    unpatch(model)
    assert model.loss_function is not causal_lm_loss
    torch.testing.assert_close(_loss_and_gradient(model, **batch, **extra), expected, rtol=0, atol=0)


def test_bfloat16_model_gets_a_float32_loss_no_worse_than_transformers(model, batch, forced):
    exact = _loss_and_gradient(copy.deepcopy(model).bfloat16().double(), **batch)
    half = model.bfloat16()
    theirs = _loss_and_gradient(half, **batch)
    patch(half)
    ours = _loss_and_gradient(half, **batch)
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert (mine.double() - true).abs().max() <= (other.double() - true).abs().max() * 1.05 + 1e-6


def test_patching_twice_and_unpatching_an_unpatched_model_do_no_harm(model, batch):
    original = model.loss_function
    unpatch(model)
    patch(model)
    patch(model)
    unpatch(model)
    assert model.loss_function is original


def test_a_model_with_another_loss_is_refused(model):
    model.loss_function = lambda **kwargs: torch.zeros(())
    with pytest.raises(ValueError, match="patch: the loss of a LlamaForCausalLM must be one of ForCausalLMLoss, "):
        patch(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_lm_loss_without_transformers(dtype, forced):
    torch.manual_seed(3)
    logits = torch.randn(2, 5, 40, dtype=dtype, requires_grad=True)
    labels = torch.randint(40, (2, 5))
    loss = causal_lm_loss(logits, labels, 40)
    assert loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="labels or shift_labels"):
        causal_lm_loss(logits, None, 40)


def test_integrations_import_none_of_the_libraries():
    text = Path(fastloss.integrations.transformers.__file__).read_text()
    assert not any(line.startswith(("import transformers", "from transformers")) for line in text.splitlines())


def test_lightning_module_trains_as_with_torch(forced, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed (pip install lightning)")

    class Classifier(lightning.LightningModule):
        def __init__(self, criterion):
            super().__init__()
            torch.manual_seed(0)
            self.model, self.criterion, self.losses = torch.nn.Linear(8, 5), criterion, []

        def training_step(self, batch, index):
            loss = self.criterion(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    def train(criterion):
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(5, (64,), generator=generator))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        module = Classifier(criterion)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
        return module.losses

    torch.testing.assert_close(train(fastloss.CrossEntropyLoss()), train(torch.nn.CrossEntropyLoss()), rtol=1e-5, atol=1e-6)
