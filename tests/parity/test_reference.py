"""The reference checked against definitions and brute force, before the engine is against it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from parity.problems import F64, layer, randn, spd
from reference.ctr_reference import (
    Average,
    Group,
    Layer,
    Reference,
    Settings,
    balance,
    direction,
    inner,
    power,
    quartic,
    shorten,
)
from reference.secular_reference import secular_step
from torch import Tensor

M, N, R = 7, 6, 3
close = torch.testing.assert_close


def known(seed: int, *, zero_b: bool = False, scaling: float = 1.7) -> Layer:
    """A layer with given dense factors."""
    pair = layer(M, N, R, scaling, seed, zero_b=zero_b)
    pair.input_factor.add(spd(N, seed + 5), 0.0)
    pair.output_factor.add(spd(M, seed + 6), 0.0)
    return pair


def pair_gradients(pair: Layer, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(gradA, gradB) that autograd would deliver for the full weight gradient."""
    return pair.scaling * pair.b.T @ gradient, pair.scaling * gradient @ pair.a.T


def tangent(pair: Layer, gradient: Tensor, o: Settings) -> Tensor:
    """The step in weight space: s(BδA + δB A)."""
    d_a, d_b = direction(pair, *pair_gradients(pair, gradient), o)
    return pair.scaling * (pair.b @ d_a + d_b @ pair.a)


def output_metric(pair: Layer) -> tuple[Tensor, Tensor]:
    """(I, Ω): the metric of the output norm."""
    return torch.eye(len(pair.b), dtype=F64), pair.input_factor.value


@pytest.mark.parametrize("whitening", [0.0, 0.25, 0.5, 1.0])
def test_direction_is_the_metric_projection_of_the_preconditioned_step(whitening: float) -> None:
    o = Settings(whitening=whitening, gram_floor=0.0)
    pair, gradient = known(0), randn(M, N, seed=9)
    s_half, o_half = (
        power(f, whitening / 2, o.damping)
        for f in (pair.output_factor.value, pair.input_factor.value)
    )
    full = -torch.linalg.inv(s_half @ s_half) @ gradient @ torch.linalg.inv(o_half @ o_half)
    # Every tangent vector is s(BX + YA): its whitened image is linear in the entries of X and Y.
    basis = [pair.b @ e.view(R, N) for e in torch.eye(R * N, dtype=F64)]
    basis += [e.view(M, R) @ pair.a for e in torch.eye(M * R, dtype=F64)]
    columns = torch.stack([(s_half @ t @ o_half).flatten() for t in basis], dim=1)
    target = (s_half @ full @ o_half).flatten()
    # The two parts overlap, so the minimum-norm solution is asked for (gelsd); the image is unique.
    best = columns @ torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution
    close(
        (s_half @ tangent(pair, gradient, o) @ o_half).flatten(), best[:, 0], rtol=1e-9, atol=1e-9
    )


def test_direction_is_the_full_natural_step_when_the_tangent_space_is_everything() -> None:
    pair = replace(known(0), a=randn(N, N, seed=1), b=randn(M, N, seed=2))
    gradient, o = randn(M, N, seed=3), Settings(whitening=1.0, gram_floor=0.0)
    s_inv, o_inv = (
        power(f, -1, o.damping) for f in (pair.output_factor.value, pair.input_factor.value)
    )
    close(tangent(pair, gradient, o), -s_inv @ gradient @ o_inv, rtol=1e-8, atol=1e-8)


def test_step_depends_neither_on_the_gauge_nor_on_alpha() -> None:
    o, pair, gradient = Settings(), known(0), randn(M, N, seed=9)
    expected = tangent(pair, gradient, o)
    mix = randn(R, R, seed=4)
    turned = replace(pair, a=mix @ pair.a, b=pair.b @ torch.linalg.inv(mix))
    rescaled = replace(pair, b=pair.b / 5, scaling=pair.scaling * 5)
    close(tangent(turned, gradient, o), expected, rtol=1e-9, atol=1e-10)
    close(tangent(rescaled, gradient, o), expected, rtol=1e-9, atol=1e-10)


