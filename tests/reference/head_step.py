"""The head's own step of cpp/README.md, section 4, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from reference.averages import Debiased
from torch import Tensor


@dataclass
class HeadStep:
    """AdamW on a head's weight (m, n), as long as its effect on the outputs tells."""

    step_at_1: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rows: list[Tensor] = field(default_factory=list)
    change: Debiased = field(default_factory=Debiased)
    gain: float = 1.0
    updates: int = 0
    momentum: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def observe(self, x: Tensor, g: Tensor) -> None:
        """One backward of the head: inputs x (..., n) and the gradient g (..., m) of its output."""
        x, g = (t.detach().double().flatten(0, -2) for t in (x, g))
        self.rows.append(x[(g != 0).any(1) & g.isfinite().all(1)])

    def step(self, weight: Tensor, grad: Tensor, lr: float) -> Tensor:
        """The weight after a step."""
        rows, self.rows = self.rows, []
        beta1, beta2 = self.betas
        self.updates += 1
        self.momentum = beta1 * self.momentum + (1 - beta1) * grad
        self.square = beta2 * self.square + (1 - beta2) * grad.square()
        rms = (self.square / (1 - beta2**self.updates)).sqrt() + self.eps
        if rows:
            sample = float((torch.cat(rows) @ (grad / rms).T).square().mean())
            self.change.add(sample, beta2, self.change.mean(beta2))
        if self.change.seen:
            self.gain = min(self.step_at_1 / self.change.mean(beta2) ** 0.5, 1000.0)
        return weight - lr * self.gain * self.momentum / (1 - beta1**self.updates) / rms
