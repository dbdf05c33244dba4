"""What each default is worth on the demo's job: validation loss with one thing changed at a time.

    python bench/python/bench_ablation.py [--seeds 0 1 2] [--steps 72] [--out FILE] [--resume]

With --resume the rows that FILE has are not repeated: right for a new row, wrong after a change of
the method or of a default. 72 steps are 0.6 of those of `bench_convergence.py`, which has AdamW's
best final losses for the same seeds. Ranks are compared over the whole 120 steps, full, half and
budget each at its best of four learning rates. Losses do not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from common import RESULTS, record
from jobs import demo_base

from pyctrlora.demo.job import gpt_job
from pyctrlora.demo.train import CTR, Settings, fine_tune

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyctrlora.demo.job import Job

CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.07},
    {"lr": 0.14},
    {"beta1": 0.0},
    {"beta1": 0.5},
    {"beta1": 0.8},
    {"factor_every": 2},
    {"factor_every": 3},
    {"factor_every": 12},
    {"factor_every": 12, "factor_beta": 0.002},
    {"factor_every": 24},
    {"factor_beta": 0.0},
    {"factor_beta": 0.3},
    {"factor_beta": 0.8},
    {"factor_beta": 0.95},
    {"whitening": 0.45},
    {"whitening": 0.65},
    {"damping": 0.003},
    {"damping": 0.03},
    {"kl_radius": 0.0025},
    {"kl_radius": 0.01},
    {"kl_radius": math.inf},
    {"rms_beta": 0.0},
    {"rms_beta": 0.5},
    {"rms_beta": 0.9},
    {"sketch_rank": 8},
    {"sketch_rank": 32},
    {"sample_rows": 64},
    {"sample_rows": 1024},
    {"step_length": "radius", "lr": 0.05},
    {"curvature": "gradient"},
    {"whitening": 0.0},
    {"balance_every": 10},
    {"factor_every": 3, "beta1": 0.8},
)
CALIBRATION = 8  # batches of `cg_init` before the first step
RANKS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("rank 8", 8, {}),
    ("rank 8, rank_budget 0.5", 8, {"rank_budget": 0.5}),
    ("rank 8, rank_budget 0.5, rank_start budget", 8, {"rank_budget": 0.5, "rank_start": "budget"}),
    ("rank 4", 4, {}),
)
RANK_LRS = (0.2, 0.4, 0.8)  # beside the default; each of these rows counts at its best
SWEPT = ("rank 8", "rank 8, rank_budget 0.5", "rank 4")


def losses(job: Job, settings: Settings, seeds: list[int], lr: float) -> dict[str, Any]:
    """Final loss of each seed, and their mean."""
    runs = [
        fine_tune(job, dataclasses.replace(settings, seed=seed), CTR, lr)[0].final_loss
        for seed in seeds
    ]
    return {"mean": statistics.mean(runs), "losses": runs}


def gap_closed(ranks: dict[str, Any]) -> float:
    """Share of the loss between rank 4 and rank 8 that the budget closes."""
    full, budget, half = (
        min(float(ranks[key]["mean"]) for key in (row, *(f"{row}, lr {lr}" for lr in RANK_LRS)))
        for row in SWEPT
    )
    return (half - budget) / (half - full)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank-steps", type=int, default=Settings.steps)
    parser.add_argument("--resume", action="store_true")
    options, base = demo_base(parser, 72)
    job = gpt_job(base, 8)
    what = {"steps": options.steps, "rank_steps": options.rank_steps, "seeds": options.seeds}
    result: dict[str, Any] = {**what, "changes": {}, "ranks": {}}
    path = options.out or RESULTS / "ablation.json"
    old = json.loads(path.read_text()) if options.resume else {}
    known = old if all(old.get(key) == value for key, value in what.items()) else {}

    def note(part: str, name: str, run: Callable[[], dict[str, Any]]) -> None:
        result[part][name] = known.get(part, {}).get(name) or run()
        print(f"{name}: {result[part][name]['mean']:.4f}", flush=True)

    def final(
        job: Job, steps: int, own: dict[str, Any], lr: float = Settings.lr, calibration: int = 0
    ) -> dict[str, Any]:
        settings = Settings(steps=steps, evaluations=1, options=own, calibration=calibration)
        return losses(job, settings, options.seeds, lr)

    for change in CHANGES:
        own = dict(change)
        lr = own.pop("lr", Settings.lr)
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "defaults"
        note("changes", name, partial(final, job, options.steps, own, lr))
    run = partial(final, job, options.steps, {}, calibration=CALIBRATION)
    note("changes", f"cg_init, {CALIBRATION} batches", run)
    for name, rank, own in RANKS:
        note("ranks", name, partial(final, gpt_job(base, rank), options.rank_steps, own))
        for lr in RANK_LRS if name in SWEPT else ():
            run = partial(final, gpt_job(base, rank), options.rank_steps, own, lr)
            note("ranks", f"{name}, lr {lr}", run)
    result["gap_closed"] = gap_closed(result["ranks"])
    record("ablation", result, options.out)


if __name__ == "__main__":
    main()
