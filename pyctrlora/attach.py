"""Find the LoRA pairs of a model, register them, and observe their layers."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pyctrlora import _C
from pyctrlora.heads import HeadObserver, watch_heads
from pyctrlora.layers import LoRALinear
from pyctrlora.observer import LayerObserver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

# Why a tensor that looks like half a pair is none: keeps the optimizer from pairing it by name.
_reasons: Any = WeakTensorKeyDictionary()


def attach(model: nn.Module, adapter_name: str | None = None) -> Attachment:
    """Registers the trainable LoRA pairs of a model and observes their layers.

    PEFT's layers are found by their shape, not their type: any module whose `lora_A` and `lora_B`
    map adapter names to linear layers, in any `nn.Module`. The base layer's weight is never read,
    so quantised bases work. Our own `LoRALinear` layers register and observe themselves and are
    listed. What is no plain pair (DoRA and other variants, MoE parameter wrappers, convolutions,
    embeddings, `nn.MultiheadAttention`, tied adapters) is named once in a warning; `CTROptimizer`
    trains it by AdamW.

    Full linear layers that are trained behind the last adapter (a fresh head) are observed too: a
    step must not change their outputs by more than the option `head_radius`, and their own
    steps are as long as `head_step` says.

    Observation costs nothing on the steps on which no optimizer asks for it, is counted once per
    backward under both modes of activation checkpointing, and ignores passes without gradient,
    with disabled adapters or with merged ones. Attaching twice does no harm. After `set_adapter`,
    `add_adapter` or whatever makes new parameters, attach again and build a new optimizer.

    Args:
        model: holds the layers; it need not be a `PeftModel`.
        adapter_name: only pairs of this adapter; default: every trainable one.

    Returns:
        An `Attachment` with the pairs found; keep it only to detach.

    Raises:
        ValueError: the model has no LoRA layers, or none of them is trainable.

    Example:
        >>> from pyctrlora import add_lora
        >>> model = add_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), rank=2)
        >>> [pair.name for pair in attach(model).pairs]
        ['0', '1']
    """
    own = [m for m in model.modules() if isinstance(m, LoRALinear) and m.lora_a.requires_grad]
    found = list(find_candidates(model, adapter_name))
    trainable = [c for c in found if c.a.requires_grad or c.b.requires_grad]
    if not own and not trainable:
        raise ValueError(_nothing(model, found, adapter_name))
    skipped = find_reasons(trainable)
    _warn_once(trainable, skipped)
    attachment = Attachment(skipped)
    for candidate in trainable:
        if candidate.name not in skipped:
            attachment._add(candidate)
    for layer in own:
        pair = _C.find_pair(layer.lora_a)
        if pair is not None:
            attachment.pairs.append(pair)
    attachment._heads += watch_heads(model)
    return attachment


class Attachment:
    """What `attach` found. As a context manager it detaches at the end of the block.

    Attributes:
        pairs: the registered pairs (`a`, `b`, `scaling`, `name`).
        skipped: name of each LoRA layer that is no plain pair, and why.
    """

    def __init__(self, skipped: dict[str, str]) -> None:
        """Nothing registered yet."""
        self.pairs: list[_C.LoraPair] = []
        self.skipped = skipped
        self._observed: list[tuple[LayerObserver, str, _C.ObservationSlot, Tensor]] = []
        self._heads: list[tuple[HeadObserver, nn.Linear]] = []

    def detach(self) -> None:
        """Removes what this attachment installed; an optimizer keeps the curvature it has seen.

        Layers that were attached before, and `LoRALinear` layers, stay observed. After attaching
        again, build a new optimizer.
        """
        for observer, adapter, slot, a in self._observed:
            if observer.forget(adapter, slot):
                _C.unregister_pair(a)
        self._observed.clear()
        for head_observer, head in self._heads:
            head_observer.forget(head)
        self._heads.clear()

    def __enter__(self) -> Attachment:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Detaches."""
        self.detach()

    def __repr__(self) -> str:
        """How many of each."""
        return f"Attachment({len(self.pairs)} pairs, {len(self.skipped)} skipped)"

    def _add(self, found: _Candidate) -> None:
        scaling = float(found.layer.scaling[found.adapter])  # type: ignore[index]
        pair = _C.LoraPair(found.a, found.b, scaling, found.name)
        slot = _C.register_pair(pair)
        self.pairs.append(pair)
        for half in (found.a, found.b):
            _reasons.pop(half, None)
        observer = LayerObserver.of(found.layer)
        if observer.watch(found.layer, found.adapter, slot, found.a):
            self._observed.append((observer, found.adapter, slot, found.a))


