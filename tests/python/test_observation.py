"""What observers of PEFT layers count and deliver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyctrlora
from pyctrlora import _C, CTROptimizer, attach

peft = pytest.importorskip("peft")
NAMES = [f"base_model.model.{name}" for name in ("first", "second", "third")]


def counts(attachment: pyctrlora.Attachment) -> list[int]:
    return [_C.find_slot(pair.a).observations for pair in attachment.pairs]


def pairs_of(opt: CTROptimizer) -> list[Any]:
    return [pair for _, pair in opt._roster.all_pairs()]


@pytest.fixture
def observed(net):
    """A PEFT model, its attachment and an optimizer that wants every layer observed."""
    model = net("peft")
    attachment = attach(model)
    opt = CTROptimizer(model.parameters(), factor_warmup_steps=1000)
    return model, attachment, opt


def backward(model: nn.Module, x: Tensor, passes: int = 1) -> None:
    sum(model(x).square().sum() for _ in range(passes)).backward()


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("passes", [1, 3])
def test_each_backward_counts_once(observed, batches, reentrant, passes):
    model, attachment, _ = observed
    model.base_model.model.reentrant = reentrant
    (x, _), *_ = batches(1)
    backward(model, x, passes)
    assert counts(attachment) == [passes] * 3


def test_forwards_without_backward_count_nothing(observed, batches):
    model, attachment, _ = observed
    (x, _), *_ = batches(1)
    model(x)
    with torch.no_grad():
        model(x)
    with model.disable_adapter():
        model(x.requires_grad_()).sum().backward()
    model.merge_adapter()
    model(x).sum().backward()
    model.unmerge_adapter()
    assert counts(attachment) == [0, 0, 0]
    backward(model, x)
    assert counts(attachment) == [1, 1, 1]


def test_mixed_adapter_batches_count_nothing(observed, batches):
    model, attachment, _ = observed
    (x, _), *_ = batches(1)
    layer = model.base_model.model.first
    layer(x, adapter_names=["default", "__base__"] * 2).sum().backward()
    assert counts(attachment) == [0, 0, 0]


def test_unwanted_steps_capture_nothing(net, batches, train):
    model = net("peft")
    attachment = attach(model)
    opt = CTROptimizer(model.parameters(), factor_warmup_steps=1, factor_every=3)
    train(model, opt, batches(4))
    assert sum(counts(attachment)) == 3 + 3  # all on the first step, then one third a step


def test_only_active_adapters_are_observed(net, batches):
    model = net("peft")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first", "second"]))
    first = attach(model)
    model.set_adapter("other")
    second = attach(model)
    assert [pair.name for pair in second.pairs] == [f"{name}.other" for name in NAMES[:2]]
    opt = CTROptimizer([h for pair in (*first.pairs, *second.pairs) for h in (pair.a, pair.b)])
    assert len(opt.ranks()) == 5
    (x, _), *_ = batches(1)
    backward(model, x)
    assert (counts(first), counts(second)) == ([0, 0, 0], [1, 1])
    model.set_adapter("default")
    backward(model, x)
    assert (counts(first), counts(second)) == ([1, 1, 1], [1, 1])
    assert [pair.name for pair in attach(model, "default").pairs] == NAMES


def test_factors_hold_what_the_layer_saw(observed, batches, train, state):
    model, _, opt = observed
    data = batches(1)
    base = model.base_model.model.first.base_layer
    rows = data[0][0].flatten(0, 1)
    train(model, opt, data)
    seen = state(opt)
    (index,) = [i for i in range(3) if seen[f"group{i}.momentum_a"].shape == (1, 3, 6)]
    torch.testing.assert_close(
        seen[f"group{index}.input.trace"].item(),
        rows.square().sum(1).mean().item(),
        rtol=1e-12,
        atol=0,
    )
    expected = base(rows).square().sum(1).mean().item()
    torch.testing.assert_close(
        seen[f"group{index}.base_square"].item(), expected, rtol=1e-12, atol=0
    )


def test_trains_as_our_own_layers_do(net, batches, train, products, same):
    changes = []
    for kind in ("own", "peft"):
        model = net(kind)
        attach(model)
        opt = CTROptimizer(model.parameters(), factor_warmup_steps=2, factor_every=2)
        train(model, opt, batches(8))
        changes.append(products(opt))
        assert not any("not observed" in line for line in opt.describe().splitlines())
    own, theirs = changes
    same({f"base_model.model.{name}": change for name, change in own.items()}, theirs, rtol=1e-9)


# ---- other bases ----


# transformers 5 is renaming these; PEFT 0.21 still reads the old attribute.
old_name = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*`:FutureWarning")


def gpt2(**config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 16}
    plain = dict.fromkeys(["resid_pdrop", "attn_pdrop", "embd_pdrop"], 0.0)
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **plain, **tokens))
    settings = {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **config}))


@old_name
def test_conv1d_of_gpt2_trains():
    model = gpt2()
    opt = CTROptimizer.from_model(model, lr=0.1)
    assert len(opt.ranks()) == 8
    ids = torch.arange(16).repeat(4, 1)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(_C.find_slot(pair.a).observations >= 5 for pair in pairs_of(opt))


@old_name
def test_gradient_checkpointing_of_transformers_counts_once():
    ids = torch.arange(16).repeat(2, 1)
    for reentrant in (True, False):
        model = gpt2()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        attachment = attach(model)
        opt = CTROptimizer(model.parameters())
        model(input_ids=ids, labels=ids).loss.backward()
        assert counts(attachment) == [1] * 8
        opt.step()


def test_packed_base_weight_is_never_read(net, batches, train):
    class Packed(nn.Module):
        def __init__(self, dense: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("codes", (dense.weight * 16).round().to(torch.int8))

        @property
        def weight(self) -> Tensor:
            raise AssertionError("the packed weight was read")

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.codes.to(x.dtype) / 16).T

    model = net("peft")
    for name in ("first", "second", "third"):
        layer = model.base_model.model.get_submodule(name)
        layer.base_layer = Packed(layer.base_layer)
    attachment = attach(model)
    opt = CTROptimizer(model.parameters(), factor_every=3)
    losses = train(model, opt, batches(1) * 10)
    assert losses[-1] < 0.9 * losses[0]
    assert counts(attachment) == [7] * 3  # five steps for all, then each third
