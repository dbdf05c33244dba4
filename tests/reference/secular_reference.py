"""The runnable specification of the secular subproblem (cpp/README.md §4), dense and float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from reference.ctr_reference import bisect

if TYPE_CHECKING:
    from torch import Tensor


def secular_step(gradient: Tensor, big_s: Tensor, omega: Tensor, radius: float) -> Tensor:
    """min ⟨G,D⟩ + ½⟨D, SDΩ⟩ s.t. ‖D‖_F ≤ radius, by bisection on the multiplier ν (§4)."""
    (e_s, u_s), (e_o, u_o) = torch.linalg.eigh(big_s), torch.linalg.eigh(omega)
    g, curvature = u_s.T @ gradient @ u_o, e_s.clamp_min(0)[:, None] * e_o.clamp_min(0)

    def solve(nu: float) -> Tensor:
        return -torch.where(g == 0, g, g / (curvature + nu))

    high = 2 * float(g.norm()) / radius  # the solution is inside there, whatever the curvature
    inside = bool(solve(0.0).norm() <= radius)
    nu = 0.0 if inside else bisect(lambda v: -float(solve(v).norm()), 0.0, high, -radius)
    return u_s @ solve(nu) @ u_o.T
