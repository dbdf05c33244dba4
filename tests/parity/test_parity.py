"""The engine against the reference, step by step; and what a sketch with k < d must keep."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from parity.problems import F64, ReferenceLinear, ReferenceModel, layer, mlp, randn, spd
from parity.twins import Twins, dense, own_layers, relative
from reference.ctr_reference import Group, Layer, Reference, Settings, balance, commit
from reference.secular_reference import secular_step
from torch import Tensor, nn

import pyctrlora
from pyctrlora import _C

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STEPS = 14
PEAK = 0.1
# Two layers of one shape, two of others: thirds within a shape and several shapes at once.
WIDTHS = [6, 8, 8, 8, 4]
Loss = "Callable[[nn.Module], Tensor]"


def schedule(t: int) -> float:
    """Warm-up over four steps, then linear decay."""
    return min((t + 1) / 4, 1 - t / 20)


def data(t: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Inputs and a fixed teacher's labels."""
    x = randn(*shape, 6, seed=1000 + t)
    return x, (x @ randn(6, 4, seed=7)).argmax(-1)


def entropy(t: int, *shape: int, reduction: str = "mean", scale: float = 1.0) -> Loss:
    x, y = data(t, *(shape or (24,)))

    def loss(model: nn.Module) -> Tensor:
        out = model(x.to(next(model.parameters(), x).dtype)).flatten(0, -2)
        return scale * nn.functional.cross_entropy(out, y.flatten(), reduction=reduction)

    return loss


def check(twins: Twins, step: int, tolerance: float) -> None:
    """Fails on the first quantity, in the order of computation, that deviates."""
    for name, deviation in twins.deviations():
        assert deviation <= tolerance, f"step {step}: {name} deviates by {deviation:.2e}"


def run(
    settings: Settings,
    losses: Callable[[int], Sequence[Loss]] = lambda t: [entropy(t)],
    *,
    zero_b: bool = False,
    tolerance: float = 1e-9,
    weight_decay: float = 0.0,
    **changes: Any,
) -> list[float]:
    """Trains both for STEPS steps, compares after every one; returns the Fisher ball's factors."""
    twins = Twins(ReferenceModel(mlp(WIDTHS, 2, 0, zero_b=zero_b), settings), **changes)
    shrinks = []
    for t in range(STEPS):
        pairs = twins.pairs
        assert twins.wanted() == [twins.reference.reference.wanted(pair) for pair in pairs]
        twins.step(losses(t), [Group(PEAK * schedule(t), PEAK, weight_decay)])
        check(twins, t, tolerance)
        shrinks.append(twins.reference.reference.phi)
    assert all(float(i.b.norm()) > 0 for i in pairs)
    return shrinks


@pytest.mark.parametrize("zero_b", [True, False])
@pytest.mark.parametrize("step_length", ["rms", "radius"])
@pytest.mark.parametrize("whitening", [0.0, 0.25, 0.5, 1.0])
def test_engine_follows_the_reference(whitening: float, step_length: str, zero_b: bool) -> None:
    run(Settings(whitening=whitening, step_length=step_length), zero_b=zero_b)


@pytest.mark.parametrize("step_length", ["rms", "radius"])
def test_with_the_fisher_ball_active_on_every_step(step_length: str) -> None:
    shrinks = run(Settings(kl_radius=1e-5, step_length=step_length))
    assert max(shrinks) < 1


def test_with_the_fisher_ball_switched_off() -> None:
    assert run(Settings(kl_radius=math.inf)) == [1.0] * STEPS


@pytest.mark.parametrize(
    "settings",
    [
        Settings(maximize=True),
        Settings(beta1=0.0),
        Settings(beta1=0.95, rms_beta=0.5),
        Settings(factor_every=1, factor_warmup_steps=0),
        Settings(factor_every=4, factor_warmup_steps=2),
        Settings(factor_every=2, factor_warmup_steps=0),
        Settings(factor_beta=0.5),
        Settings(factor_beta=0.0),
        Settings(damping=0.3),
        Settings(gram_floor=0.05),
        Settings(balance_every=3),
        Settings(loss_terms=5),
        Settings(loss_terms=-1),
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in vars(o).items() if v != getattr(Settings(), k)),
)
@pytest.mark.parametrize("zero_b", [True, False])
def test_with_other_settings(settings: Settings, zero_b: bool) -> None:
    run(settings, zero_b=zero_b)


