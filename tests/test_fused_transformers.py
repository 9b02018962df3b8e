"""Causal language models whose last layer and loss are one: losses and gradients of the plain model, without its logits."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastloss
from fastloss import chunks
from fastloss.integrations.transformers import FusedLoss, fuse, patch, trainer_loss, unfuse


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five rows; and no folder `kernels` in sight, which transformers would import."""
    monkeypatch.setattr(chunks, "_FEWEST", {"cpu": 5})
    monkeypatch.setattr(fastloss.config, "linear_chunk_bytes", 1)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "kernels" / "cpu").is_dir()])
    pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")


def made(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 311, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    kinds = {
        "Llama": ({**common, "num_key_value_heads": 2}, "LlamaConfig", "LlamaForCausalLM"),
        "GPT2": ({"vocab_size": 311, "n_embd": 16, "n_layer": 1, "n_head": 2}, "GPT2Config", "GPT2LMHeadModel"),
        "Gemma2": (
            {**common, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
            "Gemma2Config",
            "Gemma2ForCausalLM",
        ),
        "Cohere": ({**common, "num_key_value_heads": 2, "logit_scale": 0.25}, "CohereConfig", "CohereForCausalLM"),
        "Granite": ({**common, "num_key_value_heads": 2, "logits_scaling": 3.0}, "GraniteConfig", "GraniteForCausalLM"),
    }
    options, config, model = kinds[kind]
    return getattr(transformers, model)(getattr(transformers, config)(**options)).train()


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(311, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 5:] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def step(model: Any, **inputs: Any) -> list[torch.Tensor]:
    torch.manual_seed(5)  # dropout
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma2", "Cohere", "Granite"])
@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)], ids=["mean", "num_items int", "num_items tensor"])
def test_loss_and_gradients_are_the_models_own(kind: str, items: Any) -> None:
    model, extra = made(kind), {} if items is None else {"num_items_in_batch": items}
    expected = step(model, **batch(), **extra)
    fuse(model)
    assert model(**batch()).logits is None
    for mine, theirs in zip(step(model, **batch(), **extra), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    model.eval()
    assert model(**batch()).logits is not None
    assert model.train()(input_ids=batch()["input_ids"]).logits is not None
    unfuse(model)
    assert "forward" not in model.__dict__


def test_bfloat16_is_no_worse_than_the_plain_model() -> None:
    model = made("Llama").bfloat16()
    exact, theirs = step(copy.deepcopy(model).double(), **batch()), step(model, **batch())
    fuse(model)
    ours = step(model, **batch())
    assert ours[0].dtype == torch.float32
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert (mine.double() - true).norm() <= 2 * (other.double() - true).norm() + 1e-6


def test_there_are_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = made("Llama"), []
    fuse(model)
    room = chunks.Chunks._room
    monkeypatch.setattr(chunks.Chunks, "_room", lambda self: shapes.append((r := room(self)).shape) or r)
    monkeypatch.setattr(model.lm_head, "forward", None)  # nobody calls it
    step(model, **batch())
    assert shapes == [(5, 311)]


def test_models_that_do_something_else_are_refused() -> None:
    model = made("Llama")
    fuse(model)
    fuse(model)
    unfuse(model)
    unfuse(model)
    other = made("Llama")
    other.config.logit_scale = 2.0  # which this model does not look at
    with pytest.raises(ValueError, match="fuse: the logits of a LlamaForCausalLM must be"):
        fuse(other)
    assert other.training
    other.loss_function = lambda **kwargs: torch.zeros(())
    with pytest.raises(ValueError, match="fuse: the loss of a LlamaForCausalLM must be ForCausalLMLoss"):
        fuse(other)
    patched = made("Llama")
    patch(patched)
    fuse(patched)


def test_a_copy_of_a_fused_model_computes_with_its_own_weights() -> None:
    """As averaged models are made, and references for preference training."""
    model = made("Llama")
    fuse(model)
    twin = copy.deepcopy(model)
    expected = step(model, **batch())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    for mine, theirs in zip(step(twin, **batch()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    unfuse(twin)
    assert twin(**batch()).logits is not None
    assert model(**batch()).logits is None


def test_a_model_that_does_not_ask_for_its_loss_by_name_is_refused() -> None:
    """BART's is not shifted, and its `loss_function` says ForCausalLMLoss all the same."""
    import transformers

    config = transformers.BartConfig(vocab_size=311, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32)
    with pytest.raises(ValueError, match=r"fuse: the l\w+ of a BartForCausalLM must be"):
        fuse(transformers.BartForCausalLM(config))


def test_a_forward_of_the_users_own_comes_back() -> None:
    model = made("Llama")
    theirs, calls = model.forward, []
    model.forward = lambda *args, **kwargs: calls.append(1) or theirs(*args, **kwargs)
    mine = model.forward
    fuse(model)
    model.eval()(**batch())
    assert calls
    unfuse(model)
    assert model.forward is mine


@pytest.mark.parametrize("way", ["fuse", "mixin", "model_init", "compute_loss_func"])
def test_trainer(way: str, tmp_path: Path) -> None:
    """With gradient accumulation and a last batch of another size: the losses of the plain Trainer."""
    import transformers

    pytest.importorskip("accelerate", reason="accelerate is not installed: transformers.Trainer needs it")

    class Mixed(FusedLoss, transformers.Trainer):
        pass

    def train(kind: Any, model: Any, **options: Any) -> list[float]:
        data = [{k: v[i] for k, v in batch().items()} for i in range(3)] * 5
        how = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=1, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = kind(model, how, train_dataset=data, **options)
        trainer.train()
        if kind is Mixed:
            assert trainer.model(**batch()).logits is None
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def model() -> Any:
        return None if way == "model_init" else made("Llama")

    initial = {"model_init": lambda: made("Llama")} if way == "model_init" else {}
    plain, mine = train(transformers.Trainer, model(), **initial), model()
    if way == "fuse":
        fuse(mine)
    loss = {"compute_loss_func": trainer_loss} if way == "compute_loss_func" else {}
    found = train(Mixed if way in ("mixin", "model_init") else transformers.Trainer, mine, **initial, **loss)
    assert found == pytest.approx(plain, rel=1e-3)


def test_a_trainer_that_computes_its_loss_from_logits_is_refused(tmp_path: Path) -> None:
    import transformers

    pytest.importorskip("accelerate", reason="accelerate is not installed: transformers.Trainer needs it")

    class Mixed(FusedLoss, transformers.Trainer):
        pass

    how = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"FusedLoss: label_smoother must be None, got .*: it needs the logits"):
        Mixed(made("Llama"), how)
