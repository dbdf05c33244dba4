"""Utilities of directions against dense float64 references of cpp/README.md, section 10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyctrlora import CTROptimizer, LoRALinear

M, N, RANK, GAMMA = 7, 6, 4, 0.5


class Problem:
    """One layer on one batch of two equal halves, so that one half of the rows knows the other."""

    def __init__(self, ranks: int, seed: int, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.layer = LoRALinear(nn.Linear(N, M), rank=RANK, alpha=2.0 * RANK, name="x").double()
        with torch.no_grad():
            self.layer.lora_b.normal_(std=0.3)
            self.layer.lora_a[ranks:], self.layer.lora_b[:, ranks:] = 0.0, 0.0
        half = torch.randn(20, N, dtype=torch.float64) * torch.linspace(0.3, 2, N).double()
        target = torch.randn(20, M, dtype=torch.float64) @ torch.randn(M, M, dtype=torch.float64)
        self.x, self.target = torch.cat([half, half]), torch.cat([target, target])
        # lr: the parameters are next to still
        self.opt = CTROptimizer(
            self.layer.parameters(), lr=1e-9, total_steps=200, whitening=GAMMA, **settings
        )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.opt.zero_grad()
            (self.layer(self.x) - self.target).square().sum(-1).mean().backward()
            self.opt.step()

    def gradient(self) -> Tensor:
        g = 2 * (self.layer(self.x) - self.target).detach() / len(self.x)
        return g.T @ self.x

    def power(self, side: str, exponent: float) -> Tensor:
        """The damped factor of the engine's own state, to any power."""
        tensors = self.opt.state_dict()["ctrlora"]["tensors"]
        basis, values, trace = (
            tensors[f"group0.{side}.{part}"][0].double()
            for part in ("basis", "eigenvalues", "trace")
        )
        damped = values + 0.01 * trace / len(basis)
        assert basis.shape[0] == basis.shape[1]
        return basis @ torch.diag(damped**exponent) @ basis.T

    def whitened(self) -> tuple[Tensor, Tensor, Tensor]:
        """G, B and A in whitened coordinates."""
        h = GAMMA / 2
        g = self.power("output", -h) @ self.gradient() @ self.power("input", -h)
        b = self.power("output", h) @ self.layer.lora_b.detach()
        return g, b, self.layer.lora_a.detach() @ self.power("input", h)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_new_direction_is_worth_half_its_squared_singular_value(ranks: int, seed: int) -> None:
    problem = Problem(ranks, seed, rank_budget=1.0)
    problem.run(9)
    g, b, a = problem.whitened()
    inside_b, inside_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    residual = (torch.eye(M).double() - inside_b) @ g @ (torch.eye(N).double() - inside_a)
    _, sigma, v = torch.linalg.svd(residual)
    problem.run(1)  # the event at 5 % of 200
    (event,) = problem.opt.report()["events"]
    assert (event["step"], event["from"], event["to"]) == (10, ranks, ranks + 1)
    assert event["utility"] == pytest.approx(0.5 * float(sigma[0]) ** 2, rel=1e-6)
    new = (problem.layer.lora_b == 0).all(0) & (problem.layer.lora_a != 0).any(1)
    row = problem.layer.lora_a.detach()[new] @ problem.power("input", GAMMA / 2)
    assert abs(float(row @ v[0]) / float(row.norm())) == pytest.approx(1, rel=1e-6)
    assert float((row @ a.T).abs().max()) < 1e-8
    sizes = (problem.layer.lora_a.detach() @ problem.power("input", GAMMA / 2)).norm(dim=1)
    assert float(row.norm()) ** 2 == pytest.approx(float(sizes[:ranks].square().mean()), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_what_goes_is_worth_what_its_removal_costs(seed: int) -> None:
    problem = Problem(RANK, seed, rank_budget=3 * (M + N), rank_start="full")
    problem.run(9)
    g, b, a = problem.whitened()
    s = problem.layer.scaling
    u, sigma, v = torch.linalg.svd(b @ a)
    slope = torch.stack([s * sigma[i] * u[:, i] @ g @ v[i] for i in range(RANK)])
    cost = -slope + 0.5 * s**2 * sigma[:RANK] ** 2
    inside_b, inside_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    residual = (torch.eye(M).double() - inside_b) @ g @ (torch.eye(N).double() - inside_a)
    fresh = 0.5 * float(torch.linalg.matrix_norm(residual, 2)) ** 2
    before = (problem.layer.lora_b @ problem.layer.lora_a).detach()
    problem.run(1)  # one direction has to go; another is exchanged if that pays
    (event,) = problem.opt.report()["events"]
    assert event["from"] - event["to"] == 1
    exchanged = fresh > 1.25 * max(0.0, float(cost.sort().values[1]))
    dropped = 2 if exchanged else 1
    expected = exchanged * fresh - float(cost.sort().values[:dropped].sum())
    assert event["utility"] == pytest.approx(expected, rel=1e-6)
    # Removal costs at most the sigmas that are dropped.
    change = (
        problem.power("output", GAMMA / 2)
        @ ((problem.layer.lora_b @ problem.layer.lora_a).detach() - before)
        @ problem.power("input", GAMMA / 2)
    )
    gone = cost.argsort()[:dropped]
    assert float(change.norm()) == pytest.approx(float(sigma[gone].norm()), rel=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_noise_is_worth_little(seed: int) -> None:
    """Independent halves: without a common signal, one's directions mean little to the other."""
    worth = []
    for signal in (0.0, 3.0):
        torch.manual_seed(seed)
        layer = LoRALinear(nn.Linear(N, M, bias=False), rank=RANK, alpha=RANK, name="x").double()
        nn.init.zeros_(layer.base.weight)  # type: ignore[arg-type]
        opt = CTROptimizer(layer.parameters(), lr=1e-9, rank_budget=1.0, total_steps=200)
        with torch.no_grad():
            layer.lora_a[1:] = 0.0
        truth = signal * torch.randn(M, N, dtype=torch.float64) / N
        for _ in range(10):
            x = torch.randn(64, N, dtype=torch.float64)
            y = x @ truth.T + torch.randn(64, M, dtype=torch.float64)
            opt.zero_grad()
            (layer(x) - y).square().sum(-1).mean().backward()
            opt.step()
        worth.append(sum(event["utility"] for event in opt.report()["events"]))
    assert worth[0] < 0.05 * worth[1]
