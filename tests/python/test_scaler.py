"""`torch.amp.GradScaler` in a plain loop: the scale is known without being told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pyctrlora import CTROptimizer

TOLD, PLAIN, NONE = "told", "plain", "no scaler"


def run(net: Any, batches: Any, way: str, *, kind: str, overflow: bool = False) -> Any:
    """Eight steps under float16, whose scale doubles every other step."""
    model = net(kind, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=way != NONE)
    settings = {"loss_scale": scaler.get_scale} if way == TOLD else {}
    opt = CTROptimizer.from_model(model, kl_radius=1e-4, **settings)
    seen = []
    for index, (x, y) in enumerate(batches(8, dtype=torch.float32)):
        for bad in (True, False) if overflow and index in (2, 5) else (False,):
            opt.zero_grad()
            scaler.scale((model(x) - y).square().sum(-1).mean()).backward()
            if bad:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
            scaler.step(opt)
            scaler.update()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        seen.append({"metrics": opt.metrics(), "grads": grads})
    return model, opt, scaler, seen


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_nothing_to_tell(net, batches, trained, state, same, kind):
    """Bit for bit as with `loss_scale=scaler.get_scale`, and as without a scaler."""
    runs = {way: run(net, batches, way, kind=kind) for way in (TOLD, PLAIN, NONE)}
    assert runs[PLAIN][2].get_scale() == runs[TOLD][2].get_scale() == 256.0 * 16
    for model, opt, _, seen in runs.values():
        same(trained(model), trained(runs[TOLD][0]))
        same(state(opt), state(runs[TOLD][1]))
        for own, other in zip(seen, runs[TOLD][3], strict=True):
            assert own["metrics"] == other["metrics"]
            assert all(map(torch.equal, own["grads"], other["grads"]))  # left unscaled


def test_overflow_is_skipped_and_forgotten_at_once(net, batches, trained, state, same):
    """Also where the loop calls the model's `zero_grad`, and in the scale's growth."""
    results = [run(net, batches, way, kind="own", overflow=True) for way in (TOLD, PLAIN)]
    assert results[0][2].get_scale() == results[1][2].get_scale()
    same(trained(results[0][0]), trained(results[1][0]))
    same(state(results[0][1]), state(results[1][1]))
    assert results[1][1].metrics()["steps"] == 8
    assert results[1][1].metrics()["skipped"] == 0

    model = net("own", dtype=torch.float32)
    opt = CTROptimizer.from_model(model)
    scaler = torch.amp.GradScaler("cpu")
    (x, y), *_ = batches(1, dtype=torch.float32)
    loss = (model(x) - y).square().sum(-1).mean()
    scaler.scale(loss).backward()
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
    scaler.step(opt)
    model.zero_grad()
    (model(x) - y).square().sum(-1).mean().backward()
    opt.step()  # without the scaler: scale 1, and one backward's rows
    other = net("own", dtype=torch.float32)
    plain = CTROptimizer.from_model(other)
    (other(x) - y).square().sum(-1).mean().backward()
    plain.step()
    same(state(opt), state(plain))
    same(trained(model), trained(other))


@pytest.mark.parametrize("late", [False, True])
def test_with_clipping_the_scale_must_be_told(net, batches, trained, same, late):
    """`unscale_` leaves no trace of the scale on the optimizer: an error before anything moves."""
    results = []
    for enabled in (True, False):
        model = net("own", dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        opt = CTROptimizer.from_model(
            model, **({} if late else {"loss_scale": scaler.get_scale}), kl_radius=1e-4
        )
        if late:
            opt.follow_loss_scale(scaler.get_scale)
        for x, y in batches(4, dtype=torch.float32):
            opt.zero_grad()
            scaler.scale((model(x) - y).square().sum(-1).mean()).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
        results.append(trained(model))
    same(*results)

    model = net("own", dtype=torch.float32)
    opt, scaler = CTROptimizer.from_model(model), torch.amp.GradScaler("cpu")
    (x, y), *_ = batches(1, dtype=torch.float32)
    before = trained(model)
    scaler.scale((model(x) - y).square().sum(-1).mean()).backward()
    scaler.unscale_(opt)
    with pytest.raises(ValueError, match=r"Remedy: CTROptimizer.*loss_scale=scaler\.get_scale"):
        scaler.step(opt)
    same(before, trained(model))
    assert opt.metrics()["steps"] == 0


def test_steps_without_the_scaler_have_scale_one(net, batches, trained, same):
    """A scaler that was used for a while, then not."""
    results = []
    for used in (True, False):
        model = net("own", dtype=torch.float32)
        opt, scaler = CTROptimizer.from_model(model), torch.amp.GradScaler("cpu", enabled=used)
        for index, (x, y) in enumerate(batches(6, dtype=torch.float32)):
            opt.zero_grad()
            loss = (model(x) - y).square().sum(-1).mean()
            if index < 3:
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
            else:
                loss.backward()
                opt.step()
        results.append(trained(model))
    same(*results)
