"""Tensors that shrink to their active directions in the middle of training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyctrlora
from pyctrlora import CTROptimizer, attach, compact
from pyctrlora.adapters import adapter_layers

RANKS = {"first": 1, "second": 3, "third": 2}


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {layer.path: layer.rank for layer in adapter_layers(model)}


@pytest.fixture
def masked(net: Any, switch_off: Any) -> Any:
    """`masked(kind)`: an attached model with directions off."""

    def build(kind: str, **config: Any) -> Any:
        model = net(kind, rank=4, alpha=8.0, **config)
        if kind == "peft":
            attach(model)
        switch_off(model, RANKS)
        return model

    return build


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_tensors_shrink_and_logits_stay(masked, batches, kind):
    model = masked(kind)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    x = batches(1)[0][0]
    before = model(x).detach()
    got = compact(model)
    assert {name.removeprefix("base_model.model."): r for name, r in got.items()} == RANKS
    assert ranks_of(model) == RANKS
    assert (model(x) - before).abs().max() < 1e-12
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for layer in adapter_layers(model):
        assert layer.a.shape[0] == layer.b.shape[1] == layer.rank == RANKS[layer.path]
        assert layer.scaling == 2.0
        assert layer.a.is_contiguous()
        assert layer.b.is_contiguous()


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_numbers_agree(masked, rslora):
    model = masked("peft", use_rslora=rslora)
    scaling = adapter_layers(model)[0].scaling
    compact(model)
    config = model.peft_config["default"]
    assert config.r == 3
    assert config.rank_pattern == {"^first": 1, "^third": 2}
    for layer in adapter_layers(model):
        inner = layer.layer
        r, alpha = inner.r["default"], inner.lora_alpha["default"]
        assert r == RANKS[layer.path]
        assert inner.scaling["default"] == scaling
        assert alpha / (r**0.5 if rslora else r) == pytest.approx(scaling, rel=1e-15)
        assert config.alpha_pattern.get(f"^{layer.path}", config.lora_alpha) == alpha
        assert inner.lora_A["default"].out_features == inner.lora_B["default"].in_features == r


def test_a_layer_without_active_directions_keeps_one(net, switch_off):
    model = net("own", rank=4)
    switch_off(model, {"first": 0, "second": 4, "third": 4})
    assert compact(model) == {"first": 1, "second": 4, "third": 4}
    assert not model.first.lora_a.any()


@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_state_follows_and_training_goes_on(
    net, batches, train, state, kind, dtype, switch_off
):
    model = net(kind, rank=4, dtype=dtype)
    if kind == "peft":
        attach(model)
    opt = CTROptimizer(model.parameters(), sketch_rank=3)
    data = batches(12, dtype=dtype)
    train(model, opt, data[:6])
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    switch_off(model, RANKS)
    before = state(opt)
    group, steps = opt.param_groups[0]["params"], opt.metrics()["steps"]
    compact(model, opt)
    assert opt.param_groups[0]["params"] is group
    assert opt.metrics()["steps"] == steps
    assert sorted(opt.ranks().values()) == [1, 2, 3]
    after = state(opt)
    # first was layer 0 of the shape (8, 6): its last direction is what is left
    assert torch.equal(after["group0.momentum_a"][0], before["group0.momentum_a"][0, 3:])
    assert torch.equal(after["group0.momentum_b"][0], before["group0.momentum_b"][0, :, 3:])
    assert torch.equal(after["group0.input.basis"], before["group0.input.basis"])
    assert torch.equal(after["group2.rms_square"], before["group2.rms_square"])
    assert int(after["group1.age"]) == 6
    losses = train(model, opt, data[6:])
    scheduler.step()
    assert losses[-1] < 1.5 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert opt.metrics()["skipped"] == opt.metrics()["misses"] == 0


def test_nothing_to_shrink_changes_nothing(net, batches, train, state, trained, same):
    model, twin = net("own"), net("own")
    opt, other = CTROptimizer(model.parameters()), CTROptimizer(twin.parameters())
    data = batches(6)
    train(model, opt, data[:3])
    train(twin, other, data[:3])
    compact(model, opt)
    train(model, opt, data[3:])
    train(twin, other, data[3:])
    same(trained(model), trained(twin))
    same(state(opt), state(other))


def test_groups_heads_and_copies_follow(net, batches, train, switch_off):
    model = net("none")
    pyctrlora.add_lora(model, rank=4, targets=["first", "second"])
    model.third.requires_grad_(True)
    for layer in adapter_layers(model):
        nn.init.normal_(layer.b, std=0.3)
    groups = [
        {"params": list(model.second.parameters()), "lr": 0.05},
        {"params": [p for m in (model.first, model.third) for p in m.parameters()]},
    ]
    opt = CTROptimizer(groups)
    data = batches(8)
    train(model, opt, data[:4])
    switch_off(model, {"first": 2, "second": 3})
    compact(model, opt)
    assert opt.ranks() == {"second": 3, "first": 2}
    twin, copied = copy.deepcopy((model, opt))
    losses = train(model, opt, data[4:])
    assert train(twin, copied, data[4:]) == losses


def test_a_saved_state_fits_a_model_of_these_ranks(net, batches, train, trained, same, switch_off):
    model = net("own", rank=4)
    opt = CTROptimizer(model.parameters())
    data = batches(8)
    train(model, opt, data[:4])
    switch_off(model, RANKS)
    compact(model, opt)
    weights, saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, data[4:])

    again = net("own", rank=8, alpha=12.0)  # the scaling is in no state dict
    assert pyctrlora.prepare_for_resume(again, weights) == RANKS
    again.load_state_dict(weights)
    resumed = CTROptimizer(again.parameters())
    resumed.load_state_dict(saved)
    train(again, resumed, data[4:])
    same(trained(again), trained(model))


def test_refuses_what_holds_the_old_shapes(net):
    model = net("own")
    with pytest.raises(RuntimeError, match=r"compiled by torch.compile \(module ''\)"):
        compact(torch.compile(model, backend="eager"))
    model.second.compile(backend="eager")
    with pytest.raises(RuntimeError, match="module 'second'"):
        compact(model)
    with pytest.raises(ValueError, match="has none"):
        compact(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="trains none of its 3 pairs"):
        compact(net("own"), CTROptimizer(net("own").parameters()))


def test_refuses_ddp(net, tmp_path, switch_off):
    distributed = torch.distributed
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net("own")
        wrapper: Any = nn.parallel.DistributedDataParallel(model)
        for which in (wrapper, model):
            with pytest.raises(RuntimeError, match="outside DistributedDataParallel"):
                compact(which)
        del wrapper, which
        other = net("own")
        switch_off(other, {"first": 2, "second": 2, "third": 2})
        assert set(compact(other).values()) == {2}
    finally:
        distributed.destroy_process_group()


def test_other_layers_keep_their_ranks(net, batches):
    model = net("peft", rank=4, use_dora=True)
    with pytest.warns(UserWarning, match="no plain linear pairs"):
        attach(model)
    x: Tensor = batches(1)[0][0]
    before = model(x).detach()
    assert compact(model) == {}
    assert torch.equal(model(x), before)
