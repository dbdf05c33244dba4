"""Heads that are trained along: full linear layers behind the last adapter, and their observers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyctrlora import _C
from pyctrlora.layers import LoRALinear
from pyctrlora.traced import is_compiled

if TYPE_CHECKING:
    from collections.abc import Iterator

_ATTRIBUTE = "_ctrlora_head"  # where a head keeps its observer


def find_heads(model: nn.Module) -> list[nn.Linear]:
    """The trained linear layers that come, in the order of registration, after the last adapter.

    One whose outputs a later one takes (a classifier of two layers) is no head: those of the last
    are what the loss sees. Several heads side by side count together.

    Example:
        >>> from pyctrlora import add_lora
        >>> model = add_lora(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> model.extend([nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)])[-1] in find_heads(model)
        True
        >>> len(find_heads(model))
        1
    """
    found: list[nn.Linear] = []
    for module, adapted in _linears(model):
        if adapted:
            found = []
        elif module.weight.requires_grad:
            found.append(module)
    widths = [head.in_features for head in found]
    return [head for i, head in enumerate(found) if head.out_features not in widths[i + 1 :]]


def _linears(model: nn.Module) -> Iterator[tuple[Any, bool]]:
    """Linear layers in order, and whether they carry an adapter; halves of adapters are none."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, LoRALinear) or hasattr(module, "lora_A"):
            inside = (f"{name}.",)
            yield module, True
        elif isinstance(module, nn.Linear):
            yield module, False


class HeadObserver:
    """A forward hook that hands outputs and their gradient to the engine.

    A deep or pickled copy of the model gets a blind one, since the slot belongs to the original's
    weight; attaching the copy gives it its own.
    """

    def __init__(self, head: nn.Linear) -> None:
        """Registers the weight and installs the hook."""
        self.slot: _C.HeadSlot | None = _C.register_head(head.weight)
        self.number = self.slot.handle  # for compiled code
        self.handle = head.register_forward_hook(self.see)
        setattr(head, _ATTRIBUTE, self)

    def see(self, _head: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """After the head: its outputs wait for their gradient; compiled code has an operator."""
        if not (args and torch.is_grad_enabled() and isinstance(output, Tensor)):
            return None
        if is_compiled():
            watched: Tensor = torch.ops.ctrlora.watch_head(output, args[0], self.number)
            return watched
        capture = self._capture(args[0], output) if output.requires_grad else None
        if capture is not None:
            hook: Any = output.register_hook
            hook(capture.complete)
        return None

    def _capture(self, x: Tensor, output: Tensor) -> _C.HeadCapture | None:
        return None if self.slot is None else self.slot.capture(x, output)

    def forget(self, head: nn.Linear) -> None:
        """Removes the hook."""
        self.handle.remove()
        self.slot, self.number = None, 0
        _C.unregister_head(head.weight)
        head.__dict__.pop(_ATTRIBUTE, None)

    def __getstate__(self) -> dict[str, Any]:
        """The hook only."""
        return {"slot": None, "number": 0, "handle": self.handle}


def watch_heads(model: nn.Module) -> list[tuple[HeadObserver, nn.Linear]]:
    """Observes the model's heads; those that were not observed already are returned."""
    new = []
    for head in find_heads(model):
        observer = head.__dict__.get(_ATTRIBUTE)
        if observer is None or observer.slot is None or _C.find_head(head.weight) is None:
            if observer is not None:
                observer.handle.remove()
            new.append((HeadObserver(head), head))
    return new
