"""Finding, registering and observing the pairs of PEFT models."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import pyctrlora
from pyctrlora import _C, CTROptimizer, attach

peft = pytest.importorskip("peft")
NAMES = [f"base_model.model.{name}" for name in ("first", "second", "third")]


def counts(attachment: pyctrlora.Attachment) -> list[int]:
    return [_C.find_slot(pair.a).observations for pair in attachment.pairs]


def backward(model: nn.Module, x: Tensor, passes: int = 1) -> None:
    sum(model(x).square().sum() for _ in range(passes)).backward()


@pytest.fixture
def observed(net):
    """A PEFT model, its attachment and an optimizer that wants every layer observed."""
    model = net("peft")
    attachment = attach(model)
    opt = CTROptimizer(model.parameters(), factor_warmup_steps=1000)
    return model, attachment, opt


def test_finds_every_pair(net):
    model = net("peft", alpha=12.0)
    attachment = attach(model)
    assert [pair.name for pair in attachment.pairs] == NAMES
    assert all(pair.scaling == 4.0 for pair in attachment.pairs)
    layer = model.base_model.model.first
    assert attachment.pairs[0].a is layer.lora_A["default"].weight
    assert attachment.pairs[0].b is layer.lora_B["default"].weight
    assert attachment.skipped == {}
    assert repr(attachment) == "Attachment(3 pairs, 0 skipped)"


def test_scaling_is_the_layers_own(net):
    pairs = attach(net("peft", rank=4, alpha=8.0, use_rslora=True)).pairs
    assert all(pair.scaling == 4.0 for pair in pairs)


def test_no_peft_model_is_needed(net):
    class Adapted(nn.Module):  # a layer of somebody else's, of the same shape
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(4, 3).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})
            self.scaling = {"default": 0.5}

        def forward(self, x: Tensor) -> Tensor:
            delta: Tensor = self.lora_B["default"](self.lora_A["default"](x))
            return self.base_layer(x) + 0.5 * delta

    model = nn.Sequential(Adapted())
    attachment = attach(model)
    opt = CTROptimizer(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    assert opt.ranks() == {"0": 2}
    assert counts(attachment) == [1]


def test_own_layers_are_listed(net):
    model = net("own")
    attachment = attach(model)
    assert [pair.name for pair in attachment.pairs] == ["first", "second", "third"]
    attachment.detach()
    assert _C.find_pair(model.first.lora_a) is not None


# ---- what is left out ----


def leave_out(model: nn.Module, reason: str) -> pyctrlora.Attachment:
    with pytest.warns(UserWarning, match=reason):
        attachment = attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attach(model).skipped == attachment.skipped  # named once
    return attachment


def test_dora_is_left_to_adamw(net, batches, train):
    model = net("peft", use_dora=True, target_modules=["first"])
    attachment = leave_out(
        model, r"1 LoRA layers .* 'base_model.model.first' \(DoraLinearVariant\)"
    )
    assert attachment.pairs == []
    with pytest.warns(UserWarning, match="found no LoRA pair"):
        opt = CTROptimizer(model.named_parameters(), fallback_lr=0.02)
    assert "lora_A.default.weight" in opt.describe()
    assert "of LoRA layer 'base_model.model.first' (DoraLinearVariant)" in opt.describe()
    losses = train(model, opt, batches(1) * 15)
    assert losses[-1] < losses[0]


def test_dora_beside_plain_layers_found_by_name_alone(net):
    model = net("peft", use_dora=True, target_modules=["first"])
    with pytest.warns(UserWarning, match="found no LoRA pair"):
        CTROptimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad])


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(2, 2, 3)
        self.embed = nn.Embedding(7, 4)
        self.mha = nn.MultiheadAttention(4, 2)
        self.experts = nn.Module()
        self.experts.bank = nn.Parameter(torch.randn(3, 4, 4))


@pytest.mark.parametrize(
    ("config", "skipped"),
    [
        ({"target_modules": ["linear", "conv"]}, {"conv": "convolution"}),
        ({"target_modules": ["linear", "embed"]}, {"embed": "embedding"}),
        (
            {"target_modules": ["linear", "mha"]},
            dict.fromkeys(
                ["mha", "mha.base_layer.out_proj"],
                "nn.MultiheadAttention merges its adapter before each forward",
            ),
        ),
        (
            {"target_modules": ["linear"], "target_parameters": ["experts.bank"]},
            {"experts": "adapts a bare parameter, whose inputs nobody sees"},
        ),
    ],
)
def test_other_adapters_are_left_out(config, skipped):
    model = peft.get_peft_model(Zoo(), peft.LoraConfig(r=2, **config))
    prefix = "base_model.model."
    attachment = leave_out(model, "are no plain linear pairs and will be trained by AdamW")
    assert attachment.skipped == {prefix + name: reason for name, reason in skipped.items()}
    assert [pair.name for pair in attachment.pairs] == [prefix + "linear"]
    opt = CTROptimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    assert list(opt.ranks()) == [prefix + "linear"]


def test_tied_adapters_are_left_out(net):
    model = net("peft")
    first, second = model.base_model.model.second, model.base_model.model.third
    first.lora_A["default"].weight = nn.Parameter(second.lora_A["default"].weight)  # as PEFT ties
    attachment = leave_out(model, "tied to another layer's adapter")
    assert set(attachment.skipped) == set(NAMES[1:])


def test_half_trained_pairs_are_left_out(net):
    model = net("peft")
    model.base_model.model.first.lora_A["default"].requires_grad_(False)  # LoRA-FA
    attachment = leave_out(model, r"'base_model.model.first' \(lora_B is trained alone\)")
    assert [pair.name for pair in attachment.pairs] == NAMES[1:]
    opt = CTROptimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    assert list(opt.ranks()) == NAMES[1:]


# ---- detaching, copies ----


def test_detach_stops_observing_and_the_optimizer_goes_on(observed, batches, train):
    model, attachment, opt = observed
    data = batches(3)
    train(model, opt, data[:1])
    slots = [_C.find_slot(pair.a) for pair in attachment.pairs]
    attachment.detach()
    attachment.detach()
    train(model, opt, data[1:])
    assert [slot.observations for slot in slots] == [1, 1, 1]
    assert all(_C.find_pair(pair.a) is None for pair in attachment.pairs)
    layer = model.base_model.model.first
    assert not layer._forward_hooks
    assert not layer.base_layer._forward_hooks
    assert opt.metrics()["steps"] == 3


def test_context_manager_detaches_only_what_it_attached(net):
    model = net("peft")
    with attach(model) as outer:
        with attach(model) as inner:
            assert [pair.name for pair in inner.pairs] == NAMES
        assert _C.find_pair(outer.pairs[0].a) is not None
        assert len(model.base_model.model.first._forward_hooks) == 1
    assert _C.find_pair(outer.pairs[0].a) is None


def test_attaching_twice_counts_once(observed, batches):
    model, attachment, _ = observed
    attach(model.base_model)
    (x, _), *_ = batches(1)
    backward(model, x)
    assert counts(attachment) == [1, 1, 1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_model_are_their_own(observed, batches, how):
    model, attachment, _ = observed
    twin = how(model)
    (x, _), *_ = batches(1)
    backward(twin, x)
    assert counts(attachment) == [0, 0, 0]
    second = attach(twin)
    opt = CTROptimizer(twin.parameters())
    backward(twin, x)
    assert (counts(attachment), counts(second)) == ([0, 0, 0], [1, 1, 1])
    opt.step()
    second.detach()
    assert not twin.base_model.model.first._forward_hooks


def test_new_parameters_are_found_by_attaching_again(net):
    model = net("peft")
    attach(model)
    layer = model.base_model.model.first
    config = peft.LoraConfig(r=5, lora_alpha=5)
    layer.update_layer("default", 5, lora_alpha=5, config=config)
    pairs = attach(model).pairs
    assert pairs[0].a is layer.lora_A["default"].weight
    assert CTROptimizer(model.parameters()).ranks()[NAMES[0]] == 5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_compiled_model_trains(observed, batches):
    model, attachment, opt = observed
    compiled = torch.compile(model, backend="eager")
    (x, y), *_ = batches(1)
    losses = []
    for _ in range(3):
        loss = (compiled(x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert counts(attachment) == [3, 3, 3]


def test_trained_adapter_is_saved_and_loaded_by_peft(observed, batches, train, net, tmp_path):
    model, _, opt = observed
    train(model, opt, batches(3))
    model.save_pretrained(tmp_path)
    fresh = net("none")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    (x, _), *_ = batches(1)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda net: net("none"),
            r"expected a model with LoRA layers; got Net, which has none\. Rem",
        ),
        (
            lambda net: net("peft", inference_mode=True),
            r"trainable LoRA layers; got PeftModel, in which all 3 are frozen\. Remedy: model.s",
        ),
    ],
)
def test_models_without_pairs_are_refused(net, build, message):
    with pytest.raises(ValueError, match=message):
        attach(build(net))


def test_unknown_adapter_is_refused(net):
    with pytest.raises(
        ValueError, match="LoRA layers of adapter 'other'; got PeftModel, which has"
    ):
        attach(net("peft"), "other")
