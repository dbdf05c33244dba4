"""Whether a saved state can be this optimizer's: all of it is checked before anything is taken."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from pyctrlora.param_groups import VERSION, check_betas, check_rate, short

_WHERE = "[pyctrlora.CTROptimizer]"


def check_fits(groups: list[dict[str, Any]], state_dict: Any) -> None:
    """Checks that a saved state has these groups and, if it has any tensors, that they are ours.

    Raises:
        ValueError: it is another optimizer's, another version's or damaged, or its groups differ.
        TypeError: one of its numbers is none.
    """
    _check_parts(state_dict)
    section = state_dict.get("ctrlora")
    if section is None and state_dict["state"]:
        raise ValueError(
            f"{_WHERE} expected a state dict of CTROptimizer; got one without the key 'ctrlora'. "
            "Remedy: start without it; another optimizer's state cannot be used."
        )
    if section is None:
        warnings.warn(
            f"{_WHERE} the state dict has no 'ctrlora' section: momenta, curvature and counters "
            "stay as they are. Remedy: keep all top-level keys when saving.",
            UserWarning,
            stacklevel=2,
        )
    else:
        _check_section(section)
    saved = state_dict["param_groups"]
    fits = [[(_plain(g.get("kind")), len(g["params"])) for g in side] for side in (groups, saved)]
    if fits[0] != fits[1]:
        raise ValueError(
            f"{_WHERE} expected saved groups (kind, parameters) {fits[0]}; got {fits[1]}. Remedy: "
            "attach(model) and build the optimizer as when the state was saved."
        )
    for group in saved:
        _check_settings(group)


def _check_parts(state_dict: Any) -> None:
    if not isinstance(state_dict, dict):
        raise _damaged("", "a dict", state_dict)
    for part, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(part), kind):
            raise _damaged(part, f"a {kind.__name__}", state_dict.get(part))
    for group in state_dict["param_groups"]:
        if not isinstance(group, dict):
            raise _damaged("param_groups", "dicts", group)
        if not isinstance(group.get("params"), list):
            raise _damaged("params", "a list", group.get("params"))


def _check_section(section: Any) -> None:
    if not isinstance(section, dict):
        raise _damaged("ctrlora", "a dict", section)
    version = section.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise ValueError(
            f"{_WHERE} expected a state dict of version {VERSION}; got {_plain(version)}. "
            "Remedy: load it with the pyctrlora that wrote it."
        )
    tensors = section.get("tensors")
    if not isinstance(tensors, dict):
        raise _damaged("tensors", "a dict", tensors)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise _damaged(f"tensors[{short(name)}]", "a tensor under a name", tensor)


def _check_settings(group: dict[str, Any]) -> None:
    """The numbers that the next step reads."""
    fallback = group["kind"] == "fallback"
    needed = {"lr", "weight_decay", *(("betas", "eps") if fallback else ("first_lr",))}
    missing = sorted(needed - group.keys())
    if missing:
        raise _damaged("param_groups", f"groups with {sorted(needed)}", f"none of {missing}")
    for name in needed | ({"initial_lr", "max_lr"} & group.keys()):
        if name == "betas":
            check_betas(name, group[name])
        else:
            check_rate(name, group[name])


def _plain(value: Any) -> Any:
    """As it is where it can be compared and printed."""
    return value if isinstance(value, str | int | None) else short(value)


def _damaged(part: str, expected: str, got: Any) -> ValueError:
    where = f" under '{part}'" if part else ""
    return ValueError(
        f"{_WHERE} expected {expected}{where} in a saved state; got {short(got)}. Remedy: an older "
        "checkpoint; this one was changed after it was written."
    )
