"""Ranks under a budget in training: masks, events, resume."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch

import pyctrlora
from pyctrlora import CTROptimizer, attach
from pyctrlora.adapters import adapter_layers

COST = {"first": 14, "second": 16, "third": 13}
TOTAL = 260
EVENTS = range(13, 230, 8)  # of that many steps


def used(opt: CTROptimizer) -> int:
    return sum(COST[name.rpartition(".")[2]] * rank for name, rank in opt.ranks().items())


@pytest.fixture
def budgeted(net: Any) -> Any:
    """`budgeted(kind)`: a model of rank 4 and an optimizer with half of its parameters."""

    def build(kind: str = "own", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
        model = net(kind, rank=4, dtype=dtype)
        if kind == "peft":
            attach(model)
        settings = {"rank_budget": 0.5, "total_steps": TOTAL, **settings}
        return model, CTROptimizer(model.parameters(), **settings)

    return build


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_that_are_off_stay_off_and_cost_nothing(
    net, batches, train, state, dtype, switch_off
):
    """A masked pair trains as the same pair without those directions."""
    data = batches(30, dtype=dtype)
    runs = []
    for shrink in (False, True):
        model = net("own", rank=4, dtype=dtype)
        switch_off(model, {"first": 2, "second": 3, "third": 1})
        if shrink:
            pyctrlora.compact(model)
        opt = CTROptimizer(model.parameters(), balance_every=7, weight_decay=0.1)
        runs.append((train(model, opt, data), model, opt))
    (masked, model, opt), (small, other, _) = runs
    assert masked == pytest.approx(small, rel=1e-9 if dtype is torch.float64 else 1e-3)
    assert opt.ranks() == {"first": 2, "second": 3, "third": 1}
    assert opt.metrics()["misses"] == opt.metrics()["skipped"] == 0
    assert not (state(opt)["group0.momentum_a"].abs().amax(2) == 0).all()
    for layer, twin in zip(adapter_layers(model), adapter_layers(other), strict=True):
        product, expected = layer.b @ layer.a, twin.b @ twin.a
        tolerance = 1e-8 if dtype is torch.float64 else 1e-2
        assert (product - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("start", ["budget", "full"])
def test_the_budget_holds_after_every_event(budgeted, batches, train, kind, start):
    model, opt = budgeted(kind, rank_start=start)
    budget, allocated = opt.report()["budget"], 4 * sum(COST.values())
    assert budget == allocated // 2
    seen = []
    for step, batch in enumerate(batches(240), start=1):
        before = used(opt)
        train(model, opt, [batch])
        after = used(opt)
        if after != before:
            seen.append(step)
        if start == "budget" or step >= EVENTS[len(EVENTS) // 4]:
            assert after <= budget
        for layer in adapter_layers(model):
            on = layer.active()
            assert not layer.a[~on].any()
            assert not layer.b[:, ~on].any()
            assert on.any()
    report = opt.report()
    assert report["history"]["steps"] == [1, *EVENTS]
    assert report["parameters"] == used(opt) == report["history"]["parameters"][-1]
    assert set(seen) <= {1, *EVENTS}
    if start == "full":
        count = len(EVENTS)
        allowed = [allocated] + [
            budget + (allocated - budget) * max(0, count - 4 * i) ** 3 // count**3
            for i in range(1, count + 1)
        ]
        assert all(u <= a for u, a in zip(report["history"]["parameters"], allowed, strict=True))
        assert report["history"]["parameters"][0] == allocated
        assert len(seen) >= 3
    json.dumps(report, allow_nan=False)
    assert opt.metrics()["misses"] == 0


def test_events_are_logged_and_add_up(budgeted, batches, train):
    model, opt = budgeted()
    train(model, opt, batches(170))
    report = opt.report()
    assert report["events"]
    ranks = dict.fromkeys(COST, 4)
    for event in report["events"]:
        assert ranks[event["layer"]] == event["from"]
        ranks[event["layer"]] = event["to"]
    assert ranks == opt.ranks() == report["ranks"]


@pytest.mark.parametrize("seed", range(4))
def test_growth_leaves_the_function_and_finds_what_is_missing(
    net, batches, train, products, seed, switch_off
):
    """A layer that is kept down to rank 1 gets its directions when the budget allows."""
    model = net("own", rank=4, seed=seed)
    switch_off(model, {"first": 1, "second": 1, "third": 1})
    opt = CTROptimizer(model.parameters(), rank_budget=1.0, total_steps=100)  # the first event at 5
    data = batches(60)
    train(model, opt, data[:4])
    assert set(opt.ranks().values()) == {1}
    before = products(opt)
    opt.param_groups[0]["lr"] = 1e-12
    train(model, opt, data[4:5])
    after = products(opt)
    assert max(opt.ranks().values()) == 2
    for name in before:  # the step itself was next to nothing
        assert (after[name] - before[name]).abs().max() < 1e-9
    grown = [layer for layer in adapter_layers(model) if layer.active().sum() == 2]
    for layer in grown:
        new = (layer.b.abs().amax(0) == 0) & layer.active()
        assert int(new.sum()) == 1
        sizes = layer.a[layer.active()].norm(dim=1)
        assert sizes.min() > 1e-3 * sizes.max()
    opt.param_groups[0]["lr"] = 0.1
    train(model, opt, data[5:])
    for layer in grown:
        assert (layer.b.abs().amax(0) > 0).sum() >= 2


@pytest.mark.parametrize("at", [5, 13, 40, 60, 61])
def test_resume_through_an_event_is_bit_equal(budgeted, batches, train, trained, state, same, at):
    data = batches(70)
    model, opt = budgeted()
    train(model, opt, data[:at])
    weights, saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, data[at:])
    again, resumed = budgeted()
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert resumed.ranks() == {
        name: int(layer.active().sum())
        for name, layer in ((la.name, la) for la in adapter_layers(again))
    }
    train(again, resumed, data[at:])
    same(trained(again), trained(model))
    same(state(resumed), state(opt))
    assert resumed.report()["events"] == opt.report()["events"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_the_schedule(budgeted, batches, train, trained, same, how):
    model, opt = budgeted()
    data = batches(70)
    train(model, opt, data[:20])
    twin, copied = how((model, opt))
    train(model, opt, data[20:])
    train(twin, copied, data[20:])
    same(trained(twin), trained(model))
    assert copied.report()["events"] == opt.report()["events"]


def test_compact_in_the_middle_of_a_schedule(budgeted, batches, train):
    model, opt = budgeted()
    data = batches(120)
    train(model, opt, data[:30])
    ranks = opt.ranks()
    assert pyctrlora.compact(model, opt) == ranks
    train(model, opt, data[30:])
    assert used(opt) <= opt.report()["budget"]
    assert opt.metrics()["misses"] == 0


def test_one_shot_allocation(budgeted, batches, train):
    model, opt = budgeted()
    opt.allocate_ranks({"first": [9, 8, 7, 6], "second": [1], "third": [5, 0.1]})
    train(model, opt, batches(1))
    assert opt.ranks() == {"first": 4, "second": 1, "third": 1}
    train(model, opt, batches(EVENTS[0]))  # nothing to come down from
    assert opt.report()["history"]["steps"] == [1, EVENTS[0]]
    assert used(opt) <= opt.report()["budget"]
    with pytest.raises(ValueError, match="before the first step"):
        opt.allocate_ranks({})
    with pytest.raises(ValueError, match="missing:\n  first"):
        budgeted()[1].allocate_ranks({"second": [1], "third": [1]})
    with pytest.raises(ValueError, match="a budget"):
        CTROptimizer(model.parameters()).allocate_ranks({})


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"rank_budget": 0.1}, ValueError, "rank 1 in each of 3 layers takes 43"),
        ({"rank_budget": 173}, ValueError, "only 172 are allocated"),
        ({"rank_budget": 1.5}, ValueError, "rank_budget = 1.5"),
        ({"rank_budget": True}, TypeError, "expected rank_budget as a float"),
        ({"rank_budget": "half"}, TypeError, "got 'half' of type str"),
        ({"total_steps": None}, ValueError, "expected total_steps with rank_budget"),
        ({"total_steps": 0}, ValueError, "total_steps = 0"),
        ({"total_steps": 1.0}, TypeError, "total_steps as an int"),
        ({"rank_start": "half"}, ValueError, "rank_start = 'half'"),
        ({"min_rank": -1}, ValueError, "min_rank = -1"),
        ({"min_rank": 0.1}, TypeError, "expected min_rank as an int; got 0.1 of type float"),
        ({"total_steps": 1, "rank_start": "full"}, ValueError, "never reaches its budget"),
    ],
)
def test_errors_say_what_is_wrong(budgeted, settings, error, text):
    with pytest.raises(error, match=text):
        budgeted(**settings)


def test_a_budget_in_parameters_and_none(budgeted, batches, train):
    model, opt = budgeted(rank_budget=100, rank_start="budget")
    train(model, opt, batches(1))
    assert 100 - 14 < used(opt) <= 100
    model, opt = budgeted(rank_budget=None, total_steps=None)
    train(model, opt, batches(1))
    assert used(opt) == 172
    assert opt.report()["budget"] is None
