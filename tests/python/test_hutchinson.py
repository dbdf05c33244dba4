"""Hutchinson's traces through the closure, and the choice of the curvature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyctrlora import CTROptimizer


def closure_of(model: nn.Module, opt: Any, x: Tensor, y: Tensor, calls: list[int]) -> Any:
    def closure() -> Tensor:
        calls.append(1)
        opt.zero_grad()
        loss = (model(x) - y).square().sum(-1).mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_probes_leave_no_trace_but_their_own(net, batches, trained, same, state, kind):
    results = []
    for every in (0, 2):
        model = net(kind)
        opt = CTROptimizer.from_model(model, hutchinson_every=every)
        counts, noise = [], []
        for x, y in batches(4):
            calls: list[int] = []
            opt.step(closure_of(model, opt, x, y, calls))
            counts.append(len(calls))
            noise.append(torch.rand(3))
        assert counts == ([1] * 4 if every == 0 else [3, 1, 3, 1])
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        tensors = {k: v for k, v in state(opt).items() if ".trace_" not in k}
        results.append((trained(model), grads, dict(enumerate(noise)), tensors))
        values = [row["hutchinson"] for row in opt.report()["curvature"].values()]
        assert all((value is None) == (every == 0) for value in values)
    for plain, probed in zip(*results, strict=True):
        same(plain, probed)


def test_traces_agree_with_a_dense_hessian(net, batches):
    model = net("own")
    opt = CTROptimizer.from_model(model, hutchinson_every=1, lr=1e-12)
    x, y = batches(1)[0]
    for _ in range(150):
        opt.step(closure_of(model, opt, x, y, []))
    pairs = {pair.name: pair for _, pair in opt._roster.all_pairs()}
    for name, row in opt.report()["curvature"].items():
        pair = pairs[name]
        trace = 0.0
        for p in (pair.a, pair.b):
            flat = p.detach().view(-1)
            for i in range(flat.numel()):
                slopes = []
                for h in (1e-5, -1e-5):
                    flat[i] += h
                    (g,) = torch.autograd.grad((model(x) - y).square().sum(-1).mean(), p)
                    slopes.append(g.view(-1)[i].item())
                    flat[i] -= h
                trace += (slopes[0] - slopes[1]) / 2e-5
        unit = pair.b.shape[0] * pair.a.square().sum() + pair.a.shape[1] * pair.b.square().sum()
        assert row["hutchinson"] == pytest.approx(trace / (pair.scaling**2 * unit.item()), rel=0.3)


@pytest.mark.parametrize("curvature", ["gradient", "hutchinson"])
def test_other_curvatures_train(net, batches, curvature):
    model = net("own")
    opt = CTROptimizer.from_model(model, curvature=curvature, hutchinson_every=3)
    x, y = batches(1)[0]
    losses = [float(opt.step(closure_of(model, opt, x, y, [])).detach()) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_hutchinson_needs_probes(net):
    with pytest.raises(ValueError, match="expected hutchinson_every > 0"):
        CTROptimizer.from_model(net("own"), curvature="hutchinson")
