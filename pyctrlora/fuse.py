"""PEFT's LoRA layers on the fused node: `fuse` and `unfuse`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyctrlora.attach import find_candidates

if TYPE_CHECKING:
    from torch import nn


def fuse(model: nn.Module) -> list[str]:
    """Lets PEFT's plain linear LoRA layers compute base and adapter in one autograd node, in place.

    Outputs and gradients stay PEFT's, up to rounding; the step is shorter, since the adapter's
    product is added into the base's output and input gradient without passes of its own, and less
    is saved for backward. A layer falls back to PEFT's own forward, call by call, whenever
    something else is asked of it: several active adapters, merged or disabled ones,
    `adapter_names`, dropout while training, a bias in the adapter, DoRA and other variants, a base
    that is trained or has hooks, a float32 adapter over a 16-bit base outside autocast, tracers
    other than torch.compile. Everything else of the layer is PEFT's own: names, saving, merging,
    `set_adapter`. In compiled code the node is an operator: the graph stays whole around it.

    Before or after `attach` makes no difference. Deep and pickled copies are fused as well.

    Args:
        model: holds PEFT's layers; it need not be a `PeftModel`.

    Returns:
        Paths of all fused layers, those of an earlier call included. Others (DoRA on every adapter,
        convolutions, embeddings, quantised bases, a forward that was replaced) are left alone.

    Raises:
        ValueError: the model has no PEFT LoRA layers, or none that can be fused.

    Example:
        >>> import torch, peft, pyctrlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> config = peft.LoraConfig(r=2, target_modules=["0", "1"])
        >>> model = peft.inject_adapter_in_model(config, model)
        >>> pyctrlora.fuse(model)
        ['0', '1']
        >>> pyctrlora.unfuse(model)
    """
    found = {id(c.layer): c.layer for c in find_candidates(model, None)}
    if not found:
        raise ValueError(
            "[pyctrlora.fuse] expected a model with PEFT's LoRA layers; got "
            f"{type(model).__name__}, which has none. Remedy: peft.get_peft_model(model, "
            "LoraConfig(...)) first; the layers of pyctrlora.add_lora are fused from the start."
        )
    from pyctrlora.fused_layer import FusedLinear, why_not  # imports PEFT

    fused, reasons = [], []
    for path, module in model.named_modules():
        if id(module) in found:
            reason = why_not(module)
            if reason:
                reasons.append(f"'{path}' ({reason})")
            else:
                module.__class__ = FusedLinear
                fused.append(path)
    if not fused:
        raise ValueError(
            "[pyctrlora.fuse] expected plain LoRA layers over nn.Linear or Conv1D; got "
            f"{type(model).__name__}, of which no layer is: {', '.join(reasons)}. Remedy: train "
            "it without fuse."
        )
    return fused


def unfuse(model: nn.Module) -> None:
    """Gives every fused layer PEFT's own forward back; does nothing where none is fused.

    Args:
        model: what was given to `fuse`, or a copy.
    """
    if not any(True for _ in find_candidates(model, None)):
        return
    from pyctrlora.fused_layer import FusedLinear

    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = FusedLinear.__base__
