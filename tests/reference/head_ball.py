"""The head's ball of cpp/README.md, section 4, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from reference.averages import Debiased
from torch import Tensor


@dataclass
class HeadBall:
    """All layers together change the loss by no more than `radius` of the heads' outputs would."""

    radius: float
    beta: float
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    outputs: Debiased = field(default_factory=Debiased)
    output_grads: Debiased = field(default_factory=Debiased)

    def observe(self, z: Tensor, g: Tensor) -> None:
        """One backward of a head: outputs z and their gradient g (..., m), as .grad has it."""
        z, g = (t.detach().double().flatten(0, -2) for t in (z, g))
        keep = (g != 0).any(1) & g.isfinite().all(1) & z.isfinite().all(1)
        self.rows.append((z[keep], g[keep]))

    def shrink(self, decrease: float, schedule: float) -> float:
        """φ ≤ 1 for a step that is to lower the loss by `decrease`, to first order."""
        rows, self.rows = self.rows, []
        z, g = (
            torch.cat([batch[i] for batch in rows]) if rows else torch.zeros(0, 1) for i in (0, 1)
        )
        if len(z) > 1:
            for average, about in (self.outputs, z - z.mean(0)), (self.output_grads, g):
                square = float(about.square().sum())
                square *= len(z) / (len(z) - 1) if average is self.outputs else 1
                average.add(square, self.beta, average.mean(self.beta))
        if self.outputs.seen == 0 or decrease <= 0:
            return 1.0
        means = [average.mean(self.beta) for average in (self.outputs, self.output_grads)]
        sensitivity = float(torch.tensor(means, dtype=torch.float64).prod().sqrt())
        return min(1.0, self.radius * schedule * sensitivity / decrease)
