"""What a step learns from `torch.amp.GradScaler`: loss scale, overflow, gradients to unscale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pyctrlora.roster import Roster


def settle_scale(roster: Roster, optimizer: Any, params: list[Tensor]) -> bool:
    """Tells the engine the scale of the loss; unscales the gradients if the scaler left that to us.

    An option `loss_scale` is followed as it is. Without it the optimizer says to support scaling
    (`_step_supports_amp_scaling`), and `GradScaler.step` sets two attributes on it: `grad_scale`,
    None if `unscale_` was called before, and `found_inf`.

    Args:
        roster: of the optimizer.
        optimizer: on which the scaler sets its attributes.
        params: its parameters.

    Returns:
        Whether the step is to be taken: False after an overflow, whose rows are forgotten.

    Raises:
        ValueError: gradients were unscaled already, and nobody said by how much.
    """
    given = roster.config.get("loss_scale")
    if given is not None:
        if callable(given):
            roster.engine.set_loss_scale(given())
        return True
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None:  # no scaler
        roster.engine.set_loss_scale(1.0)
        return True
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        raise ValueError(
            "[pyctrlora.CTROptimizer] expected the loss scale, since what is observed in backward "
            "carries it; got gradients that GradScaler.unscale_ has unscaled already (for "
            "clipping), after which the scaler does not tell. Nothing was changed. Remedy: "
            "CTROptimizer(..., loss_scale=scaler.get_scale), or opt.follow_loss_scale("
            "scaler.get_scale) before the first step."
        )
    if found_inf.item():
        roster.engine.drop_observations()
        return False
    _unscale(params, scale)
    roster.engine.set_loss_scale(scale.item())
    return True


def _unscale(params: list[Tensor], scale: Tensor) -> None:
    """As `GradScaler.unscale_`, by the same operator on the same reciprocal."""
    grads: dict[Any, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            grads.setdefault((p.grad.device, p.grad.dtype), []).append(p.grad)
    inverse = scale.double().reciprocal().float()
    for (device, _), own in grads.items():
        found = torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(own, found, inverse.to(device))
