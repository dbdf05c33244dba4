"""One view of PEFT's LoRA layers and of `LoRALinear`: where their ranks, scalings and names are."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyctrlora.attach import find_candidates, find_reasons
from pyctrlora.layers import LoRALinear

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PREFIX = re.compile(r"^(base_model\.model\.|module\.|_orig_mod\.)+")
_PEFT_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<half>[AB])(\.(?P<adapter>[^.]+))?\.weight$")
_OWN_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<half>[ab])$")


@dataclass(frozen=True)
class AdapterLayer:
    """The adapter of one layer.

    Attributes:
        path: of the layer in the adapted model, without PEFT's or a wrapper's prefix.
        name: under which `attach` registers it.
        layer: PEFT's layer or a `LoRALinear`.
        adapter: PEFT's name for it; None in a `LoRALinear`.
        reason: why it is no plain linear pair, so that its rank cannot change; "" if it is one.
    """

    path: str
    name: str
    layer: Any
    adapter: str | None
    reason: str = ""

    @property
    def a(self) -> Tensor:
        """(r, in_features) in a plain pair."""
        return self._half("a")

    @property
    def b(self) -> Tensor:
        """(out_features, r) in a plain pair."""
        return self._half("b")

    @property
    def rank(self) -> int:
        """Of the tensors, or of the layer where it is no plain pair."""
        return int(self.layer.r[self.adapter] if self.reason else self.a.shape[0])

    @property
    def scaling(self) -> float:
        """The factor on B·A."""
        return float(
            self.layer.scaling if self.adapter is None else self.layer.scaling[self.adapter]
        )

    @property
    def rslora(self) -> bool:
        """Whether the scaling is alpha / sqrt(r)."""
        return self.adapter is not None and bool(
            getattr(self.layer, "use_rslora", {}).get(self.adapter)
        )

    @property
    def alpha(self) -> float:
        """The alpha that gives this scaling at this rank."""
        return self.alpha_at(self.rank)

    def alpha_at(self, rank: int) -> float:
        """The alpha that gives this scaling at another rank."""
        return whole(self.scaling * (math.sqrt(rank) if self.rslora else rank))

    def active(self) -> Tensor:
        """(r) bool: directions of which the A row or the B column is not zero."""
        a, b = self.a.detach(), self.b.detach()
        found: Tensor = (a != 0).any(1) | (b != 0).any(0)
        return found

    def resize(self, a: Tensor, b: Tensor, scaling: float | None = None) -> None:
        """Gives the same parameters other values of another rank; drops their gradients.

        The parameters keep their identity, so hooks and param_groups stay valid.
        """
        for parameter, value in ((self.a, a), (self.b, b)):
            parameter.grad = None
            parameter.data = value.detach().clone(memory_format=torch.contiguous_format)
        if self.adapter is None:
            self.layer.scaling = self.scaling if scaling is None else scaling
            return
        self.layer.lora_A[self.adapter].out_features = a.shape[0]
        self.layer.lora_B[self.adapter].in_features = a.shape[0]
        if scaling is not None:
            self.layer.scaling[self.adapter] = scaling
        self.layer.r[self.adapter] = a.shape[0]
        self.layer.lora_alpha[self.adapter] = self.alpha

    def _half(self, half: str) -> Tensor:
        if self.adapter is None:
            tensor: Tensor = getattr(self.layer, f"lora_{half}")
        else:
            module = getattr(self.layer, f"lora_{half.upper()}")[self.adapter]
            tensor = getattr(module, "weight", module)
        return tensor


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> list[AdapterLayer]:
    """Every LoRA layer of a model, trainable or not, each once.

    Args:
        model: with PEFT's layers or `LoRALinear`.
        adapter_name: only this adapter of PEFT's layers.
    """
    found = list(find_candidates(model, adapter_name))
    reasons = {
        name: reason
        for name, reason in find_reasons(found).items()
        if "trained alone" not in reason  # frozen adapters have ranks too
    }
    names = {id(module): path for path, module in model.named_modules()}
    layers = [
        AdapterLayer(strip(names[id(c.layer)]), c.name, c.layer, c.adapter, reasons.get(c.name, ""))
        for c in found
        if not c.name.startswith("_orig_mod.")
    ]
    own = ((path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear))
    layers += [AdapterLayer(strip(path), m.name or path, m, None) for path, m in own]
    return layers


def whole(alpha: float) -> float:
    """An int where it is one up to rounding, as users write it."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def strip(path: str) -> str:
    """A module's path without the prefixes of PEFT, DDP and torch.compile."""
    return _PREFIX.sub("", path)


def parse_key(key: str) -> tuple[str, str, str | None] | None:
    """(layer's path, "a" or "b", adapter's name) of a parameter's name; None if it is no half."""
    found = _PEFT_KEY.match(key) or _OWN_KEY.match(key)
    if found is None:
        return None
    groups = found.groupdict()
    return strip(groups["path"]), groups["half"].lower(), groups.get("adapter")


def patterns(
    layers: Sequence[AdapterLayer], ranks: Mapping[str, int]
) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """PEFT's r, lora_alpha, rank_pattern and alpha_pattern for these ranks at constant scalings.

    Args:
        layers: all layers of one adapter.
        ranks: by path.

    Returns:
        The largest rank and its alpha, and anchored exact patterns for the layers that differ.
    """
    first = max(layers, key=lambda layer: ranks[layer.path])
    rank, alpha = ranks[first.path], first.alpha_at(ranks[first.path])
    alphas = {layer.path: layer.alpha_at(ranks[layer.path]) for layer in layers}
    keys = {layer.path: f"^{re.escape(layer.path)}" for layer in layers}
    return (
        rank,
        alpha,
        {keys[path]: ranks[path] for path in alphas if ranks[path] != rank},
        {keys[path]: own for path, own in alphas.items() if own != alpha},
    )


def peft_config(model: nn.Module, adapter: str) -> Any:
    """The config of an adapter, wherever PEFT or transformers keep it; None if nowhere."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            return configs[adapter]
    return None


def write_patterns(config: Any, layers: Sequence[AdapterLayer], ranks: Mapping[str, int]) -> None:
    """Makes a LoraConfig say what `patterns` returns."""
    config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = patterns(layers, ranks)
