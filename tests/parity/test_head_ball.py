"""A head that is trained along, its ball and its own step, in the engine and in the reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from parity.problems import F64, ReferenceModel, mlp, randn
from parity.twins import Twins, relative
from reference.ctr_reference import Group, Settings
from reference.head_step import HeadStep
from torch import Tensor, nn

import pyctrlora
from pyctrlora.heads import HeadObserver

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTHS = [6, 8, 8, 7]
STEPS, PEAK, HEAD_LR, TOLERANCE = 14, 0.3, 1e-3, 1e-9


def fresh_head(classes: int = 4) -> nn.Linear:
    head = nn.Linear(WIDTHS[-1], classes, dtype=F64)
    head.weight.data = 0.02 * randn(classes, WIDTHS[-1], seed=3)
    head.bias.data.zero_()
    return head


class HeadTwins:
    """The layers as `Twins`, each side with a head of its own at the same weights."""

    def __init__(self, settings: Settings, **changes: Any) -> None:
        self.twins = Twins(ReferenceModel(mlp(WIDTHS, 2, 0), settings), **changes)
        self.ours, self.theirs = fresh_head(), fresh_head()
        self.observer = HeadObserver(self.ours)
        self.twins.optimizer.add_param_group({"params": list(self.ours.parameters())})
        self.reference = self.twins.reference.reference
        self.head_step = HeadStep(step_at_1=changes.get("head_step", 100.0))
        self.bias = torch.optim.AdamW([self.theirs.bias], lr=HEAD_LR, weight_decay=0.0)
        self.theirs.register_forward_hook(self._observe)

    def _observe(self, _head: nn.Module, args: Any, z: Tensor) -> None:
        z.register_hook(lambda g: self.reference.heads.observe(z, g))
        z.register_hook(lambda g: self.head_step.observe(args[0], g))

    def loss(self, t: int, **kw: Any) -> Callable[[nn.Module], Tensor]:
        x, y = randn(24, WIDTHS[0], seed=100 + t), torch.arange(24) % 4
        y[t % 3 :: 4] = -100

        def of(model: nn.Module) -> Tensor:
            head = self.ours if model is self.twins.model else self.theirs
            scale = kw.get("scale", 1.0)
            loss: Tensor = scale * nn.functional.cross_entropy(head(model(x)), y)
            return loss

        return of

    def step(self, losses: list[Callable[[nn.Module], Tensor]], lr: float) -> None:
        """Both sides."""
        self.theirs.zero_grad()
        self.twins.step(losses, [Group(lr, PEAK), Group(HEAD_LR if lr else 0.0, HEAD_LR)])
        if lr == 0:
            self.head_step.rows = []
            return
        weight = self.theirs.weight
        weight.data = self.head_step.step(weight.detach(), weight.grad, HEAD_LR)
        self.bias.step()

    def check(self) -> None:
        found = [(name, off) for name, off in self.twins.deviations() if off > TOLERANCE]
        assert not found
        assert relative(self.ours.weight, self.theirs.weight) < TOLERANCE
        assert relative(self.ours.bias, self.theirs.bias) < TOLERANCE
        gain = self.twins.optimizer.metrics()["head_gain"]
        assert gain == pytest.approx(self.head_step.gain, rel=TOLERANCE)


@pytest.mark.parametrize("radius", [0.03, 0.003, math.inf])
def test_engine_follows_the_reference_with_a_fresh_head(radius: float) -> None:
    both = HeadTwins(Settings(head_radius=radius, kl_radius=0.01))
    shrinks = []
    for t in range(STEPS):
        both.step([both.loss(t), both.loss(t + 50)], PEAK * (1 - t / STEPS))
        both.check()
        shrinks.append(both.reference.phi / both.reference.kl_phi)
    assert (min(shrinks) < 0.9) == (radius < 1)
    assert radius > 0.003 or max(shrinks) < 1


def test_with_a_spike_and_a_scaled_loss_and_a_step_that_does_nothing() -> None:
    both = HeadTwins(Settings(loss_scale=64.0))
    for t in range(STEPS):
        both.step([both.loss(t, scale=64e6 if t == 6 else 64.0)], 0.0 if t == 3 else PEAK)
        if t != 3:  # metrics are those of the last step that moved
            both.check()
    assert both.observer.slot is not None


def test_the_heads_outputs_change_by_no_more_than_the_radius() -> None:
    """What the ball promises, measured: the loss' first-order change, over its worth."""
    both = HeadTwins(Settings(head_radius=0.05, kl_radius=math.inf, beta1=0.0, factor_beta=0.0))
    model, head = both.twins.model, both.ours
    pairs = [p for own in both.twins.layers for p in (own.lora_a, own.lora_b)]
    for t in range(STEPS):
        x, y = randn(24, WIDTHS[0], seed=100 + t), torch.arange(24) % 4
        y[t % 3 :: 4] = -100
        z = head(model(x))
        z.retain_grad()
        nn.functional.cross_entropy(z, y).backward()
        before = [p.detach().clone() for p in pairs]
        grads = [p.grad.clone() for p in pairs]
        both.twins.optimizer.param_groups[0].update(lr=PEAK)
        both.twins.optimizer.step()
        both.twins.optimizer.zero_grad()
        if t == 0:
            continue  # the gauge is balanced after the first step
        moves = zip(before, pairs, grads, strict=True)
        change = sum(((old - p.detach()) * grad).sum() for old, p, grad in moves)
        seen = z.detach()[y != -100]
        spread = (seen - seen.mean(0)).norm() * (len(seen) / (len(seen) - 1)) ** 0.5
        worth = z.grad.norm() * spread
        assert float(change) <= 0.05 * float(worth) * (1 + 1e-6)
    assert pyctrlora._C.find_head(head.weight) is not None
