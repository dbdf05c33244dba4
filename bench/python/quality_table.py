"""The table of `bench_quality.py` from its runs."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING, Any

from quality_methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

Run = dict[str, Any]
Point = Any  # (steps, seconds, loss or None)
REFERENCE = "lora"
HEAD = (
    "method",
    "lr",
    "score",
    "loss",
    "at 1/4, 1/2",
    "steps",
    "seconds",
    "MB",
    "decades",
    "diverged",
)


def reaches(curve: Sequence[Point], loss: float, axis: int) -> float | None:
    """Where the curve first falls to `loss`, straight between two evaluations."""
    for before, after in itertools.pairwise(curve):
        if after[2] is not None and after[2] <= loss:
            if before[2] is None or before[2] <= loss:
                return before[axis] if before[2] is not None else after[axis]
            part = (before[2] - loss) / (before[2] - after[2])
            return before[axis] + part * (after[axis] - before[axis])
    return None


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def loss_of(run: Run) -> float:
    return math.inf if run["loss"] is None else float(run["loss"])


def best_lr(runs: list[Run]) -> float:
    """The one that the other seeds were run at; before they were, the best of seed 0's sweep.

    Runs above it, made to see what diverges, may end lower by a hair and are no winners.
    """
    chosen = {run["lr"] for run in runs if run["seed"] != 0}
    sweep = [r for r in runs if r["seed"] == 0 and (not chosen or r["lr"] in chosen)]
    return float(min(sweep, key=loss_of)["lr"])


def winners(runs: list[Run]) -> dict[int, Run]:
    """The best learning rate's runs, by seed."""
    best = best_lr(runs)
    return {run["seed"]: run for run in runs if run["lr"] == best}


def shares(own: dict[int, Run], reference: dict[int, Run], axis: int) -> str:
    """Median share of the reference's steps or seconds until its final loss; how often never."""
    found = []
    for seed in own.keys() & reference.keys():
        goal = reference[seed]
        at = reaches(own[seed]["curve"], loss_of(goal), axis)
        found.append(math.inf if at is None else at / goal["curve"][-1][axis])
    if not found:
        return "-"
    middle = statistics.median(found)
    return "never" if math.isinf(middle) else f"{middle:.2f}"


def decades(runs: list[Run]) -> float:
    """Between the smallest and largest learning rate within 2 % of the best loss."""
    sweep = {run["lr"]: loss_of(run) for run in runs if run["seed"] == 0}
    good = [lr for lr, loss in sweep.items() if loss <= 1.02 * min(sweep.values())]
    return math.log10(max(good) / min(good))


def row(name: str, runs: list[Run], reference: dict[int, Run]) -> tuple[str, ...]:
    best = winners(runs)
    scores = {
        key: [run["scores"][key] for run in best.values()]
        for key in next(iter(best.values()))["scores"]
    }
    curves = [run["curve"] for run in best.values()]
    parts = [
        statistics.mean(curve[(len(curve) - 1) * quarter // 4][2] or math.inf for curve in curves)
        for quarter in (1, 2)
    ]
    above = [r for r in runs if r["seed"] == 0 and r["lr"] > 2.9 * best_lr(runs)]
    return (
        f"`{name}`: {METHODS[name].about}",
        f"{best_lr(runs):g}",
        "; ".join(spread(values) for values in scores.values()),
        spread([loss_of(run) for run in best.values()]),
        ", ".join(f"{part:.3f}" for part in parts),
        shares(best, reference, 0),
        shares(best, reference, 1),
        f"{statistics.median(run['peak_bytes'] for run in best.values()) / 1e6:.0f}",
        f"{decades(runs):.1f}",
        f"{sum(run['diverged'] for run in above)} of {len(above)}",
    )


def table(runs: list[Run]) -> str:
    """Markdown: one table a task, methods in the order of METHODS."""
    lines: list[str] = []
    for task in dict.fromkeys(run["task"] for run in runs):
        of_task = [run for run in runs if run["task"] == task]
        names = ", ".join(of_task[0]["scores"])
        lines += [f"{task} ({of_task[0]['steps']} steps; score: {names})", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
        of_reference = [run for run in of_task if run["method"] == REFERENCE]
        reference = winners(of_reference) if of_reference else {}  # then two columns stay empty
        for name in METHODS:
            own = [run for run in of_task if run["method"] == name]
            if any(run["seed"] == 0 for run in own):
                lines.append("| " + " | ".join(row(name, own, reference)) + " |")
        lines.append("")
    return "\n".join(lines)
