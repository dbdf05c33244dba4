"""The runnable specification: cpp/README.md (§) as slow, dense, float64 PyTorch, layer by layer.

No code is shared with the engine: factors are dense, powers are eigendecompositions, norms are
traces of dense products, roots are found by bisection."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from reference.averages import Average, Debiased, calm
from reference.head_ball import HeadBall
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Settings:
    """The engine's options by the engine's names; `sketch_rank=None` keeps the whole factor."""

    sketch_rank: int | None = None
    factor_every: int = 1
    factor_warmup_steps: int = 5
    factor_beta: float = 0.6
    damping: float = 0.01
    whitening: float = 0.55
    loss_terms: int = 0  # 0: tokens, -1: sequences, else that many
    loss_reduction: str = "mean"
    loss_scale: float = 1.0
    beta1: float = 0.6
    gram_floor: float = 1e-4
    kl_radius: float = 0.005
    head_radius: float = 0.3
    rms_beta: float = 0.7
    step_length: str = "rms"
    balance_every: int = 100
    maximize: bool = False


@dataclass(frozen=True)
class Group:
    """What one parameter group says about one step."""

    lr: float
    initial_lr: float
    weight_decay: float = 0.0


@dataclass(eq=False)
class Layer:
    """One pair and all of its state; from f on: what the latest step computed."""

    a: Tensor
    b: Tensor
    scaling: float
    group: int = 0
    input_factor: Average = field(default_factory=Average)
    output_factor: Average = field(default_factory=Average)
    base_square: Average = field(default_factory=Average)
    observed: bool = False
    proxied: bool = False
    rows: list[tuple[Any, ...]] = field(default_factory=list)  # x, g, base output, sequences
    momentum_a: Any = 0.0
    momentum_b: Any = 0.0
    age: int = 0
    updates: int = 0
    rms: Debiased = field(default_factory=Debiased)
    f: float = 0.0
    move_a: Any = 0.0
    move_b: Any = 0.0
    predicted: float = 0.0

    def factors(self, sketch_rank: int | None) -> tuple[Tensor, Tensor]:
        """(Ω, S) as the step uses them."""
        omega = dense(self.input_factor, self.a.shape[1], sketch_rank)
        return omega, dense(self.output_factor, self.b.shape[0], sketch_rank)


def dense(average: Average, size: int, sketch_rank: int | None) -> Tensor:
    """The factor; with a sketch rank: top eigenpairs plus an isotropic tail of equal trace."""
    f = torch.eye(size, dtype=torch.float64) if average.value is None else average.value
    if sketch_rank is None or sketch_rank >= size:
        return f
    e, u = torch.linalg.eigh(f)
    e[:-sketch_rank] = e[:-sketch_rank].mean()
    return (u * e) @ u.mT


def power(f: Tensor, exponent: float, damping: float) -> Tensor:
    """(F + λI)^exponent with λ = damping · tr F / d (§2 Powers)."""
    e, u = torch.linalg.eigh(f)
    damped: Tensor = e.clamp_min(0) + damping * f.trace() / len(f)
    return (u * damped**exponent) @ u.mT


def direction(layer: Layer, m_a: Tensor, m_b: Tensor, o: Settings) -> tuple[Tensor, Tensor]:
    """(δA, δB): the textbook formula of §3 with its covariant floors."""
    a, b, s = layer.a, layer.b, layer.scaling
    o_pos, s_pos = (power(f, o.whitening, o.damping) for f in layer.factors(o.sketch_rank))
    o_neg, s_neg = (power(f, -o.whitening, o.damping) for f in layer.factors(o.sketch_rank))
    p, q = b.T @ s_pos @ b, a @ o_pos @ a.T
    q += 4 * torch.finfo(q.dtype).eps * q.diagonal().diag()
    q_inv = torch.linalg.inv(q)
    p_floored = torch.linalg.inv(p + (o.gram_floor * (p @ q).trace() / len(p) + 1e-60) * q_inv)
    p_inv = p_floored @ p @ p_floored
    d_b = -(s_neg - 0.5 * b @ p_inv @ b.T) @ m_b @ q_inv / s**2
    return -p_inv @ m_a @ (o_neg - 0.5 * a.T @ q_inv @ a) / s**2, d_b


def inner(x: Tensor, y: Tensor, left: Tensor, omega: Tensor) -> Tensor:
    """⟨X, Y⟩ = tr(Xᵀ · left · Y · Ω): left = I is the output norm, left = S the Fisher norm."""
    return (x.T @ left @ y @ omega).trace()


def quartic(layer: Layer, d_a: Tensor, d_b: Tensor, left: Tensor, omega: Tensor) -> Tensor:
    """(c₂, c₃, c₄) of ‖s(B+fδB)(A+fδA) − sBA‖² = c₂f² + c₃f³ + c₄f⁴ (§4)."""
    t = layer.scaling * (layer.b @ d_a + d_b @ layer.a)
    z = layer.scaling * d_b @ d_a
    tt, tz, zz = (inner(x, y, left, omega) for x, y in ((t, t), (t, z), (z, z)))
    return torch.stack([tt, 2 * tz, zz])


def bisect(rising: Callable[[float], float], low: float, high: float, target: float) -> float:
    """The root of rising(f) = target, rising(low) ≤ target < rising(high), to the last bit."""
    while low < (middle := 0.5 * (low + high)) < high:
        low, high = (middle, high) if rising(middle) <= target else (low, middle)
    return low


def shorten(c: Tensor, f0: float, target: float) -> float:
    """f0 if c₂f² + c₃f³ + c₄f⁴ ≤ target there, else the smallest f that reaches the target."""
    c2, c3, c4 = map(float, c)

    def square(f: float) -> float:
        return c2 * f**2 + c3 * f**3 + c4 * f**4

    if square(f0) <= target:
        return f0
    # Where 2c₂ + 3c₃f + 4c₄f² = 0 the square turns: monotone between these points.
    rest = 9 * c3**2 - 32 * c4 * c2
    turns = [(sign * rest**0.5 - 3 * c3) / (8 * c4) for sign in (-1, 1) if min(rest, c4) > 0]
    ends = [0.0, *(f for f in turns if 0 < f < f0), f0]
    low, high = next((x, y) for x, y in pairwise(ends) if square(y) > target)
    return bisect(square, low, high, target)


def balance(layer: Layer, o: Settings) -> None:
    """§5 Gauge: BA unchanged, P = Q = Σ; the momenta move along."""
    if float((layer.b @ layer.a).norm()) == 0.0:
        return
    omega, big_s = layer.factors(o.sketch_rank)
    p = layer.b.T @ power(big_s, o.whitening, o.damping) @ layer.b
    l_q = torch.linalg.cholesky(layer.a @ power(omega, o.whitening, o.damping) @ layer.a.T)
    square, v = torch.linalg.eigh(l_q.T @ p @ l_q)
    sigma = square.clamp_min(0).sqrt()
    r = sigma.clamp_min(0.01 * float(sigma.max())).sqrt().diag() @ v.T @ torch.linalg.inv(l_q)
    r_inv = torch.linalg.inv(r)
    layer.a, layer.b = r @ layer.a, layer.b @ r_inv
    layer.momentum_a, layer.momentum_b = r_inv.T @ layer.momentum_a, layer.momentum_b @ r.T


def commit(layer: Layer, o: Settings) -> None:
    """§2: the rows gathered for this step enter the factors, if there are any that count."""
    rows, layer.rows = layer.rows, []
    if not rows:
        return
    x, g = (torch.cat([batch[i] for batch in rows]) for i in (0, 1))
    keep = (g != 0).any(1) & g.isfinite().all(1) & x.isfinite().all(1)
    x, g, weight = x[keep], g[keep] / o.loss_scale, int(keep.sum())
    if weight == 0:
        return
    if layer.proxied:
        layer.input_factor, layer.output_factor, layer.proxied = Average(), Average(), False
    terms = {0: weight, -1: sum(batch[3] for batch in rows)}.get(o.loss_terms, o.loss_terms)
    per_term = terms if o.loss_reduction == "mean" else 1 / terms
    layer.input_factor.add(x.T @ x / weight, o.factor_beta)
    layer.output_factor.add(per_term * g.T @ g, o.factor_beta)
    if rows[0][2] is not None:
        base = torch.cat([batch[2] for batch in rows])[keep]
        layer.base_square.add(base.square().sum() / weight, o.factor_beta)


def commit_proxy(layer: Layer, grad_a: Tensor, grad_b: Tensor, o: Settings) -> None:
    """§2 Gradient proxy: rows of gradA, columns of gradB, normalised to a mean eigenvalue of 1."""
    layer.proxied = True
    if float(grad_a.norm() * grad_b.norm()) > 0:
        for average, rows in (layer.input_factor, grad_a), (layer.output_factor, grad_b.T):
            gram = rows.T @ rows
            average.add(gram * len(gram) / gram.trace(), o.factor_beta)


class Reference:
    """All layers and one step: `observe` every layer on every backward, then `step`."""

    def __init__(self, layers: list[Layer], settings: Settings) -> None:
        self.layers, self.settings, self.kl, self.kl_phi, self.phi = layers, settings, 0.0, 1.0, 1.0
        self.heads = HeadBall(settings.head_radius, settings.factor_beta)

    def wanted(self, layer: Layer, least: int = 1) -> bool:
        """§2 Schedule: all at first, then a contiguous part of the layers of one shape a step."""
        every = max(least, self.settings.factor_every)
        kind = layer.group, layer.a.shape, layer.b.shape
        peers = [i for i in self.layers if (i.group, i.a.shape, i.b.shape) == kind]
        part = peers.index(layer) * every // len(peers)
        return layer.age < self.settings.factor_warmup_steps or layer.age % every == part

    def observe(self, layer: Layer, x: Tensor, g: Tensor, base_output: Tensor | None) -> None:
        """One backward's rows: x (..., n), g and base_output (..., m) with any leading shape."""
        if self.wanted(layer):
            sequences = x[..., 0, 0].numel() if x.dim() > 2 else len(x)
            base = None if base_output is None else base_output.double().flatten(0, -2)
            x, g = (t.detach().double().flatten(0, -2) for t in (x, g))
            layer.rows.append((x, g, base, sequences))
            layer.observed = True

    def step(self, grads: list[tuple[Tensor, Tensor]], groups: list[Group]) -> None:
        """Moves every layer by φ·f times its direction; grads[i] is layer i's (gradA, gradB)."""
        o, moved = self.settings, []
        for layer, (grad_a, grad_b) in zip(self.layers, grads, strict=True):
            if groups[layer.group].lr == 0:
                layer.rows = []
                continue
            commit(layer, o)
            if grad_a.isfinite().all() and grad_b.isfinite().all():
                if self.wanted(layer) and not layer.observed:
                    commit_proxy(layer, grad_a, grad_b, o)
                sign = -1 if o.maximize else 1
                self._plan(layer, sign * grad_a, sign * grad_b, groups[layer.group].lr)
                moved.append(layer)
        if all(groups[layer.group].lr == 0 for layer in self.layers):
            self.heads.rows = []
        schedules = (min(1.0, groups[i.group].lr / groups[i.group].initial_lr) for i in moved)
        schedule = max(schedules, default=1.0)
        self.kl_phi = self._fisher_ball(moved, schedule)
        decrease = self.kl_phi * sum(layer.f * layer.predicted for layer in moved)
        self.phi = self.kl_phi * self.heads.shrink(decrease, schedule)
        for layer in moved:
            keep = 1 - groups[layer.group].lr * groups[layer.group].weight_decay
            layer.a = keep * layer.a + self.phi * layer.move_a
            layer.b = keep * layer.b + self.phi * layer.move_b
            if layer.age == 0 or (layer.age + 1) % o.balance_every == 0:
                balance(layer, o)
        for layer in self.layers:
            layer.age += groups[layer.group].lr != 0

    def _plan(self, layer: Layer, g_a: Tensor, g_b: Tensor, lr: float) -> None:
        """Momentum and direction (§3), then f: the length by rms or radius and the output ball."""
        o, (omega, big_s) = self.settings, layer.factors(self.settings.sketch_rank)
        eye = torch.eye(len(big_s), dtype=torch.float64)
        layer.updates += 1
        layer.momentum_a = o.beta1 * layer.momentum_a + (1 - o.beta1) * g_a
        layer.momentum_b = o.beta1 * layer.momentum_b + (1 - o.beta1) * g_b
        m_a, m_b = (m / (1 - o.beta1**layer.updates) for m in (layer.momentum_a, layer.momentum_b))
        d_a, d_b = direction(layer, m_a, m_b, o)
        layer.predicted = -float((m_a * d_a).sum() + (m_b * d_b).sum())
        if self.wanted(layer, least=3):
            raw = quartic(layer, *direction(layer, g_a, g_b, o), eye, omega)
            # Right after a restart of the factors the mean is in another metric's units.
            known = layer.rms.mean(o.rms_beta) if layer.input_factor.seen > 1 else 0.0
            layer.rms.add(float(raw[0]), o.rms_beta, known)
        own, rms_square = quartic(layer, d_a, d_b, eye, omega), layer.rms.mean(o.rms_beta)
        square = rms_square if o.step_length == "rms" else float(own[0])
        unit_gain = omega.trace() * len(big_s) / len(omega)
        base_square = unit_gain if layer.base_square.value is None else layer.base_square.value
        radius = lr * float(base_square) ** 0.5
        layer.f = shorten(own, radius / square**0.5, radius**2) if square > 0 else 0.0
        layer.move_a, layer.move_b = layer.f * d_a, layer.f * d_b
        if calm(float(own[0]), rms_square) < 1:
            layer.momentum_a, layer.momentum_b, layer.updates = 0 * m_a, 0 * m_b, 0

    def _fisher_ball(self, moved: list[Layer], schedule: float) -> float:
        """One φ ≤ 1 for all: ½ Σ ‖D_l(φ f_l)‖_M² ≤ kl_radius · (lr / initial lr)² (§4)."""
        total = torch.zeros(3, dtype=torch.float64)
        for layer in moved:
            omega, big_s = layer.factors(self.settings.sketch_rank)
            if not layer.proxied:
                total += 0.5 * quartic(layer, layer.move_a, layer.move_b, big_s, omega)
        self.kl = float(total.sum())
        return shorten(total, 1.0, self.settings.kl_radius * schedule**2)
