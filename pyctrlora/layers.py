"""LoRA layers of our own: `LoRALinear`, one fused autograd node a layer, and `add_lora`."""

from __future__ import annotations

import math
import re
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, loads dynamo lazily

from pyctrlora import _C, traced
from pyctrlora.observer import lost

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Names under which models keep their output head; PEFT's "all-linear" spares it as well.
HEAD_NAMES = frozenset({"lm_head", "head", "score", "classifier"})


class LoRALinear(nn.Module):
    """y = base(x) + scaling · (x Aᵀ) Bᵀ with a frozen base, observed by any `CTROptimizer`.

    An `nn.Linear` or a transformers `Conv1D` is computed together with the adapter in one autograd
    node. Any other base (a quantised layer, say) computes its own output; its weight is never read.

    Attributes:
        lora_a: (rank, in_features), Kaiming-uniform as in PEFT. float64 for a float64 base, else
            float32: updates of a 16-bit adapter would be lost in rounding.
        lora_b: (out_features, rank), zero: the layer starts as its base.
        scaling: alpha / rank, the factor on B·A.

    Args:
        base: the layer to adapt; its parameters are frozen. `in_features` and `out_features` are
            read from it.
        rank: width of the adapter, at least 1. 16 is PEFT users' most common choice.
        alpha: the step of `CTROptimizer` does not depend on it; 32 is twice the default rank.
        name: the layer's name in messages, `ranks()` and saved state; `add_lora` gives the path.

    Raises:
        TypeError: `base` tells no sizes.
        ValueError: rank or alpha out of range.

    Example:
        >>> layer = LoRALinear(nn.Linear(8, 4), rank=2)
        >>> layer(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
        >>> layer.lora_a.shape, layer.lora_b.shape
        (torch.Size([2, 8]), torch.Size([4, 2]))
    """

    def __init__(
        self, base: nn.Module, rank: int = 16, alpha: float = 32.0, name: str = ""
    ) -> None:
        """See the class."""
        super().__init__()
        _check_rank_and_alpha("LoRALinear", rank, alpha)
        self.out_features, self.in_features = _features(base)
        self.base = base.requires_grad_(False)
        self.name = name
        self.scaling = alpha / rank
        placed = _placement(base)
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **placed))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **placed))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self._register_pair()

    @property
    def rank(self) -> int:
        """Width of the adapter."""
        return self.lora_a.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that look at a layer's dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if traced.is_compiled() and self._has_plain_base():
            transposed = type(self.base) is not nn.Linear
            a, b = self.lora_a, self.lora_b
            return traced.lora_linear(x, self.base, a, b, self.scaling, self._handle, transposed)
        return self._forward(x)

    @_disable_dynamo  # compiled models break their graph here
    def _forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_a, self.lora_b
        if self._registered[0] is not a or self._registered[1] is not b:
            lost[self._registered[0]] = "got new parameters (load_state_dict with assign, say)"
            self._register_pair()
        if self._has_plain_base():
            transposed = type(self.base) is not nn.Linear
            weight, bias = self.weight, self.bias
            return _C.lora_linear(x, weight, bias, a, b, self.scaling, self._slot, transposed)
        return _C.lora_delta(x, self.base(x), a, b, self.scaling, self._slot)

    def _has_plain_base(self) -> bool:
        """Whether base and adapter can be one node, which gives the base no gradient."""
        base = self.base
        if type(base) is not nn.Linear and not is_conv1d(base):
            return False
        weight, bias = self.weight, self.bias
        return not (weight.requires_grad or (bias is not None and bias.requires_grad))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"rank={self.rank}, scaling={self.scaling:g}"

    def _register_pair(self) -> None:
        pair = _C.LoraPair(self.lora_a, self.lora_b, self.scaling, self.name)
        self._slot = _C.register_pair(pair)
        self._handle = self._slot.handle
        self._registered = (self.lora_a, self.lora_b)

    def __getstate__(self) -> dict[str, Any]:
        """Without the slot, which belongs to these very tensors."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_slot", "_registered")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy registers its own pair."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register_pair()


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    targets: str | Sequence[str] = "all-linear",
) -> nn.Module:
    """Replaces linear layers by `LoRALinear`, in place, and freezes all other parameters.

    Args:
        model: any module that holds `nn.Linear` or transformers `Conv1D` layers. Layers inside
            PEFT's or our own LoRA layers, or inside `nn.MultiheadAttention` (which never calls
            them), are left alone.
        rank: width of each adapter; see `LoRALinear`.
        alpha: scaling is alpha / rank; the training does not depend on it.
        targets: "all-linear" means every linear layer but the output head: the module returned by
            `get_output_embeddings()` if there is one, else every layer of which the first or last
            part of the path is lm_head, head, score or classifier. Otherwise a regular expression
            for the whole path, or a list of path endings ("q_proj") and such expressions.

    Returns:
        The model, for chaining. The head is frozen as well: unfreeze what else is to be trained,
        e.g. `model.classifier.requires_grad_(True)`; `CTROptimizer` trains it by AdamW.

    Raises:
        ValueError: nothing matches a target, or rank or alpha are out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
        >>> _ = add_lora(model, rank=2, targets=["0"])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_a', '0.lora_b']
    """
    _check_rank_and_alpha("add_lora", rank, alpha)
    linears = dict(_linears(model))
    chosen = _select(model, linears, targets)
    model.requires_grad_(False)
    replaced: dict[int, LoRALinear] = {}  # a layer used under two paths gets one adapter
    for path in chosen:
        base = linears[path]
        if id(base) not in replaced:
            replaced[id(base)] = LoRALinear(base, rank, alpha, path)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, replaced[id(base)])
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_a.requires_grad_(True)
            module.lora_b.requires_grad_(True)
    return model


def _check_rank_and_alpha(where: str, rank: int, alpha: float) -> None:
    if rank < 1 or rank != int(rank):
        raise ValueError(
            f"[pyctrlora.{where}] rank = {rank}. Violated constraint: a whole number >= 1."
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"[pyctrlora.{where}] alpha = {alpha}. Violated constraint: alpha > 0.")


def is_conv1d(module: nn.Module) -> bool:
    """Conv1D of transformers, which is not imported for this; its weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _features(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer, without reading its weight."""
    if is_conv1d(base):
        return int(base.nf), int(base.nx)  # type: ignore[arg-type]
    try:
        return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
    except AttributeError:
        raise TypeError(
            "[pyctrlora.LoRALinear] expected a base layer with in_features and out_features; got "
            f"{type(base).__name__}. Remedy: adapt nn.Linear, Conv1D or a quantised linear layer."
        ) from None


def _placement(base: nn.Module) -> dict[str, Any]:
    """Device and dtype of the adapter: the base's device; float64 or float32."""
    tensors = list(chain(base.parameters(), base.buffers()))
    wide = any(t.dtype is torch.float64 for t in tensors)
    return {
        "device": tensors[0].device if tensors else None,
        "dtype": torch.float64 if wide else torch.float32,
    }


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every replaceable layer by path; a layer used under several paths comes once for each."""
    closed = [
        f"{path}." if path else ""
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALinear | nn.MultiheadAttention) or hasattr(module, "lora_A")
    ]
    for path, module in model.named_modules(remove_duplicate=False):
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if path and linear and not any(path.startswith(prefix) for prefix in closed):
            yield path, module


def _select(
    model: nn.Module, linears: dict[str, nn.Module], targets: str | Sequence[str]
) -> list[str]:
    if targets == "all-linear":
        chosen = [path for path, layer in linears.items() if not _is_head(model, path, layer)]
        if not chosen:
            raise ValueError(
                "[pyctrlora.add_lora] expected a model with linear layers besides its head; got "
                f"{type(model).__name__} with {list(linears)}. Remedy: name them in targets, or "
                "wrap a single layer: LoRALinear(layer)."
            )
        return chosen
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for target in wanted:
        if not any(_matches(path, target) for path in linears):
            raise ValueError(
                f"[pyctrlora.add_lora] expected targets that match linear layers; got {target!r}, "
                f"which matches none of {_shorten(list(linears))}. Remedy: give the end of a path "
                "or a regular expression for all of it."
            )
    return [path for path in linears if any(_matches(path, target) for target in wanted)]


def _matches(path: str, target: str) -> bool:
    return f".{path}".endswith(f".{target}") or re.fullmatch(target, path) is not None


def _is_head(model: nn.Module, path: str, layer: nn.Module) -> bool:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is not None:
        return head is layer
    parts = path.split(".")
    return parts[0] in HEAD_NAMES or parts[-1] in HEAD_NAMES


def _shorten(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
