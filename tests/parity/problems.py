"""Small models whose layers hand their rows to the reference."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from reference.ctr_reference import Group, Layer, Reference, Settings
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

F64 = torch.float64


def randn(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """Reproducible standard normals that no global generator touches."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def spd(size: int, seed: int, condition: float = 30.0) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues spread from 1 to `condition`."""
    q, _ = torch.linalg.qr(randn(size, size, seed=seed))
    return (q * torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=F64)) @ q.T


class ReferenceLinear(nn.Module):
    """y = W0 x + bias + s B A x in plain torch, its rows handed to the reference."""

    def __init__(self, weight: Tensor, bias: Tensor | None, layer: Layer) -> None:
        super().__init__()
        self.weight, self.bias, self.layer = weight, bias, layer
        self.reference: Reference | None = None
        self.begin()

    def begin(self) -> None:
        """New leaves at the layer's present weights; gradients start from zero."""
        self.a, self.b = (t.clone().requires_grad_() for t in (self.layer.a, self.layer.b))

    def forward(self, x: Tensor) -> Tensor:
        base = nn.functional.linear(x, self.weight, self.bias)
        y = base + self.layer.scaling * (x @ self.a.T) @ self.b.T
        if y.requires_grad and self.reference is not None:
            rows = x.detach(), base.detach()
            y.register_hook(lambda g: self.reference.observe(self.layer, rows[0], g, rows[1]))
        return y


class ReferenceModel:
    """A model of `ReferenceLinear`s with the reference as its optimizer."""

    def __init__(self, model: nn.Module, settings: Settings, *, observed: bool = True) -> None:
        self.model = model
        self.linears = [m for m in model.modules() if isinstance(m, ReferenceLinear)]
        self.reference = Reference([linear.layer for linear in self.linears], settings)
        for linear in self.linears:
            linear.reference = self.reference if observed else None

    def step(self, losses: Sequence[Callable[[nn.Module], Tensor]], groups: list[Group]) -> float:
        """One step on the sum of the losses' gradients; returns the sum of the losses."""
        for linear in self.linears:
            linear.begin()
        total = 0.0
        for loss_of in losses:
            loss = loss_of(self.model)
            loss.backward()
            total += float(loss.detach())
        self.reference.step([(i.a.grad, i.b.grad) for i in self.linears], groups)
        return total


def layer(m: int, n: int, rank: int, scaling: float, seed: int, *, zero_b: bool = False) -> Layer:
    """A pair in PEFT's scale: A of unit-variance output, B random or zero."""
    b = torch.zeros(m, rank, dtype=F64) if zero_b else 0.3 * randn(m, rank, seed=seed + 1)
    return Layer(randn(rank, n, seed=seed) / n**0.5, b, scaling)


def mlp(widths: Sequence[int], rank: int, seed: int, *, zero_b: bool = False) -> nn.Sequential:
    """Tanh network of `ReferenceLinear`s, biases frozen at small random values."""
    modules: list[nn.Module] = []
    for i, (n, m) in enumerate(pairwise(widths)):
        weight, bias = (
            randn(m, n, seed=seed + 10 * i) / n**0.5,
            0.1 * randn(m, seed=seed + 10 * i + 1),
        )
        pair = layer(m, n, rank, 2.0, seed + 10 * i + 2, zero_b=zero_b)
        modules += [ReferenceLinear(weight, bias, pair), nn.Tanh()]
    return nn.Sequential(*modules[:-1])