def skip_reason(tensor: Tensor) -> str | None:
    """Why `attach` left out the layer of this tensor, as "'name' (reason)"; None if it did not."""
    reason: str | None = _reasons.get(tensor)
    return reason


@dataclass(frozen=True)
class _Candidate:
    """What looks like the adapter of one layer."""

    name: str
    layer: nn.Module
    adapter: str
    a: Tensor
    b: Tensor
    parent: nn.Module | None


def find_candidates(model: nn.Module, adapter_name: str | None) -> Iterator[_Candidate]:
    """Every adapter of every PEFT layer, or those of one name."""
    modules = dict(model.named_modules())
    for path, layer in modules.items():
        parent = modules.get(path.rpartition(".")[0])
        for kind in ("lora_{}", "lora_embedding_{}"):
            first, second = (getattr(layer, kind.format(half), None) for half in "AB")
            if not isinstance(first, nn.ModuleDict | nn.ParameterDict) or second is None:
                continue
            for adapter in first:
                if adapter_name in (None, adapter) and adapter in second:
                    a, b = _weight(first[adapter]), _weight(second[adapter])
                    name = path if adapter == "default" else f"{path}.{adapter}"
                    yield _Candidate(name, layer, adapter, a, b, parent)


def _weight(half: Any) -> Tensor:
    """Of a linear layer or the like; an embedding's half is the parameter itself."""
    weight: Tensor = getattr(half, "weight", half)
    return weight


def find_reasons(candidates: list[_Candidate]) -> dict[str, str]:
    """By name, why those that cannot be trained with curvature cannot."""
    # By storage, not identity: PEFT ties by a new Parameter over the old one's data.
    uses = Counter(_storage(half) for c in candidates for half in (c.a, c.b))
    reasons = {c.name: _reason(c, max(uses[_storage(h)] for h in (c.a, c.b))) for c in candidates}
    return {name: reason for name, reason in reasons.items() if reason}


def _storage(tensor: Tensor) -> int:
    return tensor.data_ptr() or id(tensor)


def _reason(c: _Candidate, uses: int) -> str:
    """Why a candidate is no plain pair; empty if it is one."""
    variant = getattr(c.layer, "lora_variant", {}).get(c.adapter)
    base = getattr(c.layer, "base_layer", None)
    if variant is not None:
        return type(variant).__name__
    if hasattr(c.layer, "parameter_name"):
        return "adapts a bare parameter, whose inputs nobody sees"
    if hasattr(c.layer, "lora_E"):
        return "AdaLoRA"
    if isinstance(base, nn.MultiheadAttention) or isinstance(c.parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention merges its adapter before each forward"
    if c.adapter in getattr(c.layer, "lora_embedding_A", {}):
        return "embedding"
    if c.a.dim() != 2 or c.b.dim() != 2:
        return "convolution"
    if uses > 1:
        return "tied to another layer's adapter"
    if not (c.a.requires_grad and c.b.requires_grad):
        return f"lora_{'B' if c.b.requires_grad else 'A'} is trained alone"
    return ""


def _warn_once(candidates: list[_Candidate], skipped: dict[str, str]) -> None:
    news = []
    for c in candidates:
        if c.name not in skipped:
            continue
        text = f"'{c.name}' ({skipped[c.name]})"
        if c.a not in _reasons:
            news.append(text)
        _reasons[c.a] = _reasons[c.b] = text
    if news:
        warnings.warn(
            f"[pyctrlora.attach] {len(news)} LoRA layers are no plain linear pairs and will be "
            f"trained by AdamW: {', '.join(news)}.",
            UserWarning,
            stacklevel=3,
        )


def _nothing(model: nn.Module, found: list[_Candidate], adapter_name: str | None) -> str:
    kind = type(model).__name__
    which = "" if adapter_name is None else f" of adapter {adapter_name!r}"
    if found:
        return (
            f"[pyctrlora.attach] expected trainable LoRA layers{which}; got {kind}, in which all "
            f"{len(found)} are frozen. Remedy: model.set_adapter(name), or load the adapter with "
            "is_trainable=True."
        )
    return (
        f"[pyctrlora.attach] expected a model with LoRA layers{which}; got {kind}, which has none. "
        "Remedy: peft.get_peft_model(model, LoraConfig(...)) or pyctrlora.add_lora(model) first."
    )