def test_from_zero_b_only_b_moves() -> None:
    o, pair, gradient = Settings(), known(0, zero_b=True), randn(M, N, seed=9)
    d_a, d_b = direction(pair, *pair_gradients(pair, gradient), o)
    assert (d_a == 0).all()
    q = pair.a @ power(pair.input_factor.value, o.whitening, o.damping) @ pair.a.T
    s_inv = power(pair.output_factor.value, -o.whitening, o.damping)
    close(
        d_b,
        -s_inv @ gradient @ pair.a.T @ torch.linalg.inv(q) / pair.scaling,
        rtol=1e-9,
        atol=1e-12,
    )
    a = pair.a.clone()
    balance(pair, o)  # without a product there is nothing to balance
    assert torch.equal(pair.a, a)


def test_momentum_outside_the_range_of_b_moves_nothing() -> None:
    o, pair = Settings(), known(0)
    pair.b[:, 0] = 0  # the first direction is one that B does not have
    pair.a = (
        torch.linalg.cholesky(
            torch.linalg.inv(
                pair.a @ power(pair.input_factor.value, o.whitening, o.damping) @ pair.a.T
            )
        ).mT
        @ pair.a
    )  # Q = I, so that the floors mix no directions
    stale = torch.zeros(R, N, dtype=F64)
    stale[0] = 1e3 * randn(N, seed=3)
    d_a, d_b = direction(pair, stale, torch.zeros(M, R, dtype=F64), o)
    assert float(d_a.norm()) < 1e-9
    assert (d_b == 0).all()


def test_balance_gives_a_direction_that_b_lacks_an_a_row_of_usable_size() -> None:
    o, pair = Settings(), known(0)
    pair.momentum_a, pair.momentum_b = torch.zeros_like(pair.a), torch.zeros_like(pair.b)
    pair.b[:, 0] = 0
    before = pair.b @ pair.a
    balance(pair, o)
    close(pair.b @ pair.a, before, rtol=1e-12, atol=1e-12)
    q = pair.a @ power(pair.input_factor.value, o.whitening, o.damping) @ pair.a.T
    sizes = torch.linalg.eigvalsh(q)
    close(sizes[0], 0.01 * sizes[-1])


def test_predicted_decrease_is_the_first_order_change_of_the_loss() -> None:
    o, pair, gradient = Settings(), known(0), randn(M, N, seed=9)
    grads = pair_gradients(pair, gradient)
    d_a, d_b = direction(pair, *grads, o)
    first_order = -(gradient * tangent(pair, gradient, o)).sum()
    close((grads[0] * d_a).sum() + (grads[1] * d_b).sum(), -first_order)
    assert first_order > 0


@pytest.mark.parametrize("fisher", [False, True])
def test_quartic_is_the_norm_of_the_true_change(fisher: bool) -> None:
    pair = known(0)
    left = pair.output_factor.value if fisher else torch.eye(M, dtype=F64)
    d_a, d_b = randn(R, N, seed=1), randn(M, R, seed=2)
    c = quartic(pair, d_a, d_b, left, pair.input_factor.value)
    for f in (0.1, 1.0, -2.0):
        d = pair.scaling * ((pair.b + f * d_b) @ (pair.a + f * d_a) - pair.b @ pair.a)
        direct = torch.trace(d.T @ left @ d @ pair.input_factor.value)
        close(c @ torch.tensor([f**2, f**3, f**4], dtype=F64), direct, rtol=1e-12, atol=1e-12)


def test_output_norm_is_the_mean_square_of_the_outputs_change() -> None:
    x, d = randn(50, N, seed=0), randn(M, N, seed=1)
    expected = float((x @ d.T).square().sum(1).mean())
    assert math.isclose(inner(d, d, torch.eye(M, dtype=F64), x.T @ x / 50), expected)


def test_shorten_finds_the_smallest_root() -> None:
    def c(*values: float) -> Tensor:
        return torch.tensor(values, dtype=F64)

    assert shorten(c(1, 0, 0), 0.5, 1.0) == 0.5
    assert math.isclose(shorten(c(4, 0, 0), 3.0, 1.0), 0.5, rel_tol=1e-15)
    # f²(1 − 1.95f + f²) rises to .0696 at .545, falls to .0443 at .918 and rises again.
    assert math.isclose(shorten(c(1, -1.95, 1), 2.0, 0.06), 0.3935, abs_tol=0.001)
    assert math.isclose(shorten(c(1, -1.95, 1), 2.0, 0.1), 1.141, abs_tol=0.001)
    assert shorten(c(1, -1.95, 1), 0.9, 0.06) == 0.9