def test_with_a_summed_and_scaled_loss() -> None:
    run(
        Settings(loss_reduction="sum", loss_scale=64.0),
        lambda t: [entropy(t, reduction="sum", scale=64.0)],
    )


@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("at", [2, 4, 8])
def test_with_a_loss_spike(at: int, size: float) -> None:
    run(Settings(balance_every=6), lambda t: [entropy(t, scale=size if t == at else 1.0)])


@pytest.mark.parametrize("zero_b", [True, False])
def test_with_weight_decay(zero_b: bool) -> None:
    run(Settings(), weight_decay=0.3, zero_b=zero_b)


def test_with_layers_without_bias() -> None:
    model = mlp(WIDTHS, 2, 0)
    for linear in model:
        linear.bias = None
    twins = Twins(ReferenceModel(model, Settings()))
    for t in range(STEPS):
        twins.step([entropy(t)], [Group(PEAK * schedule(t), PEAK)])
        check(twins, t, 1e-9)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_with_sequences_of_tokens(shape: tuple[int, ...]) -> None:
    run(Settings(loss_terms=-1), lambda t: [entropy(t, *shape)])


def test_with_fewer_rows_than_features() -> None:
    run(Settings(), lambda t: [entropy(t, 3)])


def test_with_gradient_accumulation_over_unequal_micro_batches() -> None:
    run(Settings(), lambda t: [entropy(t, 16, scale=0.8), entropy(t + 50, 4, scale=0.2)])


def test_with_ignored_labels() -> None:
    def losses(t: int) -> list[Loss]:
        x, y = data(t, 24)
        y[t % 5 :: 3] = -100
        return [lambda model: nn.functional.cross_entropy(model(x), y)]

    run(Settings(), losses)


def test_with_two_groups_of_their_own_lr_and_decay() -> None:
    model = mlp(WIDTHS, 2, 0)
    for linear in list(model)[4:]:
        if isinstance(linear, ReferenceLinear):
            linear.layer.group = 1
    twins = Twins(ReferenceModel(model, Settings(kl_radius=1e-4)))
    for t in range(STEPS):
        # The second group sits out two steps, and its schedule differs from the first's.
        second = 0.0 if t in (0, 6) else 0.05 / (1 + t % 3)
        twins.step([entropy(t)], [Group(PEAK * schedule(t), PEAK, 0.1), Group(second, 0.05)])
        check(twins, t, 1e-9)


def test_without_observations_by_the_gradient_proxy() -> None:
    for zero_b in (True, False):
        reference = ReferenceModel(mlp(WIDTHS, 2, 0, zero_b=zero_b), Settings(), observed=False)
        twins = Twins(reference)
        for own in twins.layers:  # computed in plain torch: nothing observes
            own.forward = lambda x, own=own: (
                own.base(x) + own.scaling * (x @ own.lora_a.T) @ own.lora_b.T
            )
        for t in range(STEPS):
            twins.step([entropy(t)], [Group(PEAK * schedule(t), PEAK)])
            check(twins, t, 1e-9)


def test_in_float32_over_the_first_steps() -> None:
    for zero_b in (True, False):
        for step_length in ("rms", "radius"):
            o = Settings(step_length=step_length)
            reference = ReferenceModel(mlp(WIDTHS, 2, 0, zero_b=zero_b), o)
            twins = Twins(reference, torch.float32)
            for t in range(4):
                twins.step([entropy(t)], [Group(PEAK * schedule(t), PEAK)])
                check(twins, t, 1e-5)


