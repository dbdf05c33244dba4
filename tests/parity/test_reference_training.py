"""What training with the reference must and must not depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from parity.problems import F64, ReferenceModel, mlp, randn
from reference.ctr_reference import Group, Settings, commit, inner
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

close = torch.testing.assert_close


def batch_loss(
    seed: int, rows: int = 24, reduction: str = "mean", scale: float = 1.0
) -> Callable[[nn.Module], Tensor]:
    """Cross entropy on labels from a fixed teacher: something to learn."""
    x = randn(rows, 6, seed=1000 + seed)
    y = (x @ randn(6, 4, seed=7)).argmax(1)
    return lambda model: scale * nn.functional.cross_entropy(model(x), y, reduction=reduction)


def train(o: Settings, steps: int, **kw: object) -> ReferenceModel:
    """Trains the small network with linear decay."""
    model = ReferenceModel(mlp([6, 8, 8, 4], 2, 0, zero_b=True), o)
    for t in range(steps):
        model.step([batch_loss(t, **kw)], [Group(0.1 * (1 - t / steps), 0.1)])
    return model


@pytest.mark.parametrize("step_length", ["rms", "radius"])
def test_training_lowers_the_loss_and_keeps_both_balls(step_length: str) -> None:
    o, lr, steps = Settings(step_length=step_length), 0.1, 60
    model = ReferenceModel(mlp([6, 8, 8, 4], 2, 0, zero_b=True), o)
    losses = []
    for t in range(steps):
        before = [i.scaling * i.b @ i.a for i in model.reference.layers]
        schedule = 1 - t / steps
        losses.append(model.step([batch_loss(t)], [Group(lr * schedule, lr)]))
        kl = 0.0
        for pair, old in zip(model.reference.layers, before, strict=True):
            d = pair.scaling * pair.b @ pair.a - old
            (omega, big_s), eye = pair.factors(None), torch.eye(len(d), dtype=F64)
            radius = lr * schedule * float(pair.base_square.value) ** 0.5
            assert inner(d, d, eye, omega) ** 0.5 <= radius * (1 + 1e-9)
            kl += 0.5 * inner(d, d, big_s, omega)
        assert kl <= o.kl_radius * schedule**2 * (1 + 1e-9)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def product(model: ReferenceModel) -> Tensor:
    return torch.cat([(i.scaling * i.b @ i.a).flatten() for i in model.reference.layers])


def test_sum_mean_and_scaled_losses_take_the_same_steps() -> None:
    expected = product(train(Settings(), 8))
    assert expected.norm() > 0.1
    summed = train(Settings(loss_reduction="sum"), 8, reduction="sum")
    fixed = train(Settings(loss_terms=24), 8)
    scaled = train(Settings(loss_scale=1024.0), 8, scale=1024.0)
    for other in summed, fixed, scaled:
        close(product(other), expected, rtol=1e-9, atol=1e-10)


def test_accumulation_equals_the_big_batch() -> None:
    x, y = randn(24, 6, seed=0), torch.arange(24) % 4
    big, small = (ReferenceModel(mlp([6, 8, 4], 2, 0), Settings()) for _ in range(2))

    def part(rows: slice) -> Callable[[nn.Module], Tensor]:
        return lambda model: (
            nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum") / 24
        )

    for _ in range(6):
        big.step([part(slice(None))], [Group(0.1, 0.1)])
        small.step([part(slice(0, 6)), part(slice(6, 24))], [Group(0.1, 0.1)])
    close(product(small), product(big), rtol=1e-10, atol=1e-11)


def test_ignored_rows_count_for_nothing() -> None:
    x, y = randn(24, 6, seed=0), torch.arange(24) % 4
    padded_x, padded_y = (
        torch.cat([x, 100 * randn(8, 6, seed=1)]),
        torch.cat([y, torch.full((8,), -100)]),
    )
    plain, padded = (ReferenceModel(mlp([6, 8, 4], 2, 0), Settings()) for _ in range(2))
    for _ in range(4):
        plain.step([lambda model: nn.functional.cross_entropy(model(x), y)], [Group(0.1, 0.1)])
        padded.step(
            [lambda model: nn.functional.cross_entropy(model(padded_x), padded_y)],
            [Group(0.1, 0.1)],
        )
    close(product(padded), product(plain), rtol=1e-10, atol=1e-11)


def test_a_step_with_lr_zero_leaves_no_trace() -> None:
    model = train(Settings(), 2)
    state = repr(model.reference.layers)
    model.step([batch_loss(2)], [Group(0.0, 0.1)])
    assert repr(model.reference.layers) == state


def test_a_non_finite_gradient_sits_out_alone() -> None:
    model = train(Settings(), 2)
    pairs = model.reference.layers
    before, grads = product(model), [(i.a.grad, i.b.grad) for i in model.linears]
    grads[0] = torch.full_like(grads[0][0], torch.nan), grads[0][1]
    momentum = pairs[0].momentum_a.clone()
    model.reference.step(grads, [Group(0.1, 0.1)])
    first = len(pairs[0].b) * pairs[0].a.shape[1]
    assert torch.equal(product(model)[:first], before[:first])
    assert torch.equal(pairs[0].momentum_a, momentum)
    assert not torch.equal(product(model)[first:], before[first:])


def test_gradient_proxy_trains_without_observations() -> None:
    model = ReferenceModel(mlp([6, 8, 8, 4], 2, 0, zero_b=True), Settings(), observed=False)
    losses = [model.step([batch_loss(t)], [Group(0.1 * (1 - t / 40), 0.1)]) for t in range(40)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_first_true_observation_starts_the_averages_anew() -> None:
    model = ReferenceModel(mlp([6, 8, 4], 2, 0), Settings(), observed=False)
    model.step([batch_loss(0)], [Group(0.1, 0.1)])
    pair = model.reference.layers[0]
    assert pair.proxied
    close(pair.input_factor.value.trace().item(), 6.0)
    model.reference.observe(pair, randn(20, 6, seed=1), randn(20, 8, seed=2), None)
    commit(pair, Settings())
    assert not pair.proxied
    close(pair.input_factor.value, randn(20, 6, seed=1).T @ randn(20, 6, seed=1) / 20)


def test_the_base_outputs_mean_square_sets_the_output_radius() -> None:
    model = train(Settings(), 1)
    linear, x = model.linears[0], randn(24, 6, seed=1000)
    base = nn.functional.linear(x, linear.weight, linear.bias)
    close(linear.layer.base_square.value, base.square().sum(1).mean())


def test_maximize_climbs_what_minimising_the_negated_loss_descends() -> None:
    down = train(Settings(), 4, scale=-1.0)
    up = train(Settings(maximize=True), 4)
    close(product(up), product(down), rtol=1e-10, atol=1e-11)
    assert float((product(up) - product(train(Settings(), 4))).norm()) > 0.1


def test_weight_decay_shrinks_both_factors_beside_the_step() -> None:
    plain, decayed = (ReferenceModel(mlp([6, 8, 4], 2, 0), Settings()) for _ in range(2))
    before = [(i.a.clone(), i.b.clone()) for i in plain.reference.layers]
    for model, decay in (plain, 0.0), (decayed, 0.5):
        for pair in model.reference.layers:
            pair.age = 1  # keeps the gauge, so that A and B can be compared one by one
        model.step([batch_loss(0)], [Group(0.1, 0.1, decay)])
    for i, j, (a, b) in zip(plain.reference.layers, decayed.reference.layers, before, strict=True):
        close(j.a, i.a - 0.05 * a)
        close(j.b, i.b - 0.05 * b)