@pytest.mark.parametrize("radius", [0.05, 1.0, 3.0, 1e3])
def test_secular_step_against_projected_gradient_descent(radius: float) -> None:
    big_s, omega, gradient = spd(4, 0, 5.0), spd(3, 1, 5.0), randn(4, 3, seed=2)
    d = torch.zeros(4, 3, dtype=F64)
    for _ in range(2000):  # condition 25, step 1/L: far past convergence
        d = d - (gradient + big_s @ d @ omega) / 25
        d = d * min(1.0, radius / max(float(d.norm()), 1e-300))
    close(secular_step(gradient, big_s, omega, radius), d, rtol=1e-9, atol=1e-11)


def test_secular_step_without_curvature_goes_to_the_boundary() -> None:
    gradient = randn(4, 3, seed=2)
    flat = torch.zeros(4, 4, dtype=F64)
    close(secular_step(gradient, flat, spd(3, 1), 2.0), -2 * gradient / gradient.norm())


def test_balance_keeps_the_product_and_equalises_the_grams() -> None:
    o, pair, gradient = Settings(), known(0), randn(M, N, seed=9)
    pair.momentum_a, pair.momentum_b = pair_gradients(pair, gradient)
    before = pair.b @ pair.a
    balance(pair, o)
    close(pair.b @ pair.a, before, rtol=1e-12, atol=1e-12)
    p = pair.b.T @ power(pair.output_factor.value, o.whitening, o.damping) @ pair.b
    q = pair.a @ power(pair.input_factor.value, o.whitening, o.damping) @ pair.a.T
    close(p, q, rtol=1e-10, atol=1e-10)
    close(p, p.diag().diag(), rtol=1e-10, atol=1e-10)
    for moved, fresh in zip(
        (pair.momentum_a, pair.momentum_b), pair_gradients(pair, gradient), strict=True
    ):
        close(moved, fresh, rtol=1e-10, atol=1e-10)


def test_sketched_factor_keeps_the_top_and_the_trace() -> None:
    pair = known(0)
    exact, (omega, _) = pair.input_factor.value, pair.factors(2)
    e, top = torch.linalg.eigvalsh(omega), torch.linalg.eigvalsh(exact)
    close(e[-2:], top[-2:])
    close(e[:-2], (exact.trace() - top[-2:].sum()).expand(N - 2) / (N - 2))


def test_average_is_a_mean_first_and_an_ema_afterwards() -> None:
    average, values = Average(), randn(30, seed=0)
    for value in values[:4]:
        average.add(value, 0.75)
    close(average.value, values[:4].mean())
    average.add(values[4], 0.75)
    close(average.value, 0.75 * values[:4].mean() + 0.25 * values[4])


def test_schedule_observes_all_then_contiguous_thirds_of_each_shape() -> None:
    pairs = [known(i) for i in range(6)]
    other = layer(2, 2, 1, 1.0, 0)
    reference = Reference([*pairs[:3], other, *pairs[3:]], Settings(factor_every=3))
    seen = []
    for age in range(11):
        for pair in [*pairs, other]:
            pair.age = age
        seen.append([i for i in range(6) if reference.wanted(pairs[i])])
        assert reference.wanted(other) == (age < 5 or age % 3 == 0)
    assert seen == [[0, 1, 2, 3, 4, 5]] * 5 + [[4, 5], [0, 1], [2, 3]] * 2


def test_noisy_gradients_shorten_the_step_by_their_momentum_over_their_rms() -> None:
    pair, gradient, o, lr = known(0), randn(M, N, seed=9), Settings(kl_radius=math.inf), 1e-9
    pair.observed, pair.base_square.value = True, torch.tensor(4.0, dtype=F64)
    pair.age = 1  # past the first step's change of gauge
    grad_a, grad_b = pair_gradients(pair, gradient)
    reference = Reference([pair], o)
    change = (
        float(quartic(pair, *direction(pair, grad_a, grad_b, o), *output_metric(pair))[0]) ** 0.5
    )
    momentum = 0.0
    for t in range(1, 8):  # at so small an lr neither weights nor direction move
        sign = (-1) ** t
        momentum = o.beta1 * momentum + (1 - o.beta1) * sign
        reference.step([(sign * grad_a, sign * grad_b)], [Group(lr, lr)])
        assert math.isclose(pair.f, 2 * lr / change, rel_tol=1e-6)
        moved = float(quartic(pair, pair.move_a, pair.move_b, *output_metric(pair))[0]) ** 0.5
        assert math.isclose(moved, 2 * lr * abs(momentum) / (1 - o.beta1**t), rel_tol=1e-6)
