"""The fused layer as compilers see it: one opaque operator, in which rows are observed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_compiled() -> bool:
    """Whether torch.compile traces this call; exported programs must run without us."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def lora_linear(
    x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scaling: float, handle: int, transposed: bool
) -> Tensor:
    """base(x) + scaling · (x Aᵀ) Bᵀ as an operator with a known shape, for graphs of torch.compile.

    Rows are observed when the compiled code runs, on the steps on which the slot of that number
    wants them, and never at compile time.

    Args:
        x: (..., in_features).
        base: `nn.Linear` or Conv1D, frozen.
        a: (rank, in_features), cast to x's dtype if it differs.
        b: (out_features, rank), likewise.
        scaling: factor on b @ a.
        handle: `ObservationSlot.handle`; 0 observes nothing.
        transposed: whether the weight is (in_features, out_features), as Conv1D's.
    """
    watched = handle if torch.is_grad_enabled() else 0  # nobody completes what has no backward
    weight: Any = base.weight
    y: Tensor = torch.ops.ctrlora.lora_linear(
        x, weight, base.bias, a, b, scaling, watched, transposed
    )[0]
    return y
