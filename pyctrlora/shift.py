"""Which base weights `cg_init(mode="shift")` may change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pyctrlora.layers import LoRALinear, is_conv1d

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyctrlora import _C


def plain_bases(model: nn.Module, pairs: Sequence[_C.LoraPair]) -> list[tuple[Tensor, bool]]:
    """The base weight of each pair and whether it is (in, out), for mode "shift".

    No other mode looks at a base's weight.

    Raises:
        ValueError: a base has no plain floating-point weight.
    """
    bases = dict(_bases(model))
    return [_plain_weight(pair.name, bases[id(pair.a)]) for pair in pairs]


def _bases(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Of each layer: id of lora_A's weight, and the base."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            yield id(module.lora_a), module.base
        elif isinstance(halves := getattr(module, "lora_A", None), nn.ModuleDict):
            for half in halves.values():
                base: Any = module.base_layer
                yield id(half.weight), base


def _plain_weight(name: str, base: nn.Module) -> tuple[Tensor, bool]:
    transposed = is_conv1d(base)
    if type(base) is nn.Linear or transposed:
        weight: Any = base.weight
        if type(weight) in (nn.Parameter, Tensor) and weight.dtype.itemsize >= 2:
            return weight, transposed
    raise ValueError(
        f"[pyctrlora.cg_init] mode 'shift' changes base weights; layer '{name}' has a "
        f"{type(base).__name__} as base, whose weight is not a plain floating-point matrix "
        "(quantised?): rounding it again would change more than the shift. Remedy: "
        "mode='no_shift' or 'zero_b'."
    )
