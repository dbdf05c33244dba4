"""The contract of torch.optim as training loops use it: schedulers, scaling, clipping, loading."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from pyctrlora import CTROptimizer, add_lora

if TYPE_CHECKING:
    from collections.abc import Callable


def mixed(net: Any, **config: Any) -> Any:
    """A Net of which the last layer is trained as it is."""
    model = net("none", **config)
    add_lora(model, rank=3, targets=["first", "second"])
    for module in (model.first, model.second):
        nn.init.normal_(module.lora_b, std=0.3)
    model.third.requires_grad_(True)
    return model


def optimizer(model: nn.Module, **settings: Any) -> CTROptimizer:
    return CTROptimizer([p for p in model.parameters() if p.requires_grad], **settings)


# ---- schedulers ----

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, [1e-2, 1e-4], [0.1, 1e-3], 3, cycle_momentum=False
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 1e-3], total_steps=8, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "SWALR": lambda o: SWALR(o, [0.05, 5e-4], anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_listed():
    bases = {"LRScheduler", "_LRScheduler"}
    there = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert there - bases == set(SCHEDULERS) - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_sets_both_groups_as_in_torch(net, batches, name):
    model = mixed(net)
    opt = optimizer(model, lr=0.1)
    twin = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": g["lr"]}
                            for g in opt.param_groups])  # fmt: skip
    schedules = [SCHEDULERS[name](o) for o in (opt, twin)]
    (x, y), *_ = batches(1)
    for _ in range(7):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        for o, schedule in zip((opt, twin), schedules, strict=True):
            o.step()
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        ours, theirs = ([float(g["lr"]) for g in o.param_groups] for o in (opt, twin))
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert opt.metrics()["misses"] == 0


def test_scheduler_state_resumes(net, batches, train, trained, same):
    data = batches(8)
    results = []
    for interrupted in (False, True):
        model = mixed(net)
        opt = optimizer(model)
        schedule = lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=8)
        for batch in data:
            if interrupted and opt.metrics()["steps"] == 3:
                saved = copy.deepcopy([o.state_dict() for o in (model, opt, schedule)])
                model = mixed(net)
                opt = optimizer(model)
                schedule = lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=8)
                for o, state in zip((model, opt, schedule), saved, strict=True):
                    o.load_state_dict(state)
            train(model, opt, [batch])
            schedule.step()
        results.append(trained(model))
    same(*results)


def test_cycling_momentum_is_refused_by_torch_with_the_way_out(net):
    with pytest.raises(ValueError, match="must support momentum or beta1 with `cycle_momentum`"):
        lr_scheduler.OneCycleLR(optimizer(mixed(net)), 0.1, total_steps=8)


# ---- numbers on the way from the loss to the step ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_autocast_trains_with_float32_statistics(net, batches, state, kind, dtype):
    model = net(kind, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=dtype is torch.float16)
    opt = CTROptimizer.from_model(model, loss_scale=scaler.get_scale)
    losses = []
    for x, y in batches(1, dtype=torch.float32) * 15:
        opt.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
        assert out.dtype is dtype
        loss = (out.float() - y).square().sum(-1).mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    wide = {name: t for name, t in state(opt).items() if t.is_floating_point()}
    assert {t.dtype for t in wide.values()} == {torch.float32, torch.float64}
    assert all(t.isfinite().all() for t in wide.values())


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("settings", [{}, {"rank_budget": 0.5, "total_steps": 260}])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(
    net, batches, state, same, kind, settings, told
):
    results = []
    for overflow in (False, True):
        model = net(kind, dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        if told:
            settings = {**settings, "loss_scale": scaler.get_scale}
        opt = CTROptimizer.from_model(model, **settings)
        for index, (x, y) in enumerate(batches(11, dtype=torch.float32)):
            for bad in (True, False) if overflow and index in (3, 9) else (False,):
                opt.zero_grad()
                loss = (model(x) - y).square().sum(-1).mean()
                scaler.scale(loss).backward()
                if bad:
                    next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
                scaler.step(opt)
                scaler.update()
        assert scaler.get_scale() == (16.0 if overflow else 64.0)
        results.append(state(opt))
    same(*results)  # powers of two: bit for bit


def test_the_step_takes_gradients_as_it_finds_them(net, batches, train, products, same):
    """Clipping comes between backward and step: its weights enter the momentum, its scale does not
    matter."""

    def scaled(model: Any, factors: list[float]) -> Callable[[], None]:
        left = iter(factors)
        params = [p for p in model.parameters() if p.requires_grad]

        def change() -> None:
            torch._foreach_mul_([p.grad for p in params], next(left))

        return change

    results = []
    for factors in ([1.0] * 6, [0.125] * 6, [1.0, 1.0, 0.01, 1.0, 1.0, 1.0]):
        model = net("own")
        opt = optimizer(model)
        train(model, opt, batches(6), scaled(model, factors))
        results.append(products(opt))
    same(results[1], results[0], rtol=1e-9)
    with pytest.raises(AssertionError):
        same(results[2], results[0], rtol=1e-3)


def test_clip_grad_norm_trains(net, batches, train):
    model = mixed(net)
    opt = optimizer(model)
    params = [p for p in model.parameters() if p.requires_grad]
    losses = train(model, opt, batches(1) * 20, lambda: nn.utils.clip_grad_norm_(params, 1e-3))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_either_way(net, batches, trained, same, set_to_none):
    results = []
    for way in (True, set_to_none):
        model = mixed(net)
        opt = optimizer(model)
        for x, y in batches(5):
            opt.zero_grad(set_to_none=way)
            (model(x) - y).square().mean().backward()
            opt.step()
        opt.zero_grad(set_to_none=way)
        assert all((p.grad is None) == way for g in opt.param_groups for p in g["params"])
        results.append(trained(model))
    same(*results)


def test_a_backward_that_leads_to_no_step_leaves_nothing_behind(net, batches, train, state, same):
    results = []
    for spike in (False, True):
        model = net("own")
        opt = optimizer(model)
        for index, (x, y) in enumerate(batches(5)):
            if spike and index == 2:
                (model(3 * x) - y).square().mean().backward()  # the loop thinks better of it
                opt.zero_grad()
            train(model, opt, [(x, y)])
        results.append(state(opt))
    same(*results)


# ---- state ----


def test_statistics_are_never_cast_to_the_parameters_dtype(net, batches, train, state, same):
    model = net("own", dtype=torch.bfloat16).to(torch.bfloat16)
    opt = optimizer(model)
    train(model, opt, batches(4, dtype=torch.bfloat16))
    before = state(opt)
    statistics = [t for name, t in before.items() if "input." in name or "output." in name]
    assert {t.dtype for t in statistics if t.is_floating_point()} == {torch.float32, torch.float64}
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    same(state(opt), before)
    assert {n: t.dtype for n, t in state(opt).items()} == {n: t.dtype for n, t in before.items()}


def test_state_follows_the_parameters_dtype_and_device(net, batches, train, state):
    """Only CPU here: what a device move does, a dtype move does by the same code."""
    model = net("own", dtype=torch.float32)
    opt = optimizer(model)
    train(model, opt, batches(2, dtype=torch.float32))
    assert state(opt)["group0.momentum_a"].dtype is torch.float32
    model.double()
    train(model, opt, batches(2))
    after = state(opt)
    assert after["group0.momentum_a"].dtype is torch.float64
    assert {t.device for t in after.values()} == {torch.device("cpu")}


def test_named_and_unnamed_states_load_into_each_other(net, batches, train, trained, same):
    data = batches(6)
    results = []
    for names in ((False, False), (True, False), (False, True), (True, True)):
        model = mixed(net)

        def build(named: bool, model: Any = model) -> CTROptimizer:
            return CTROptimizer([(n, p) if named else p for n, p in model.named_parameters()])

        first = build(names[0])
        train(model, first, data[:3])
        second = build(names[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(model, second, data[3:])
        assert ("param_names" in second.param_groups[0]) == any(names)  # as in torch
        results.append(trained(model))
    for result in results[1:]:
        same(result, results[0])