@pytest.mark.parametrize("broken", [None, math.nan], ids=["none", "nan"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_layer_whose_gradient_is_missing_or_broken_stays_as_it_is(
    broken: float | None, weight_decay: float
) -> None:
    twins = Twins(ReferenceModel(mlp(WIDTHS, 2, 0), Settings()))
    twins.step([entropy(0)], [Group(PEAK, PEAK)])
    entropy(1)(twins.model).backward()
    first, second = twins.layers[:2]
    if broken is None:
        first.lora_a.grad = first.lora_b.grad = None
    else:
        first.lora_a.grad[0, 0] = broken
    kept, moved = twins.product(0), twins.product(1)
    twins.optimizer.param_groups[0].update(lr=PEAK, weight_decay=weight_decay)
    twins.optimizer.step()
    assert relative(twins.product(0), kept) < 1e-12
    assert relative(twins.product(1), moved) > 1e-3
    assert first.lora_a.isfinite().all()
    assert second.lora_a.isfinite().all()


def test_balance_agrees_with_the_reference() -> None:
    pair = layer(7, 6, 3, 1.0, 0)
    pair.input_factor.add(spd(6, 5), 0.0)
    pair.output_factor.add(spd(7, 6), 0.0)
    pair.momentum_a, pair.momentum_b = torch.zeros_like(pair.a), torch.zeros_like(pair.b)
    o = Settings(whitening=1.0, damping=1e-12)
    p = pair.b.T @ pair.output_factor.value @ pair.b
    q = pair.a @ pair.input_factor.value @ pair.a.T
    gauge = _C.balance(p[None], q[None])
    assert gauge.ok.all()
    a, b = gauge.map[0] @ pair.a, pair.b @ gauge.inverse[0]
    balance(pair, o)
    assert relative(b @ a, pair.b @ pair.a) < 1e-10
    # Component by component they agree up to sign and order: compare what neither changes.
    for ours, theirs in (a, pair.a), (b.T, pair.b.T):
        sizes = [torch.sort(t.norm(dim=1)).values for t in (ours, theirs)]
        assert relative(*sizes) < 1e-8


@pytest.mark.parametrize("radius", [1e-3, 0.1, 2.0, 1e4])
def test_secular_subproblem_agrees_with_the_reference(radius: float) -> None:
    gradient, s, o = randn(5, 4, seed=0), torch.rand(5).double(), torch.rand(4).double()
    s[0] = 0.0  # a direction without curvature
    solution = _C.TrustRegionSubproblem(gradient[None], s[None], o[None]).solve(
        torch.tensor([radius], dtype=F64)
    )
    theirs = secular_step(gradient, s.diag(), o.diag(), radius)
    assert relative(solution.step[0], theirs) < 1e-9
    curvature = (s.diag() @ theirs @ o.diag() * theirs).sum()
    decrease = -(gradient * theirs).sum() - 0.5 * curvature
    assert relative(solution.model_decrease[0], decrease) < 1e-9


class Sketched:
    """A wide layer with a decaying spectrum, sketched by the engine, in full by the reference."""

    def __init__(self, sketch_rank: int, dtype: torch.dtype, decay: float = 0.8) -> None:
        n, m = 40, 30
        self.spectrum = decay ** (0.5 * torch.arange(n, dtype=F64))
        self.rotation, _ = torch.linalg.qr(randn(n, n, seed=1))
        linear = nn.Linear(n, m, dtype=dtype)
        linear.weight.data.copy_(randn(m, n, seed=2) / n**0.5)
        self.target = (randn(m, n, seed=3) * 0.8 ** torch.arange(m).double()[:, None]).to(dtype)
        self.model = pyctrlora.add_lora(nn.Sequential(linear), rank=2, alpha=4.0)
        (self.own,) = own_layers(self.model)
        self.own.lora_a.data.copy_(randn(2, n, seed=5) / n**0.5)
        self.own.lora_b.data.copy_(0.1 * randn(m, 2, seed=4))
        self.pair = Layer(self.own.lora_a.detach(), self.own.lora_b.detach(), 2.0)
        self.settings = Settings(factor_every=1)
        self.reference = Reference([self.pair], self.settings)
        self.optimizer = pyctrlora.CTROptimizer(
            self.model.parameters(),
            lr=0.01,
            sketch_rank=sketch_rank,
            sample_rows=100_000,
            factor_every=1,
        )

    def step(self, t: int) -> None:
        x = (randn(200, 40, seed=50 + t) * self.spectrum) @ self.rotation.T
        x = x.to(self.target.dtype)
        y = self.model(x)
        y.register_hook(lambda g: self.reference.observe(self.pair, x, g, None))
        (y - x @ self.target.T).square().sum(1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        commit(self.pair, self.settings)

    def factor(self, side: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = self.optimizer.state_dict()["ctrlora"]["tensors"]
        keys = ("basis", "eigenvalues", "trace")
        basis, values, trace = (tensors[f"group0.{side}.{key}"][0].double() for key in keys)
        return basis, values, trace, getattr(self.pair, f"{side}_factor").value


def captured(basis: Tensor, exact: Tensor) -> float:
    """Share of the best that a basis of its size could hold of the factor's trace."""
    optimum = torch.linalg.eigvalsh(exact)[-basis.shape[1] :].sum()
    return float(torch.trace(basis.T @ exact @ basis) / optimum)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("sketch_rank", [1, 2, 6, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sketch_keeps_the_trace_and_an_orthonormal_basis(
    dtype: torch.dtype, sketch_rank: int, side: str
) -> None:
    rounding = 1e-9 if dtype is F64 else 1e-5
    sketched = Sketched(sketch_rank, dtype)
    for t in range(10):
        sketched.step(t)
        basis, values, trace, exact = sketched.factor(side)
        assert basis.shape == (len(exact), sketch_rank)
        assert relative(basis.T @ basis, torch.eye(sketch_rank)) < rounding, f"update {t}"
        assert relative(trace, exact.trace()) < rounding, f"update {t}"
        assert relative(dense(basis, values, trace).trace(), exact.trace()) < rounding
        assert (values >= 0).all()
        assert captured(basis, exact) <= 1 + rounding


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("sketch_rank", [6, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sketch_holds_most_of_the_optimum_after_ten_updates(
    dtype: torch.dtype, sketch_rank: int, side: str
) -> None:
    sketched = Sketched(sketch_rank, dtype)
    for t in range(10):
        sketched.step(t)
    basis, values, _, exact = sketched.factor(side)
    assert captured(basis, exact) >= 0.9
    assert values.sum() >= 0.9 * torch.linalg.eigvalsh(exact)[-sketch_rank:].sum()


def one_pass(u: Tensor, e: Tensor, keep: float, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """cpp/README.md §2 Commit as it is written: Nyström from Y' = b·U diag(e) + (1 − b)·F_new U."""
    y = keep * u * e + (1 - keep) * fresh @ u
    k = u.T @ y
    c = torch.linalg.cholesky((k + k.T) / 2 + 1e-14 * k.trace() * torch.eye(len(k)))
    columns = torch.linalg.solve_triangular(c, y.T, upper=False).T
    basis, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    return basis, singular.square()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("sketch_rank", [1, 2, 6, 16])
def test_a_sketch_follows_the_one_pass_update(sketch_rank: int, side: str) -> None:
    # One pass forgets the old factor's tail: with k = 1 or 2 this reaches 0.84 to 0.95 of the
    # optimum after ten updates, where repeated passes over all rows would reach 0.99.
    sketched = Sketched(sketch_rank, F64)
    sketched.step(0)
    basis, values, _, before = sketched.factor(side)
    u, e, before = basis.clone(), values.clone(), before.clone()
    for t in range(1, 12):
        sketched.step(t)
        basis, _, _, exact = sketched.factor(side)
        keep = min(sketched.settings.factor_beta, 1 - 1 / (t + 1))
        u, e = one_pass(u, e, keep, (exact - keep * before) / (1 - keep))
        before = exact.clone()
        assert abs(captured(basis, exact) - captured(u, exact)) < 0.005, f"update {t}"


def test_a_complete_sketch_is_the_factor_itself() -> None:
    sketched = Sketched(40, F64)
    for t in range(10):
        sketched.step(t)
        for side in ("input", "output"):
            basis, values, trace, exact = sketched.factor(side)
            assert relative(dense(basis, values, trace), exact) < 1e-9
