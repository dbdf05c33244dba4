"""The ratio test: `step(closure)` and `step(loss=...)` with `ratio_every`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyctrlora import CTROptimizer


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(-1).mean()


def closure_of(model: nn.Module, opt: Any, x: Tensor, y: Tensor, calls: list[int]) -> Any:
    def closure() -> Tensor:
        calls.append(1)
        opt.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    return closure


def test_a_closure_runs_twice_on_checked_steps_only(net, batches):
    model = net("own")
    opt = CTROptimizer.from_model(model, ratio_every=3)
    counts = []
    for x, y in batches(7):
        calls: list[int] = []
        opt.step(closure_of(model, opt, x, y, calls))
        counts.append(len(calls))
    assert counts == [1, 1, 2, 1, 1, 2, 1]
    metrics = opt.metrics()
    assert metrics["ratio"] == metrics["ratio"]  # not NaN
    assert 1 / 64 <= metrics["radius_factor"] <= 4


def test_off_by_default(net, batches, train):
    model = net("own")
    opt = CTROptimizer.from_model(model)
    train(model, opt, batches(3))
    assert not {"ratio", "radius_factor", "rejected"} & set(opt.metrics())
    x, y = batches(1)[0]
    calls: list[int] = []
    opt.step(closure_of(model, opt, x, y, calls), loss=lambda: calls.append(1))
    assert len(calls) == 1


@pytest.mark.parametrize("way", ["closure", "loss", "both"])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_a_check_changes_nothing_but_the_radius(net, batches, trained, same, state, kind, way):
    """Gradients, random numbers, observations and the step itself are as without a check."""
    results = []
    for every in (0, 2):
        model = net(kind)
        opt = CTROptimizer.from_model(model, ratio_every=every, lr=1e-4)
        torch.manual_seed(5)
        noise = []
        for x, y in batches(2):
            calls: list[int] = []
            closure = closure_of(model, opt, x, y, calls)

            def dropped(model: Any = model, x: Tensor = x, y: Tensor = y) -> Tensor:
                return loss_of(model, nn.functional.dropout(x, 0.5), y)

            if way == "loss":
                closure()
            opt.step(None if way == "loss" else closure, loss=None if way == "closure" else dropped)
            noise.append(torch.rand(3))
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        tensors = state(opt)
        tensors.pop("radius")
        results.append((trained(model), grads, dict(enumerate(noise)), tensors))
    for plain, checked in zip(*results, strict=True):
        same(plain, checked)


def test_random_numbers_of_both_evaluations_agree(net, batches):
    model = net("own")
    opt = CTROptimizer.from_model(model, ratio_every=1)
    x, y = batches(1)[0]
    seen: list[Tensor] = []

    def closure() -> Tensor:
        opt.zero_grad()
        seen.append(torch.rand(4))
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    opt.step(closure)
    opt.step(loss=lambda: (seen.append(torch.rand(4)), loss_of(model, x, y))[1])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])


def test_a_step_that_raises_the_loss_is_taken_back_bit_for_bit(net, batches, trained, same, state):
    model = net("own")
    opt = CTROptimizer.from_model(model, ratio_every=1, lr=100.0, kl_radius=1e6)
    x, y = batches(1)[0]
    opt.param_groups[0]["lr"] = 1e-3
    loss_of(model, x, y).backward()
    opt.step()
    opt.param_groups[0]["lr"] = 100.0
    opt.zero_grad()
    loss = loss_of(model, x, y)
    loss.backward()
    parameters, before = trained(model), state(opt)
    opt.step(loss=lambda: loss_of(model, x, y))
    after = state(opt)
    assert opt.metrics()["rejected"] == 1
    assert opt.metrics()["radius_factor"] == 0.5
    before.pop("radius"), after.pop("radius")
    same(trained(model), parameters)
    same(after, before)
    for _ in range(12):  # smaller and smaller until it helps
        opt.zero_grad()
        loss_of(model, x, y).backward()
        opt.step(loss=lambda: loss_of(model, x, y))
    assert loss_of(model, x, y) < loss


def test_resume_is_bit_for_bit(net, batches, trained, same):
    def go(model: nn.Module, opt: Any, data: Any) -> None:
        for x, y in data:
            opt.step(closure_of(model, opt, x, y, []))

    data = batches(9)
    model = net("own")
    opt = CTROptimizer.from_model(model, ratio_every=2, lr=0.5)
    go(model, opt, data[:5])
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    go(model, opt, data[5:])
    other = net("own", seed=3)
    other.load_state_dict(weights)
    again = CTROptimizer.from_model(other, ratio_every=2, lr=0.5)
    again.load_state_dict(saved)
    assert again.metrics()["radius_factor"] == saved["ctrlora"]["tensors"]["radius"][0]
    go(other, again, data[5:])
    same(trained(other), trained(model))
    assert again.metrics()["ratio"] == opt.metrics()["ratio"]


def test_a_value_in_place_of_a_function_is_refused(net, batches):
    model = net("own")
    opt = CTROptimizer.from_model(model, ratio_every=1)
    x, y = batches(1)[0]
    loss = loss_of(model, x, y)
    loss.backward()
    with pytest.raises(TypeError, match="expected loss as a function"):
        opt.step(loss=loss)
