"""PEFT's linear LoRA layer as one autograd node. Importing this module imports PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyctrlora import _C, traced
from pyctrlora.layers import is_conv1d
from pyctrlora.observer import LayerObserver, observer_of


class FusedLinear(Linear):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's layer with base and adapter in one node wherever that computes the same.

    Only the forward differs. A layer becomes one by its class, not by a new object or an attribute,
    so that whatever PEFT, pickle or a deep copy does with it goes on as before.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features); PEFT's own forward unless all is plain."""
        adapter = self.fuses(x, *args, **kwargs)
        if adapter is None:
            unfused: Tensor = super().forward(x, *args, **kwargs)
            return unfused
        base, observer = self.base_layer, observer_of(self)
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        scaling, transposed = self.scaling[adapter], type(base) is not nn.Linear
        if traced.is_compiled():
            handle = 0 if observer is None else observer.numbers.get(adapter, 0)
            return traced.lora_linear(x, base, a, b, scaling, handle, transposed)
        slot: Any = None if observer is None else observer.slot_to_capture(self, adapter)
        return _C.lora_linear(x, base.weight, base.bias, a, b, scaling, slot, transposed)

    def fuses(self, x: Any, *args: Any, **kwargs: Any) -> str | None:
        """The adapter that this call computes in one node; None: by PEFT's own forward."""
        return None if args or kwargs or _is_transformed() else self._adapter_to_fuse(x)

    def _adapter_to_fuse(self, x: Any) -> str | None:
        """The one adapter that acts on these inputs; None where PEFT's forward must run."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged:
            return None
        (name,) = active
        base, down, up = self.base_layer, self.lora_A[name], self.lora_B[name]
        plain = (
            name not in self.lora_variant
            and isinstance(self.scaling[name], int | float)  # hot-swapping makes it a tensor
            and _passes(self.lora_dropout[name])
            and all(type(half) is nn.Linear and half.bias is None for half in (down, up))
            and _is_plain_base(base)
            and _is_bare(base, observer_of(self))
            and _is_bare(down)
            and _is_bare(up)
            and _fits(x, base, down.weight, up.weight)
        )
        return name if plain else None


def why_not(layer: nn.Module) -> str:
    """Why PEFT's layer can never be fused; empty if it can."""
    if type(layer) not in (Linear, FusedLinear):
        return f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    if not _is_plain_base(layer.base_layer):
        return f"base {type(layer.base_layer).__name__}"
    adapters: Any = layer.lora_A
    variants: Any = layer.lora_variant
    if all(name in variants for name in adapters):
        return ", ".join({type(variant).__name__ for variant in variants.values()})
    return ""


def _is_transformed() -> bool:
    """Whether somebody else's machinery reads or transforms the operators: it gets PEFT's own."""
    if traced.is_compiled():
        return False
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]  # of torch
    )


def _is_plain_base(base: Any) -> bool:
    return type(base) is nn.Linear or is_conv1d(base)


def _is_bare(module: nn.Module, observer: LayerObserver | None = None) -> bool:
    """Whether to call the module is to call its class's forward; its observer does not count."""
    own = None if observer is None else observer.base_hook
    return not (
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(key != own for key in module._forward_hooks)
    )


def _passes(dropout: nn.Module) -> bool:
    if type(dropout) is nn.Dropout:
        return dropout.p == 0 or not dropout.training
    return type(dropout) is nn.Identity


def _fits(x: Any, base: Any, a: Tensor, b: Tensor) -> bool:
    """Whether the node computes in the dtype in which PEFT would, on a frozen base."""
    weight, bias = base.weight, base.bias
    tensors = [t for t in (x, weight, bias, a, b) if t is not None]
    if not all(type(t) in (Tensor, nn.Parameter) for t in tensors):
        return False  # subclasses: quantised, sharded, faked
    if any(isinstance(t, Tensor) and t.requires_grad for t in (weight, bias)):
        return False
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1:
        return next(iter(dtypes)).is_floating_point
    # A 16-bit base under a float32 adapter: PEFT computes the adapter in float32. Under autocast
    # both of us compute in its dtype, float64 excepted, which autocast leaves alone.
    narrow = all(d.is_floating_point and d is not torch.float64 for d in dtypes)
    return narrow and torch.is_autocast_enabled(x.device.type)
