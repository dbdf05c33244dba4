"""`master_weights`: steps on float32 copies of 16-bit adapters, rounded into them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import pyctrlora
from pyctrlora import CTROptimizer

NARROW = (torch.bfloat16, torch.float16)


def build(net: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, CTROptimizer]:
    model = net("own", dtype=dtype).to(dtype)
    return model, CTROptimizer(model.parameters(), master_weights=True, **options)


def masters(seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in seen.items() if ".master_" in name}


def assert_rounded(model: Any, seen: dict[str, torch.Tensor]) -> None:
    """Each parameter is its master, rounded; layers of one shape stand in one slab."""
    slabs: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for layer in (model.first, model.second, model.third):
        a, b = layer.lora_a.detach(), layer.lora_b.detach()
        slabs.setdefault((*a.shape, *b.shape), []).append((a, b))
    found = 0
    for name, own_a in masters(seen).items():
        if name.endswith("_a"):
            own_b = seen[f"{name[:-1]}b"]
            pairs = slabs[(*own_a.shape[1:], *own_b.shape[1:])]
            for own, params in zip((own_a, own_b), zip(*pairs, strict=True), strict=True):
                assert own.dtype is torch.float32
                assert torch.equal(own.to(params[0].dtype), torch.stack(params)), name
            found += len(own_a)
    assert found == 3


@pytest.mark.parametrize("dtype", NARROW)
def test_small_steps_add_up(net, batches, train, products, dtype):
    """At a learning rate whose steps are lost in the parameters' last bit, as in float32."""
    data = batches(1, dtype=torch.float32) * 150
    narrow = [(x.to(dtype), y.to(dtype)) for x, y in data]
    moved = {}
    for name, kind, steps in (
        ("float32", torch.float32, data),
        ("masters", dtype, narrow),
        ("none", dtype, narrow),
    ):
        model = net("own", dtype=dtype).to(dtype).to(kind)
        opt = CTROptimizer(model.parameters(), lr=6e-4, master_weights=name == "masters")
        before = products(opt)
        train(model, opt, steps)
        after = products(opt)
        moved[name] = torch.cat([(after[n] - before[n]).flatten().float() for n in sorted(before)])

    def distance(name: str) -> float:
        return float((moved[name] - moved["float32"]).norm() / moved["float32"].norm())

    assert distance("masters") < 0.15 * distance("none")
    assert distance("masters") < 0.1


@pytest.mark.parametrize("dtype", NARROW)
def test_parameters_are_their_masters_rounded(net, batches, train, state, dtype):
    model, opt = build(net, dtype, lr=0.05, balance_every=3, rank_budget=0.7, total_steps=60)
    for batch in batches(30, dtype=dtype):  # balancing, ranks that change
        train(model, opt, [batch])
        assert_rounded(model, state(opt))
    assert opt.metrics()["skipped"] == opt.metrics()["misses"] == 0


def test_a_write_from_outside_is_taken(net, batches, train, state):
    model, opt = build(net, torch.bfloat16, lr=0.05)
    data = batches(4, dtype=torch.bfloat16)
    train(model, opt, data[:3])
    with torch.no_grad():
        model.first.lora_a.mul_(0.5)
        model.first.lora_b[0, 0] = 3.0
    written = model.first.lora_b.detach().clone()
    opt.param_groups[0]["lr"] = 1e-12  # nothing but what was written
    train(model, opt, data[3:])
    assert torch.equal(model.first.lora_b, written)
    assert_rounded(model, state(opt))


def test_resumes_bit_for_bit(net, batches, train, trained, state, same):
    data = batches(8, dtype=torch.bfloat16)
    model, opt = build(net, torch.bfloat16, lr=1e-3)
    train(model, opt, data[:4])
    weights, saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, data[4:])
    again, resumed = build(net, torch.bfloat16, lr=1e-3)
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    train(again, resumed, data[4:])
    same(trained(again), trained(model))
    same(state(resumed), state(opt))
    assert masters(state(resumed))
    plain = CTROptimizer(net("own", dtype=torch.bfloat16).to(torch.bfloat16).parameters())
    with pytest.raises(ValueError, match=r"unexpected group0\.master_a"):
        plain.load_state_dict(saved)


def test_a_rejected_step_is_taken_back_to_the_last_bit(net, batches, train, state, same):
    model, opt = build(net, torch.bfloat16, lr=0.05, ratio_every=1)
    train(model, opt, [])
    losses = iter([1.0, 9.0])
    x, y = batches(1, dtype=torch.bfloat16)[0]

    def closure() -> torch.Tensor:
        loss = (model(x) - y).square().sum(-1).mean()
        if torch.is_grad_enabled():
            opt.zero_grad()
            loss.backward()
        return loss.detach() * 0 + next(losses)

    before = masters(state(opt))
    opt.step(closure)
    assert opt.metrics()["rejected"] == 1
    same(masters(state(opt)), before)
    assert_rounded(model, state(opt))


def test_compact_keeps_them(net, batches, train, state):
    model, opt = build(net, torch.bfloat16, lr=0.05, rank_budget=0.6, total_steps=40)
    train(model, opt, batches(40, dtype=torch.bfloat16))
    before = {tuple(t.shape): t for t in masters(state(opt)).values()}
    pyctrlora.compact(model, opt)
    assert_rounded(model, state(opt))
    after = masters(state(opt))
    assert sum(t.numel() for t in after.values()) < sum(t.numel() for t in before.values())
    # Not the rounded parameters widened: the bits below are there.
    assert any(not torch.equal(t, t.to(torch.bfloat16).float()) for t in after.values())
    train(model, opt, batches(2, dtype=torch.bfloat16))
    assert_rounded(model, state(opt))


def test_wider_parameters_have_none(net, state):
    opt = CTROptimizer(net("own", dtype=torch.float32).parameters(), master_weights=True)
    assert not masters(state(opt))
