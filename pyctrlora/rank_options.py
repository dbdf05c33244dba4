"""A rank budget as the engine takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyctrlora import _C

if TYPE_CHECKING:
    from collections.abc import Sequence

_WHERE = "[pyctrlora.CTROptimizer]"


def make_rank_options(
    pairs: Sequence[_C.LoraPair],
    rank_budget: Any,
    total_steps: Any,
    min_rank: int = 1,
    rank_start: str = "full",
) -> _C.RankOptions:
    """The engine's rank options, checked.

    Args:
        pairs: the layers that share the budget.
        rank_budget: a float: that share of the allocated parameters, in (0, 1]; an int: so many
            parameters.
        total_steps: length of the training.
        min_rank: least rank of a layer.
        rank_start: "full" for the over-provisioned start, or "budget".

    Raises:
        TypeError: the budget is no number, or total_steps or min_rank no whole number.
        ValueError: total_steps is missing, the budget is out of range, rank_start unknown.

    Example:
        >>> import torch
        >>> pair = _C.LoraPair(torch.ones(4, 6), torch.ones(8, 4), 1.0, "x")
        >>> make_rank_options([pair], 0.5, total_steps=1000).budget
        28
    """
    if isinstance(rank_budget, bool) or not isinstance(rank_budget, int | float):
        raise TypeError(
            f"{_WHERE} expected rank_budget as a float (share of the allocated parameters), an int "
            f"(parameters) or None; got {rank_budget!r} of type {type(rank_budget).__name__}."
        )
    if total_steps is None:
        raise ValueError(
            f"{_WHERE} expected total_steps with rank_budget: the schedule is in fractions of the "
            "training. Remedy: total_steps=len(loader) * epochs // accumulation_steps."
        )
    for name, value in (("total_steps", total_steps), ("min_rank", min_rank)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"{_WHERE} expected {name} as an int; got {value!r} of type {type(value).__name__}."
            )
    if rank_start not in ("budget", "full"):
        raise ValueError(
            f"{_WHERE} rank_start = {rank_start!r}. Violated constraint: 'budget' or 'full'."
        )
    layers = [_C.RankLayer(p.name, p.b.shape[0], p.a.shape[1], p.a.shape[0]) for p in pairs]
    rules = _C.RankRules(min_rank)
    if isinstance(rank_budget, float):
        budget = _C.budget_from_fraction(layers, rank_budget, rules)
    else:
        budget = rank_budget
        _C.check_budget(layers, budget, rules)
    schedule = _C.RankSchedule(total_steps, descend=rank_start == "full")
    options = _C.RankOptions(budget, schedule, rules)
    options.validate()
    return options


def rebudget(options: _C.RankOptions, pairs: Sequence[_C.LoraPair]) -> _C.RankOptions:
    """The same options for pairs that have shrunk: no more than they have, which is the start."""
    allocated = sum(p.a.numel() + p.b.numel() for p in pairs)
    least = min(options.rules.min_rank, *(p.a.shape[0] for p in pairs))
    plain = {
        **(as_plain(options) or {}),
        "budget": min(options.budget, allocated),
        "min_rank": least,
    }
    return _from(plain)


def as_plain(options: _C.RankOptions | None) -> dict[str, Any] | None:
    """Numbers, for pickling."""
    if options is None:
        return None
    schedule, rules = options.schedule, options.rules
    return {
        "budget": options.budget,
        "total_steps": schedule.total_steps,
        "descend": schedule.descend,
        "min_rank": rules.min_rank,
    }


def from_plain(plain: dict[str, Any] | None) -> _C.RankOptions | None:
    """Back again."""
    return None if plain is None else _from(plain)


def _from(plain: dict[str, Any]) -> _C.RankOptions:
    schedule = _C.RankSchedule(plain["total_steps"], descend=plain["descend"])
    return _C.RankOptions(plain["budget"], schedule, _C.RankRules(plain["min_rank"]))
