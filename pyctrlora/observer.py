"""Hooks that watch one PEFT LoRA layer for the engine."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, loads dynamo lazily
from torch.utils.weak import WeakTensorKeyDictionary

from pyctrlora.traced import is_compiled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pyctrlora import _C

_ATTRIBUTE = "_ctrlora_observer"  # where a LoRA layer keeps its observer

# Parameters (first halves) that were seen to have left their layer, and how. An optimizer that
# holds one would train it for nothing.
lost: Any = WeakTensorKeyDictionary()


class LayerObserver:
    """Two forward hooks: the base layer's samples rows, the LoRA layer's waits for the gradient.

    The rows are sampled where the base's output is at hand, before anything can write to it;
    nothing but samples is kept. A deep or pickled copy of the model gets a blind observer, since
    the slots belong to the original's tensors; attaching the copy gives it its own.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Installs the hooks."""
        self.slots: dict[str, _C.ObservationSlot] = {}
        self.numbers: dict[str, int] = {}  # their handles, for compiled code
        self.first: dict[str, weakref.ref[Tensor]] = {}
        self.captures: list[_C.Capture] = []
        self.bypassed: frozenset[str] = frozenset()  # adapters whose base runs alone
        self.layer = weakref.ref(layer)
        base: nn.Module = layer.base_layer  # type: ignore[assignment]
        self.handles = [
            base.register_forward_hook(self.see_base),
            layer.register_forward_hook(self.see_output, with_kwargs=True),
        ]
        self.base_hook: int = self.handles[0].id

    @classmethod
    def of(cls, layer: nn.Module) -> LayerObserver:
        """The observer of a LoRA layer, installed if it has none."""
        observer = observer_of(layer)
        if observer is None:
            observer = cls(layer)
            setattr(layer, _ATTRIBUTE, observer)
        return observer

    def watch(self, layer: nn.Module, adapter: str, slot: _C.ObservationSlot, a: Tensor) -> bool:
        """Observes one more adapter, whose first half is `a`; False if it was observed already."""
        new = self.slots.get(adapter) is not slot
        self.layer = weakref.ref(layer)
        self.slots[adapter] = slot
        self.numbers[adapter] = slot.handle
        self.first[adapter] = weakref.ref(a)
        return new

    def forget(self, adapter: str, slot: _C.ObservationSlot) -> bool:
        """Stops observing an adapter, if still by this slot; without any the hooks are removed."""
        if self.slots.get(adapter) is not slot:
            return False
        del self.slots[adapter], self.numbers[adapter]
        layer = self.layer()
        if not self.slots and layer is not None:
            for handle in self.handles:
                handle.remove()
            layer.__dict__.pop(_ATTRIBUTE, None)
        return True

    @_disable_dynamo  # compiled models break their graph here
    def see_base(self, _base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the base layer: samples rows for every adapter that is on and wanted."""
        self.captures = []
        if not (args and torch.is_grad_enabled() and isinstance(output, Tensor)):
            return
        layer = self.layer()
        wanted = self._wanted(layer)
        if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
            return
        active = getattr(layer, "active_adapters", wanted)
        for name in wanted:
            if name in active or name in self.bypassed:
                capture = self.slots[name].capture(args[0], output)
                if capture is not None:
                    self.captures.append(capture)

    def slot_to_capture(self, layer: nn.Module, adapter: str) -> _C.ObservationSlot | None:
        """For a fused node, which captures by itself instead of the hooks; None: nothing wanted."""
        self.captures = []
        if not torch.is_grad_enabled():
            return None
        return self.slots[adapter] if adapter in self._wanted(layer) else None

    def _wanted(self, layer: nn.Module | None) -> list[str]:
        names = [name for name, slot in self.slots.items() if slot.wanted]
        return [name for name in names if self._is_current(layer, name)]

    def _is_current(self, layer: nn.Module | None, adapter: str) -> bool:
        """Whether the layer still has the parameters that were attached; if not, they are lost."""
        a = self.first[adapter]()
        halves: Any = getattr(layer, "lora_A", {})
        if layer is None:
            how = "was merged or unloaded"
        elif adapter not in halves:
            how = "was deleted"
        elif halves[adapter].weight is not a:
            how = "got new parameters (update_layer and the like)"
        else:
            return True
        if a is not None:
            lost[a] = how
        del self.slots[adapter], self.numbers[adapter]
        return False

    def see_output(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """After the LoRA layer: waits for the gradient of its output."""
        if is_compiled() and hasattr(layer, "fuses") and layer.fuses(*args, **kwargs):
            return None  # the operator observes by itself
        return self._wait(kwargs, output)

    @_disable_dynamo
    def _wait(self, kwargs: dict[str, Any], output: Any) -> Tensor | None:
        captures, self.captures = self.captures, []
        # With adapter_names each adapter sees only some of the rows.
        mixed = bool(captures) and kwargs.get("adapter_names") is not None
        if not captures or mixed or not isinstance(output, Tensor):
            return None
        anchored = None
        if self.bypassed and not output.requires_grad:
            # No adapter, so nothing before asks for a gradient. A sum, not requires_grad_(): the
            # model may write to it, which leaves forbid.
            anchored = output = output + output.new_zeros((), requires_grad=True)
        if output.requires_grad:
            for capture in captures:
                output.register_hook(capture.complete)
        return anchored

    def __getstate__(self) -> dict[str, Any]:
        """The hooks only."""
        return {"handles": self.handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A blind observer."""
        self.slots = {}
        self.numbers = {}
        self.first = {}
        self.captures = []
        self.bypassed = frozenset()
        self.layer = weakref.ref(nn.Module())  # dead
        self.handles = state["handles"]
        self.base_hook = self.handles[0].id


def observer_of(layer: nn.Module) -> LayerObserver | None:
    """The observer of a LoRA layer, if it has one."""
    if is_compiled():  # where a missing attribute is guarded, a missing key is not
        return getattr(layer, _ATTRIBUTE, None)
    observer: LayerObserver | None = layer.__dict__.get(_ATTRIBUTE)
    return observer


@contextmanager
def bases_alone(model: nn.Module, first_halves: Iterable[Tensor]) -> Iterator[None]:
    """Inside, PEFT's layers of these adapters run without them, observed as ever.

    For adapters that add nothing (B = 0): the same numbers, without their passes over activations.
    """
    wanted = {id(a) for a in first_halves}
    before: list[tuple[Any, LayerObserver, Any]] = []
    try:
        layer: Any
        for layer in model.modules():
            observer = observer_of(layer)
            active = getattr(layer, "_active_adapter", None)
            if observer is None or active is None:
                continue
            names = [active] if isinstance(active, str) else list(active)
            halves = {name: a() for name, a in observer.first.items()}
            own = {name for name in names if id(halves.get(name)) in wanted}
            before.append((layer, observer, active))
            layer._active_adapter = [name for name in names if name not in own]
            observer.bypassed = frozenset(own)
        yield
    finally:
        for layer, observer, active in before:
            layer._active_adapter = active
            observer.bypassed = frozenset()
