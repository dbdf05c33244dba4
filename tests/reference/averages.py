"""Running averages of the reference: cpp/README.md, sections 2 (Commit) and 6 (Spikes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def calm(size: float, mean: float) -> float:
    """§6 Spikes: the factor that brings a sample of that size down to 25 times the mean."""
    return 25 * mean / size if 0 < 25 * mean < size else 1.0


@dataclass
class Average:
    """§2 Commit: a plain mean of what was seen first, then an EMA; nothing is initialised."""

    seen: int = 0
    value: Any = None

    def add(self, new: Tensor, beta: float) -> None:
        self.seen += 1
        b = min(beta, 1 - 1 / self.seen)
        if self.seen > 1:
            new = new * calm(*(float(t.trace() if t.dim() else t) for t in (new, self.value)))
        self.value = new if self.value is None else b * self.value + (1 - b) * new


@dataclass
class Debiased:
    """A bias-corrected EMA of a number."""

    biased: float = 0.0
    seen: int = 0

    def mean(self, beta: float) -> float:
        return self.biased / max(1 - beta**self.seen, 1e-300)

    def add(self, sample: float, beta: float, known: float) -> None:
        """`known`: the mean that tells a spike, 0 for none."""
        self.seen += 1
        self.biased = beta * self.biased + (1 - beta) * sample * calm(sample, known)
