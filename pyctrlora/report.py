"""The dict of `CTROptimizer.report()`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pyctrlora.roster import Roster


def report(roster: Roster, metrics: dict[str, float], ranks: dict[str, int]) -> dict[str, Any]:
    """What has happened so far, as plain types (JSON).

    Args:
        roster: of the optimizer.
        metrics: its numbers now.
        ranks: its active ranks now.

    Returns:
        "metrics"; "ranks" and "allocated": by layer; "parameters": those of the active directions;
        "curvature": by layer, the mean curvature c of M = c I that the adapter sees, from
        Hutchinson's traces (None without) and from the factors: a cross-check;
        "budget": None without one; "events": one dict a layer and event (step, layer, from, to,
        utility); "history": {"steps": [...], "ranks": {layer: [...]}, "parameters": [...]} after
        the start and after each event; "training": {"steps": [...], name: [...]} of the steps that
        `CTROptimizer.record` kept (None where a number is missing).
    """
    engine = roster.engine
    pairs = [pair for _, pair in roster.all_pairs()]
    cost = {pair.name: pair.a.shape[1] + pair.b.shape[0] for pair in pairs}
    rows = engine.rank_history()
    names = [name for group in engine.layout() for name in group]
    history = [dict(zip(names, row, strict=False)) for _, row in rows]
    events = [
        {
            "step": event.step,
            "layer": event.layer,
            "from": event.from_rank,
            "to": event.to_rank,
            "utility": event.utility,
        }
        for event in engine.rank_events()
    ]
    records = roster.records
    recorded = sorted({key for row in records for key in row} - {"steps", "state_bytes"})
    training = {key: [row.get(key) for row in records] for key in ("steps", *recorded)}
    return {
        "metrics": metrics,
        "training": training,
        "ranks": ranks,
        "allocated": {pair.name: pair.a.shape[0] for pair in pairs},
        "parameters": sum(cost[name] * rank for name, rank in ranks.items()),
        "budget": None if roster.rank_options is None else roster.rank_options.budget,
        "curvature": {
            name: {"hutchinson": _known(probed), "kfac": _known(factors)}
            for name, (probed, factors) in engine.curvature().items()
        },
        "events": events,
        "history": {
            "steps": [step for step, _ in rows],
            "ranks": {name: [row[name] for row in history] for name in (history or [{}])[0]},
            "parameters": [sum(cost[n] * r for n, r in row.items()) for row in history],
        },
    }


def record(
    roster: Roster, metrics: dict[str, float], lr: float, loss: float | Tensor | None
) -> None:
    """Keeps one step's numbers for `report`."""
    row = {**metrics, "lr": lr}
    if loss is not None:
        row["loss"] = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
    roster.records.append(row)


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
