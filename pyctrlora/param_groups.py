"""Parameter groups of `CTROptimizer`: their numbers, checked, and as the engine reads them."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

from pyctrlora import _C

_WHERE = "[pyctrlora.CTROptimizer]"
VERSION = 1  # of our section in state_dict()
# A fallback group's key, and where its value comes from in the user's group or the constructor.
FALLBACK = {
    "lr": "fallback_lr",
    "betas": "fallback_betas",
    "eps": "fallback_eps",
    "weight_decay": "fallback_weight_decay",
}


def as_groups(params: Any) -> list[Any]:
    """The constructor's `params` as a list that is not empty.

    Raises:
        TypeError: a single tensor.
        ValueError: nothing in it.
    """
    if isinstance(params, Tensor):
        raise TypeError(
            f"{_WHERE} expected an iterable of tensors or dicts; got one tensor. Remedy: [tensor]."
        )
    groups = list(params)
    if not groups:
        raise ValueError(
            f"{_WHERE} expected at least one parameter; got an empty list. Remedy: pass "
            "model.parameters(); a generator can be read only once."
        )
    return groups


def params_of(group: dict[str, Any]) -> Any:
    """A group's tensors, together with `param_names` if it has them.

    Raises:
        TypeError: not a dict with `params`.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(
            f"{_WHERE} expected a dict with 'params'; got {type(group).__name__}. Remedy: "
            "{'params': [...], 'lr': ...}."
        )
    if "param_names" in group:
        return list(zip(group["param_names"], group["params"], strict=True))
    return group["params"]


def check_numbers(group: dict[str, Any]) -> None:
    """Checks whichever of the constructor's numbers a group holds.

    Raises:
        ValueError: naming the setting, its value and the rule.
        TypeError: no number.
    """
    for name in ("lr", "fallback_lr", "weight_decay", "fallback_weight_decay", "fallback_eps"):
        if name in group:
            check_rate(name, group[name])
    if "fallback_betas" in group:
        check_betas("fallback_betas", group["fallback_betas"])


def check_rate(name: str, value: Any) -> None:
    """Checks that a setting is a finite number >= 0.

    Raises:
        ValueError: naming the setting, its value and the rule.
        TypeError: no number.
    """
    number = _number(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{_WHERE} {name} = {number}. Violated constraint: {name} >= 0.")


def check_betas(name: str, value: Any) -> None:
    """Checks that a setting is two weights in [0, 1).

    Raises:
        ValueError: naming the setting, its value and the rule.
        TypeError: no two numbers.
    """
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TypeError(f"{_WHERE} expected {name} as two numbers; got {short(value)}.")
    if not all(0 <= _number(name, beta) < 1 for beta in value):
        raise ValueError(f"{_WHERE} {name} = {value}. Violated constraint: both in [0, 1).")


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{_WHERE} {name} = a tensor {tuple(value.shape)}. Violated constraint: a number, "
            "or a tensor of one element."
        )
    try:
        if isinstance(value, str | bytes):  # float() would read them
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
        raise TypeError(f"{_WHERE} expected {name} as a number; got {short(value)}.") from None


def short(value: Any) -> str:
    """A value and its type for a message, whatever it is."""
    text = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return f"{text[:80]} of type {type(value).__name__}"


def settings_of(group: dict[str, Any]) -> _C.GroupSettings:
    """What the engine needs to know of a group at this step."""
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    if group["kind"] == "fallback":
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return _C.GroupSettings(lr, lr, weight_decay, beta1, beta2, float(group["eps"]))
    # The Fisher ball shrinks with lr / reference: a scheduler's base (OneCycleLR's: its peak), or
    # else the first lr that was not 0.
    group["first_lr"] = group["first_lr"] or lr
    reference = float(group.get("max_lr", group.get("initial_lr", 0.0))) or group["first_lr"]
    return _C.GroupSettings(lr, reference, weight_decay)


def warn_unused_lr(lr: Any, fallback_lr: Any) -> None:
    """A group without pairs has its own `lr`, which would mean nothing."""
    warnings.warn(
        f"{_WHERE} a parameter group holds no LoRA pair, so its lr={float(lr):g} (output radius of "
        f"pairs) is not used; AdamW trains it at fallback_lr={float(fallback_lr):g}. Remedy: "
        "give that group 'fallback_lr'.",
        UserWarning,
        stacklevel=2,
    )
